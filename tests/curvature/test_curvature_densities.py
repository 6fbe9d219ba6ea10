"""Spectral densities against spectra that are known: exactly at full rank, and in the limit of large random matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors
from robust_vit.curvature import krylov, operators

KEY = jax.random.key(0)


def _with_spectrum(values, seed: int = 0) -> operators.Symmetric:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return operators.Symmetric(jnp.asarray(basis * values @ basis.T, jnp.float32))


def test_each_probe_is_the_quadrature_of_its_own_measure():
    """Weights sum to one; their first two moments are the probe's `v'Av` and `|Av|^2`, whatever the rank."""
    operator = _with_spectrum(np.linspace(-1, 2, 40))
    found = curvature.density(operator, KEY, rank=5, probes=3)
    assert found.nodes.shape == (3, 5)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, atol=1e-6)
    again = curvature.density(operator, KEY, rank=40, probes=3)
    for power in (1, 2, 9):  # A rule of 5 nodes is exact to degree 9.
        few, all_ = ((one.weights * one.nodes**power).sum(axis=1) for one in (found, again))
        np.testing.assert_allclose(few, all_, atol=2e-5 * 2.0**power)
    assert found.applications == 15


def test_low_rank_takes_no_more_applications_than_asked_for():
    found = curvature.density(_with_spectrum(np.r_[np.zeros(75), 1.0, 2.0, 3.0, 4.0, 5.0]), KEY, rank=50, probes=2)
    assert found.applications == 100
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, atol=1e-6)


class _Counted(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def _loss(params, batch):
    return jnp.mean(jnp.log1p(jnp.exp(-batch["y"] * (jnp.tanh(batch["x"] @ params["u"]) @ params["w"]))))


def _streamed(seed: int = 0):
    rng = np.random.default_rng(seed)
    params = {"u": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    batches = _Counted(
        {
            "x": jnp.asarray(rng.normal(size=(n, 4)), jnp.float32),
            "y": jnp.asarray(rng.choice([-1.0, 1.0], n), jnp.float32),
        }
        for n in (5, 3)
    )
    return curvature.stream(functools.partial(curvature.hessian, _loss, params, separable=False), batches), batches


@pytest.mark.slow
def test_over_a_data_set_all_probes_share_each_pass(tmp_path, monkeypatch):
    operator, batches = _streamed()
    options = {"rank": 12, "probes": 5}
    batches.passes = 0
    found = curvature.density(operator, KEY, **options)
    assert batches.passes == 12
    assert found.applications == 60
    for block, passes in ((1, 60), (2, 36)):
        batches.passes = 0
        other = curvature.density(operator, KEY, block=block, **options)
        assert batches.passes == passes
        np.testing.assert_allclose(other.nodes, found.nodes, atol=2e-5)
        np.testing.assert_allclose(other.weights.sum(axis=1), 1.0, atol=1e-6)
        for power in (1, 2, 3):
            moments = [(one.weights * one.nodes**power).sum(axis=1) for one in (other, found)]
            np.testing.assert_allclose(*moments, atol=1e-6)
    # Killed after two looks of six steps, it goes on to the same bytes; another stream is refused.
    extend, looks = krylov.extend, []

    def killed(*arguments, **keywords):
        looks.append(1)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return extend(*arguments, **keywords)

    monkeypatch.setattr(krylov, "extend", killed)
    with pytest.raises(KeyboardInterrupt):
        curvature.density(operator, KEY, folder=tmp_path, **options)
    monkeypatch.setattr(krylov, "extend", extend)
    batches.passes = 0
    again = curvature.density(operator, KEY, folder=tmp_path, **options)
    assert batches.passes == 7  # One to see that it is the same operator.
    np.testing.assert_array_equal(again.nodes, found.nodes)
    np.testing.assert_array_equal(again.weights, found.weights)
    with pytest.raises(errors.UserError, match="another operator"):
        curvature.density(_streamed(1)[0], KEY, folder=tmp_path, **options)


def test_probes_in_lock_step_are_those_one_by_one():
    operator = _with_spectrum(np.r_[np.linspace(-1, 2, 20), np.zeros(20)])
    one, four = (curvature.density(operator, KEY, rank=30, probes=4, block=block) for block in (None, 4))
    assert one.applications == four.applications == 120
    for power in (1, 2, 9):
        moments = [(each.weights * each.nodes**power).sum(axis=1) for each in (one, four)]
        np.testing.assert_allclose(*moments, atol=2e-6 * 2.0**power)


def test_clusters_and_pairs_keep_their_shares():
    """A quarter at -1, a half at 0 and a quarter at 1: means over probes within their errors."""
    values = np.repeat([-1.0, 0.0, 1.0], (50, 100, 50))
    found = curvature.density(_with_spectrum(values), KEY, rank=20, probes=40)
    for estimate, expected in ((found.negative(), 0.25), (found.positive(), 0.25), (found.negative_mass(), 0.5)):
        assert estimate.samples == 40
        assert 0.001 < estimate.standard_error < 0.02
        assert abs(estimate.value - expected) < 4 * estimate.standard_error
    trace = found.trace()
    assert abs(trace.value) < 4 * trace.standard_error


def test_an_operator_of_low_rank_and_zero_end_early_and_without_a_nan():
    found = curvature.density(_with_spectrum(np.r_[np.zeros(28), 3.0, 5.0]), KEY, rank=30, probes=4)
    np.testing.assert_allclose(np.nansum(found.weights, axis=1), 1.0, atol=1e-5)
    assert abs(found.positive().value - 2 / 30) < 4 * found.positive().standard_error
    nothing = curvature.density(operators.Symmetric(jnp.zeros((6, 6))), KEY, rank=4, probes=2)
    assert nothing.negative().value == nothing.positive().value == nothing.negative_mass().value == 0.0
    mean, _ = nothing.curve(np.array([0.0, 3.0]), width=1.0)
    np.testing.assert_allclose(mean, [1 / np.sqrt(2 * np.pi), np.exp(-4.5) / np.sqrt(2 * np.pi)])


def test_the_semicircle():
    """A Gaussian orthogonal ensemble: `sqrt(4 - x^2) / 2 pi` on [-2, 2] (Wigner 1955)."""
    size = 600
    draws = np.random.default_rng(0).normal(size=(size, size))
    found = curvature.density(
        operators.Symmetric(jnp.asarray((draws + draws.T) / np.sqrt(2 * size), jnp.float32)), KEY, rank=60, probes=10
    )
    at = np.linspace(-1.8, 1.8, 19)
    mean, error = found.curve(at, width=0.1)
    # Both sides smoothed alike.
    fine = np.linspace(-2, 2, 4001)
    kernel = np.exp(-0.5 * ((at[:, None] - fine) / 0.1) ** 2) / (0.1 * np.sqrt(2 * np.pi))
    expected = (kernel * np.sqrt(4 - fine**2) / (2 * np.pi)).sum(axis=1) * (fine[1] - fine[0])
    np.testing.assert_allclose(mean, expected, atol=0.03)
    assert (np.abs(mean - expected) < 5 * error + 0.01).all()
    assert 0.45 < found.negative().value < 0.55


def test_marchenko_and_pastur():
    """`X'X / n` of p variables and n = 2p draws: the density and no eigenvalue below zero."""
    count, size = 800, 400
    draws = np.random.default_rng(0).normal(size=(count, size))
    operator = operators.Symmetric(jnp.asarray(draws.T @ draws / count, jnp.float32))
    found = curvature.density(operator, KEY, rank=60, probes=40)
    low, high = (1 - np.sqrt(0.5)) ** 2, (1 + np.sqrt(0.5)) ** 2
    fine = np.linspace(low, high, 4001)[1:-1]
    law = np.sqrt((high - fine) * (fine - low)) / (2 * np.pi * 0.5 * fine)
    at = np.linspace(0.2, 2.7, 14)
    kernel = np.exp(-0.5 * ((at[:, None] - fine) / 0.1) ** 2) / (0.1 * np.sqrt(2 * np.pi))
    mean, error = found.curve(at, width=0.1)
    expected = (kernel * law).sum(axis=1) * (fine[1] - fine[0])
    np.testing.assert_allclose(mean, expected, atol=0.05)
    assert (np.abs(mean - expected) < 4 * error + 0.01).all()
    assert found.negative().value == 0.0
    assert abs(found.trace().value / size - 1.0) < 0.02


def _cubic(params, batch):
    return jnp.mean(batch["x"]) * (params["a"] ** 3 - params["b"].sum() ** 2)


def test_a_density_of_a_pytree_and_of_one_probe():
    operator = curvature.hessian(_cubic, {"a": jnp.float32(1.0), "b": jnp.ones(2)}, {"x": jnp.ones(3)})
    found = curvature.density(operator, KEY, rank=100, probes=1)
    assert found.dimension == 3
    assert np.isnan(found.negative().standard_error)
    np.testing.assert_allclose(found.nodes[0], [-4.0, 0.0, 6.0], atol=1e-5)


def test_mistakes_say_what_to_do():
    for options in ({"rank": 0}, {"probes": 0}, {"block": 0}):
        with pytest.raises(errors.UserError, match=f"{next(iter(options))} is 0"):
            curvature.density(operators.Symmetric(jnp.eye(3)), KEY, **options)
