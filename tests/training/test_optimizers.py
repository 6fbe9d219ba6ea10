"""Optimisers against one hand-computed update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_vit import errors
from robust_vit.training import optimizers

PARAMS = {"dense": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([3.0])}}
GRADIENTS = {"dense": {"kernel": jnp.array([0.3, 0.4]), "bias": jnp.array([0.0])}}


def _after_one_step(optimizer, gradients=GRADIENTS, **extra):
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(gradients, state, PARAMS, **extra)
    return optax.apply_updates(PARAMS, updates)


def test_sgd_decays_as_l2_and_only_what_the_pattern_names():
    after = _after_one_step(optimizers.build("sgd", learning_rate=0.1, weight_decay=0.5, momentum=0.0))
    np.testing.assert_allclose(
        after["dense"]["kernel"], [2.0 - 0.1 * (0.3 + 0.5 * 2.0), -1.0 - 0.1 * (0.4 - 0.5)], rtol=1e-6
    )
    np.testing.assert_allclose(after["dense"]["bias"], [3.0])


def test_adamw_takes_a_sign_step_first_and_decays_beside_it():
    after = _after_one_step(optimizers.build("adamw", learning_rate=0.1, weight_decay=0.5))
    np.testing.assert_allclose(
        after["dense"]["kernel"], [2.0 - 0.1 - 0.1 * 0.5 * 2.0, -1.0 - 0.1 + 0.1 * 0.5], rtol=1e-5
    )


def test_clipping_bounds_the_global_norm():
    large = jax.tree.map(lambda leaf: 100.0 * leaf, GRADIENTS)
    after = _after_one_step(optimizers.build("sgd", learning_rate=1.0, momentum=0.0, clip=1.0), large)
    moved = jax.tree.map(lambda a, b: a - b, after, PARAMS)
    assert float(optax.global_norm(moved)) == pytest.approx(1.0, rel=1e-5)


def test_lamb_moves_by_the_trust_ratio():
    after = _after_one_step(optimizers.build("lamb", learning_rate=0.01))
    moved = np.asarray(after["dense"]["kernel"] - PARAMS["dense"]["kernel"])
    # The first Adam direction is the sign; LAMB gives it the norm of the parameter times the learning rate.
    assert np.linalg.norm(moved) == pytest.approx(0.01 * np.sqrt(5.0), rel=1e-4)


def test_sam_uses_the_gradient_at_the_worst_point():
    def gradient(params, _=None):
        return jax.grad(lambda tree: 0.5 * jnp.sum(tree["dense"]["kernel"] ** 4))(params)

    optimizer = optimizers.build("sam", learning_rate=0.1, momentum=0.0, rho=0.05)
    after = _after_one_step(optimizer, gradient(PARAMS), grad_fn=gradient)
    kernel = np.array([2.0, -1.0])
    climbed = kernel + 0.05 * (2 * kernel**3) / np.linalg.norm(2 * kernel**3)
    np.testing.assert_allclose(after["dense"]["kernel"], kernel - 0.1 * 2 * climbed**3, rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name):
    optimizer = optimizers.build(name, learning_rate=0.02)
    gradient = jax.grad(lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    params, state = PARAMS, optimizer.init(PARAMS)
    extra = {"grad_fn": lambda tree, _: gradient(tree)} if optimizers.takes_gradient_function(name) else {}
    for _ in range(20):
        updates, state = optimizer.update(gradient(params), state, params, **extra)
        params = optax.apply_updates(params, updates)
    assert optax.global_norm(params) < 0.95 * optax.global_norm(PARAMS)


def test_bad_input():
    with pytest.raises(errors.UserError, match="did you mean 'adamw'"):
        optimizers.build("adam", learning_rate=0.1)
    with pytest.raises(errors.UserError, match="unknown base optimizer 'sam'"):
        optimizers.build("sam", learning_rate=0.1, base="sam")
    with pytest.raises(errors.UserError, match="finds none of the 2 parameters"):
        optimizers.check_decay_pattern("weights$", PARAMS)
    with pytest.raises(errors.UserError, match="no regular expression"):
        optimizers.check_decay_pattern("(", PARAMS)
