"""Power iteration: right where it can be, and wrong where PyHessian's rule is, with a residual that says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors
from robust_vit.curvature import operators

KEY = jax.random.key(0)


def _with_spectrum(values) -> operators.Symmetric:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(len(values), len(values))))[0]
    return operators.Symmetric(jnp.asarray(basis * np.asarray(values) @ basis.T, jnp.float32))


@pytest.mark.parametrize("rule", ["residual", "pyhessian"])
def test_well_separated_eigenvalues_are_found_in_their_order(rule):
    operator = _with_spectrum([-8.0, 4.0, 2.0, -1.0, *np.linspace(0, 0.3, 20)])
    found = curvature.power_iteration(operator, KEY, top=4, rule=rule)
    np.testing.assert_allclose(found.values, [-8, 4, 2, -1], rtol=5e-3)
    flat = np.asarray(found.vectors)
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-5)
    for value, residual, vector in zip(found.values, found.residuals, flat, strict=True):
        image = np.asarray(operator.matrix, np.float64) @ vector
        np.testing.assert_allclose(np.linalg.norm(image - value * vector), residual, rtol=1e-2, atol=1e-5)
    if rule == "residual":
        assert found.converged[0]
        # A later one inherits what the vectors before it are off by, which no more steps mend.
        assert (found.residuals <= 1.01 * 1e-3 * 8).all()


def _pyhessian(matrix, vector, steps: int, tolerance: float) -> tuple[float, int]:
    """PyHessian's loop for one eigenvalue in plain NumPy: value and products."""
    value = None
    for step in range(steps):
        image = matrix @ vector
        quotient, vector = image @ vector, image / np.linalg.norm(image)
        if value is not None and abs(value - quotient) / (abs(value) + 1e-6) < tolerance:
            return value, step + 1
        value = quotient
    return value, steps


@pytest.mark.parametrize("values", [[1.0, 0.9, 0.5], [1.0, -0.999, 0.5, 0.1], [1.0, -1.02, 0.3]])
def test_the_rule_of_pyhessian_is_its(values):
    """The same start, step by step: the same value after as many products, a near-tie of signs included."""
    operator = _with_spectrum([*values, *np.zeros(30)])
    found = curvature.power_iteration(operator, KEY, top=1, rule="pyhessian")
    start = np.asarray(curvature.power.probes.draw(jax.random.fold_in(KEY, 0), operator.like), np.float64)
    start /= np.linalg.norm(start)
    value, products = _pyhessian(np.asarray(operator.matrix, np.float64), start, 100, 1e-3)
    np.testing.assert_allclose(found.values[0], value, atol=1e-4)
    assert found.applications == products + 1


def test_a_near_tie_of_signs_is_no_eigenvalue_and_the_residual_says_so():
    operator = _with_spectrum([1.0, -0.999, *np.linspace(-0.5, 0.5, 40)])
    found = [curvature.power_iteration(operator, jax.random.key(seed), top=1, rule="pyhessian") for seed in range(6)]
    assert max(min(abs(one.values[0] - 1), abs(one.values[0] + 0.999)) for one in found) > 0.1
    assert not any(one.converged.any() for one in found)
    both = curvature.lanczos(operator, KEY, rank=30, top=2)
    np.testing.assert_allclose(both.values, [1.0, -0.999], atol=1e-4)
    assert both.converged.all()


def test_a_map_to_zero_and_one_of_low_rank_end():
    nothing = curvature.power_iteration(operators.Symmetric(jnp.zeros((5, 5))), KEY, top=2)
    np.testing.assert_array_equal(nothing.values, 0.0)
    found = curvature.power_iteration(_with_spectrum([3.0, 0.0, 0.0, 0.0]), KEY, top=6)
    np.testing.assert_allclose(found.values, [3, 0, 0, 0], atol=1e-5)
    assert np.isfinite(found.residuals).all()


def test_eigenvalues_whose_squares_underflow_are_found():
    operator = operators.Symmetric(jnp.diag(jnp.asarray([3e-23, 1e-23, 0.0], jnp.float32)))
    found = curvature.power_iteration(operator, KEY, top=1)
    np.testing.assert_allclose(found.values, [3e-23], rtol=1e-5)
    assert found.converged.all()
    assert 0 < found.residuals[0] < 3e-26
    assert not curvature.power_iteration(operator, KEY, top=1, steps=1).converged.any()


def test_mistakes_say_what_to_do():
    operator = operators.Symmetric(jnp.eye(3))
    for options, message in (({"rule": "change"}, "residual"), ({"top": 0}, "top is 0"), ({"steps": 0}, "steps is 0")):
        with pytest.raises(errors.UserError, match=message):
            curvature.power_iteration(operator, KEY, **options)
    with pytest.raises(errors.UserError, match="not finite at application 1"):
        curvature.power_iteration(operators.Symmetric(jnp.full((3, 3), jnp.nan)), KEY)
