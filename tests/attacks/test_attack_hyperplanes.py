"""Moves to a hyperplane inside [0, 1]: closed forms of the distance, feasibility, and what has no solution."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from robust_vit.attacks import hyperplanes, norms

SHAPE = (3, 3, 2)
NORMS = ("linf", "l2", "l1")


def _case(seed, count=40):
    """Points with values at their bounds, normals with zeros and equal entries, gaps of both signs that can be met."""
    rng = np.random.default_rng(seed)
    points = np.round(rng.uniform(size=(count, *SHAPE)) * 8) / 8
    normals = np.round(rng.normal(size=points.shape) * 3) / 3
    room = np.where(normals > 0, 1 - points, points)
    most = (np.abs(normals) * room).sum(axis=(1, 2, 3))
    least = -(np.abs(normals) * np.where(normals > 0, points, 1 - points)).sum(axis=(1, 2, 3))
    share = rng.uniform(0.01, 0.99, size=count)
    return points, normals, np.where(rng.uniform(size=count) < 0.5, share * most, share * least)


def _reach(norm, points, normals, gaps):
    with jax.enable_x64(True):
        return np.asarray(
            hyperplanes.reach(norms.find(norm), jnp.asarray(points), jnp.asarray(normals), jnp.asarray(gaps))
        )


@pytest.mark.parametrize("norm", NORMS)
def test_moves_meet_the_hyperplane_in_the_box_at_the_exact_distance(norm):
    points, normals, gaps = _case(0)
    moves = _reach(norm, points, normals, gaps)
    np.testing.assert_allclose((normals * moves).sum(axis=(1, 2, 3)), gaps, rtol=1e-12, atol=1e-12)
    assert (points + moves).min() >= 0
    assert (points + moves).max() <= 1
    lengths = np.asarray(norms.find(norm).measure(jnp.asarray(moves)))
    exact = [
        closed_forms.distance(norm, np.sign(gap) * normal, abs(gap), point)
        for point, normal, gap in zip(points, normals, gaps, strict=True)
    ]
    np.testing.assert_allclose(lengths, exact, rtol=1e-6)


def test_moves_of_least_sum_agree_with_linear_programming():
    points, normals, gaps = _case(1, count=5)
    moves = _reach("l1", points, normals, gaps)
    for point, normal, gap, move in zip(points, normals, gaps, moves, strict=True):
        point, normal = point.ravel(), normal.ravel()
        bounds = [(0, 1 - p) for p in point] + [(0, p) for p in point]
        found = scipy.optimize.linprog(
            np.ones(2 * point.size), A_eq=np.concatenate((normal, -normal))[None], b_eq=[gap], bounds=bounds
        )
        np.testing.assert_allclose(np.abs(move).sum(), found.fun, rtol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_a_hyperplane_outside_of_the_box_is_met_at_its_corner(norm):
    points, normals, gaps = _case(2)
    moves = _reach(norm, points, normals, np.sign(gaps) * 1e3)
    toward = np.sign(gaps)[:, None, None, None] * normals
    corner = np.where(toward > 0, 1.0, np.where(toward < 0, 0.0, points))
    np.testing.assert_allclose(points + moves, corner, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_what_cannot_move_stays(norm):
    """No normal; a gap that is closed already; logits that are not finite, which must not run forever."""
    points, normals, gaps = _case(3)
    np.testing.assert_array_equal(_reach(norm, points, 0 * normals, gaps), 0)
    np.testing.assert_array_equal(_reach(norm, points, normals, 0 * gaps), 0)
    assert np.isfinite(_reach(norm, points, normals, np.where(np.arange(40) < 3, np.nan, gaps))[3:]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_scale_of_the_normals_has_no_bearing(norm):
    """A power of two changes no digit, down to gradients whose squares underflow."""
    points, normals, gaps = (np.asarray(array, np.float32) for array in _case(4))
    small = np.float32(2.0**-100)
    moves = [hyperplanes.reach(norms.find(norm), points, scale * normals, scale * gaps) for scale in (1, small)]
    np.testing.assert_array_equal(*map(np.asarray, moves))
