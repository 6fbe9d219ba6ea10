"""Norms: projections, steepest directions and draws against their definitions."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from robust_vit import errors
from robust_vit.attacks import norms

# name: (NumPy norm of a flat vector, its dual norm)
ROWS = {
    "linf": (lambda v: np.abs(v).max(), lambda v: np.abs(v).sum()),
    "l2": (np.linalg.norm, np.linalg.norm),
    "l1": (lambda v: np.abs(v).sum(), lambda v: np.abs(v).max()),
}


def test_every_norm_has_a_row():
    assert set(ROWS) == set(norms.NORMS)


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(0), (6, 4, 5, 3))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e15])
def test_measure_is_the_norm(name, scale, images):
    differences = scale * (images - 0.5)
    expected = [ROWS[name][0](np.asarray(row, np.float64).ravel()) for row in differences]
    np.testing.assert_allclose(norms.NORMS[name].measure(differences), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e15])
def test_ascend_attains_the_dual_norm(name, scale, images):
    gradients = scale * (images - 0.5)
    directions = norms.NORMS[name].ascend(gradients)
    for gradient, direction in zip(gradients, directions, strict=True):
        gradient, direction = (np.asarray(a, np.float64).ravel() for a in (gradient, direction))
        np.testing.assert_allclose(gradient @ direction, ROWS[name][1](gradient), rtol=1e-6)
        np.testing.assert_allclose(ROWS[name][0](direction), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_a_zero_gradient_goes_nowhere(name, images):
    np.testing.assert_array_equal(norms.NORMS[name].ascend(jnp.zeros_like(images)), 0.0)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("radius", [0.0, 0.01, 0.3, 10.0])
def test_projection_is_inside_and_leaves_the_inside_alone(name, radius, images):
    norm = norms.NORMS[name]
    outside = images + jax.random.normal(jax.random.key(1), images.shape)
    projected = norm.project(outside, images, jnp.float32(radius))
    assert float(projected.min()) >= 0.0
    assert float(projected.max()) <= 1.0
    assert float(norm.measure(projected - images).max()) <= radius * (1 + 1e-6) + 1e-7
    # Once inside, projecting again moves by rounding only.
    np.testing.assert_allclose(norm.project(projected, images, jnp.float32(radius)), projected, atol=2e-7)


@pytest.mark.parametrize("name", ROWS)
def test_projection_is_the_nearest_point_of_the_ball(name):
    """Away from the box the projection obeys the variational inequality `(x - p) . (y - p) <= 0` for every y inside."""
    norm, radius = norms.NORMS[name], 0.1
    clean = jnp.full((1, 3, 3, 1), 0.5)
    outside = clean + 0.15 * jax.random.normal(jax.random.key(2), clean.shape)
    projected = norm.project(outside, clean, jnp.float32(radius))
    rng = np.random.default_rng(3)
    inside = rng.normal(size=(500, *clean.shape[1:]))
    inside *= (radius * rng.uniform(0.5, 1.0, 500) / np.asarray([ROWS[name][0](d.ravel()) for d in inside]))[
        :, None, None, None
    ]
    inside = np.asarray(clean) + inside
    products = np.sum(np.asarray(outside - projected) * (inside - np.asarray(projected)), axis=(1, 2, 3))
    assert float(products.max()) <= 1e-6
    assert float(products.min()) < -1e-3


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0, 8, 40])
def test_projection_is_the_nearest_point_of_ball_and_box(name, radius, spread):
    """With pixels on the box and differences of very different size, in float64 to rounding."""
    rng = np.random.default_rng(5)
    shape = (5, 4, 4, 3)
    clean = rng.uniform(size=shape)
    clean = np.where(rng.uniform(size=shape) < 0.4, np.round(clean), clean)
    images = clean + rng.normal(size=shape) * rng.uniform(size=shape) ** spread
    expected = [closed_forms.nearest(name, image, centre, radius) for image, centre in zip(images, clean, strict=True)]
    with jax.enable_x64(True):
        found = norms.NORMS[name].project(jnp.asarray(images), jnp.asarray(clean), jnp.float64(radius))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    found = norms.NORMS[name].project(jnp.float32(images), jnp.float32(clean), jnp.float32(radius))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_climbing_has_norm_one_and_gains(name, images):
    gradients = images - 0.5
    directions = norms.NORMS[name].climb(gradients, images)
    for gradient, direction in zip(gradients, directions, strict=True):
        gradient, direction = (np.asarray(a, np.float64).ravel() for a in (gradient, direction))
        np.testing.assert_allclose(ROWS[name][0](direction), 1.0, rtol=1e-6)
        assert gradient @ direction > 0
    np.testing.assert_array_equal(norms.NORMS[name].climb(jnp.zeros_like(images), images), 0.0)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.1, 1), (0.2, 2), (0.25, 3), (1.0, 10)])
def test_the_largest_share_is_rounded_up(share, count):
    gradients = jnp.asarray([9.0, -8.0, 7.0, -6.0, 5.0, 4.0, -3.0, 2.0, 1.0, 0.5]).reshape(1, 5, 2, 1)
    with jax.enable_x64(True):
        found = norms.largest(gradients, jnp.asarray([share]))
    assert found.ravel().tolist() == [index < count for index in range(10)]


def test_climbing_in_l1_passes_over_values_at_their_bound():
    gradients = jnp.asarray([[9.0, -8.0, 7.0, -6.0]]).reshape(1, 2, 2, 1)
    images = jnp.full_like(gradients, 0.5).at[0, 0, 0, 0].set(1.0).at[0, 0, 1, 0].set(0.0)
    assert norms.L1.climb(gradients, images).ravel().tolist() == [0, 0, 1, 0]
    # Turned round, they can move.
    assert norms.L1.climb(-gradients, images).ravel().tolist() == [-1, 0, 0, 0]


@pytest.mark.parametrize("name", ROWS)
def test_draws_are_uniform_in_the_ball(name):
    """`(|d| / radius)^dimension` of a uniform draw is uniform in [0, 1], and every axis has mean zero."""
    like = jnp.zeros((4000, 2, 2, 1))
    draws = norms.NORMS[name].draw(jax.random.split(jax.random.key(4), 4000), like, jnp.float32(0.25))
    volumes = (np.asarray(norms.NORMS[name].measure(draws), np.float64) / 0.25) ** 4
    assert scipy.stats.kstest(volumes, "uniform").pvalue > 0.01
    assert float(jnp.abs(draws.mean(axis=0)).max()) < 4 * 0.25 / np.sqrt(4000)


@pytest.mark.parametrize("name", ROWS)
def test_radii_may_differ_by_example(name, images):
    norm, radii = norms.NORMS[name], jnp.array([0.0, 0.01, 0.02, 0.1, 0.2, 0.3])
    moved = norm.project(images + 5.0 * (0.5 - images), images, radii)
    each = jnp.stack([norm.project(2.5 - 4 * images[i : i + 1], images[i : i + 1], radii[i])[0] for i in range(6)])
    np.testing.assert_allclose(moved, each, atol=1e-6)
    np.testing.assert_array_equal(moved[0], images[0])


def test_an_unknown_norm_lists_the_known():
    with pytest.raises(errors.UserError, match="linf"):
        norms.find("inf")
