"""Corruptions: stated moments, one compilation for all severities, draws that belong to the example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from robust_vit import corruptions, errors

ROWS = {"gaussian_noise": ("imagenet", "cifar")}


def test_every_corruption_has_a_row():
    assert set(ROWS) == set(corruptions.CORRUPTIONS)


@pytest.mark.parametrize(("benchmark", "last"), [("imagenet", 0.38), ("cifar", 0.10)])
def test_gaussian_noise_has_the_benchmarks_deviations(benchmark, last):
    corrupt = corruptions.build("gaussian_noise", benchmark=benchmark)
    assert corrupt.deviations[-1] == last
    images = jnp.full((20, 32, 32, 3), 0.5)
    keys = jax.random.split(jax.random.key(0), 20)
    for severity in corruptions.SEVERITIES:
        found = np.asarray(corrupt(keys, images, severity), np.float64)
        assert 0 <= found.min() <= found.max() <= 1
        deviation = corrupt.deviations[severity - 1]
        normal = scipy.stats.norm(0.5, deviation)
        inside = found[(found > 0) & (found < 1)]
        # What is clipped piles up at the ends; between them it is the normal distribution, cut off.
        np.testing.assert_allclose(
            (found == 0).mean(), normal.cdf(0), atol=4 * np.sqrt(normal.cdf(0) / found.size) + 1e-5
        )
        cut = scipy.stats.truncnorm(-0.5 / deviation, 0.5 / deviation, 0.5, deviation)
        assert scipy.stats.kstest(inside, cut.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ROWS)
def test_one_compilation_serves_all_severities(name):
    corrupt, traces = corruptions.build(name), []
    images, keys = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1)), jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def jitted(keys, images, severity):
        traces.append(severity)
        return corrupt(keys, images, severity)

    for severity in corruptions.SEVERITIES:
        np.testing.assert_allclose(jitted(keys, images, severity), corrupt(keys, images, severity), atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ROWS)
def test_draws_belong_to_the_example(name):
    corrupt = corruptions.build(name)
    images, keys = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1)), jax.random.split(jax.random.key(0), 4)
    found = corrupt(keys, images, 3)
    np.testing.assert_array_equal(corrupt(keys[::-1], images[::-1], 3), found[::-1])
    assert not np.array_equal(found[0] - images[0], found[1] - images[1])


def test_mistakes_say_what_to_do():
    corrupt = corruptions.build("gaussian_noise")
    for severity in (0, 6):
        with pytest.raises(errors.UserError, match="1, 2, 3, 4, 5"):
            corrupt(jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 2, 2, 1)), severity)
    with pytest.raises(errors.UserError, match="gaussian_noise"):
        corruptions.build("gausian_noise")
    with pytest.raises(errors.UserError, match="'benchmark'"):
        corruptions.build("gaussian_noise", bench="cifar")
    with pytest.raises(errors.UserError, match="cifar"):
        corruptions.build("gaussian_noise", benchmark="cifar10")
