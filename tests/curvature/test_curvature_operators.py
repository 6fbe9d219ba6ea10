"""What an operator says of itself: whether it is symmetric, and whether it is one map."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import curvature, errors
from robust_vit.curvature import operators


def _cubes(params, batch):
    return jnp.sum(params["w"] ** 3) * jnp.mean(batch["x"])


def _flips(params, batch):
    """A `custom_vjp` whose backward pass is wrong: its Hessian is not symmetric."""

    @jax.custom_vjp
    def tilt(w):
        return jnp.sum(w**3)

    tilt.defvjp(lambda w: (tilt(w), w), lambda w, g: (g * jnp.roll(w, 1) ** 2,))
    return tilt(params["w"]) * jnp.mean(batch["x"])


def test_asymmetry_tells_a_hessian_from_a_mistake():
    params, batch = {"w": jnp.arange(1.0, 6.0)}, {"x": jnp.ones(3)}
    assert float(curvature.asymmetry(curvature.hessian(_cubes, params, batch), jax.random.key(0))) < 1e-6
    assert float(curvature.asymmetry(curvature.hessian(_flips, params, batch), jax.random.key(0))) > 1e-2
    assert float(curvature.asymmetry(operators.Symmetric(jnp.zeros((3, 3))), jax.random.key(0))) == 0.0


@dataclasses.dataclass
class _Restless:
    """A map whose scale is drawn anew in each application, as dropout that is not frozen."""

    like: jax.Array
    draws: np.random.Generator

    def __call__(self, vector):
        return self.draws.uniform(1, 2) * vector


def test_indeterminism_tells_one_map_from_another_each_time():
    restless = _Restless(jnp.ones(5), np.random.default_rng(0))
    assert float(curvature.indeterminism(restless, jax.random.key(0))) > 1e-2
    assert float(curvature.asymmetry(restless, jax.random.key(0))) > 1e-3
    assert float(curvature.indeterminism(operators.Symmetric(jnp.eye(5)), jax.random.key(0))) == 0.0


@pytest.mark.parametrize("measure", [curvature.asymmetry, curvature.indeterminism])
def test_what_is_not_finite_is_no_sign_of_health(measure):
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(errors.UserError, match="not finite"):
            measure(operators.Symmetric(jnp.full((3, 3), value)), jax.random.key(0))
    # Within a compiled function nothing can be raised, and nothing is hidden.
    bad = operators.Symmetric(jnp.full((3, 3), jnp.nan))
    assert jnp.isnan(jax.jit(measure)(bad, jax.random.key(0)))
    assert float(jax.jit(measure)(operators.Symmetric(jnp.zeros((3, 3))), jax.random.key(0))) == 0.0
