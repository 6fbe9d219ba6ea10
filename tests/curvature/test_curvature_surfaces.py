"""Numbers of a landscape against surfaces whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest

from robust_vit import curvature, errors
from robust_vit.curvature import surfaces

X = curvature.offsets(-1, 1, 21)
Y = curvature.offsets(-0.5, 1.5, 9)


def _plane(function, axes=(X, Y)):
    return function(*np.meshgrid(*axes, indexing="ij"))


def test_a_quadric_has_its_second_derivatives_whatever_its_slope():
    values = _plane(lambda x, y: 3 + 2 * x - y + 2 * x**2 - 1.5 * y**2 + 4 * x * y)
    np.testing.assert_allclose(surfaces.curvature(values, (X, Y)), [4.0, -3.0], rtol=1e-12)
    assert surfaces.centre(values, (X, Y)) == 3.0
    # Three points where the centre is next to the end; leading axes are kept.
    short = curvature.offsets(-0.1, 5, 20)
    lines = np.stack([0.5 * a * short**2 + short**3 * 0 for a in (1.0, 7.0)])
    np.testing.assert_allclose(surfaces.curvature(lines, (short,)), [[1.0], [7.0]], rtol=1e-9)


def test_five_points_average_over_the_scale_of_the_step():
    """Of |x| the fitted parabola has 2 (2·2 - 1) / 7h: a kink is no Hessian."""
    step = X[1] - X[0]
    np.testing.assert_allclose(surfaces.curvature(np.abs(X), (X,)), [6 / (7 * step)], rtol=1e-12)


def test_the_rise_is_the_mean_of_both_ways():
    values = _plane(lambda x, y: 5 + x + 2 * x**2 + 3 * y**2, (X, X))
    np.testing.assert_allclose(surfaces.rise(values, (X, X), 0.5), (0.5 + 0.75) / 2, rtol=1e-12)
    # Between grid points by interpolation: of |x| without error.
    np.testing.assert_allclose(surfaces.rise(np.abs(X), (X,), 0.33), 0.33)
    np.testing.assert_allclose(surfaces.rise(np.abs(X), (X,), 1.0), 1.0)
    with pytest.raises(errors.UserError, match=r"radius 0.6 is not on it"):
        surfaces.rise(_plane(lambda x, y: x + y), (X, Y), 0.6)


def test_the_radius_is_that_of_the_steepest_way():
    cone = 2.0 + np.stack([4 * np.abs(X), np.abs(X)])
    np.testing.assert_allclose(surfaces.radius(cone, (X,)), [0.5, np.inf])
    valley = _plane(lambda x, y: 1.0 + np.maximum(-10.0 * x, 0) + np.maximum(2 * y, 0), (X, X))
    np.testing.assert_allclose(surfaces.radius(valley, (X, X)), 0.1, rtol=1e-12)
    # Steepest along a diagonal: sqrt(2) times as far as its coordinates.
    ridge = _plane(lambda x, y: 1.0 + np.maximum(x + y - 0.5, 0) * 4, (X, X))
    np.testing.assert_allclose(surfaces.radius(ridge, (X, X)), 0.375 * np.sqrt(2), rtol=1e-12)
    broken = np.where(X > 0.45, np.inf, 1.0)
    np.testing.assert_allclose(surfaces.radius(broken, (X,)), 0.4)
    np.testing.assert_allclose(surfaces.radius(np.where(X > 0.45, np.nan, 1.0), (X,)), 0.4)


def test_the_share_of_negative_second_differences():
    assert surfaces.negative_share(_plane(lambda x, y: x**2 + y**4), (X, Y)) == 0
    assert surfaces.negative_share(_plane(lambda x, y: -(x**2) - y**2), (X, Y)) == 1
    # Up and down: convex along x in 19 x 9 places, concave along y in 21 x 7.
    saddle = _plane(lambda x, y: x**2 - y**2)
    np.testing.assert_allclose(surfaces.negative_share(saddle, (X, Y)), 147 / (147 + 171))
    flat = np.random.default_rng(0).normal(0, 1e-7, (21, 9))
    assert surfaces.negative_share(flat, (X, Y)) > 0.3
    assert surfaces.negative_share(flat, (X, Y), noise=1e-5) == 0
    holed = X**2
    holed[3] = np.inf
    assert surfaces.negative_share(holed, (X,)) == 0


def test_roughness_is_twice_the_height_of_the_bumps_over_the_range():
    assert surfaces.roughness(np.abs(X - 0.3), (X,)) == 0
    assert surfaces.roughness(np.exp(X), (X,)) == 0
    assert surfaces.roughness(np.zeros(21), (X,)) == 0
    bumps = np.array([4.0, 1.0, 3.0, 0.0, 1.0, 0.5, 2.0])
    np.testing.assert_allclose(surfaces.roughness(bumps, (curvature.offsets(-1, 1, 7),)), 2 * (2.0 + 0.5) / 4.0)
    # The lines along x have the bumps, those along y have none: 5 of 12 lines.
    values = np.repeat(bumps[:, None], 5, axis=1)
    axes = curvature.offsets(-1, 1, 7), curvature.offsets(-1, 1, 5)
    np.testing.assert_allclose(surfaces.roughness(values, axes), 1.25 * 5 / 12)
    values[0, 0] = np.nan  # One line along each axis is left out.
    np.testing.assert_allclose(surfaces.roughness(values, axes), 1.25 * 4 / 10)


def test_an_axis_without_zero_is_refused():
    with pytest.raises(errors.UserError, match="does not hold zero"):
        surfaces.centre(np.zeros(4), (np.linspace(-1, 1, 4),))
