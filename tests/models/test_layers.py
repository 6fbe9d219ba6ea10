"""The layers whose derivatives are written by hand: values against closed forms, every derivative against JAX's own."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from robust_vit.models import layers


def _draw(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _plain_standardized(x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + 1e-6)


def _plain_softmax(x):
    weights = jnp.exp(x)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _plain_gelu(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x / np.sqrt(2.0)))


# Ours, the same without a rule, and float64 numpy.
TABLE = {
    "standardized": (
        lambda x: layers.standardized(x)[0],
        _plain_standardized,
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6),
    ),
    "factor": (
        lambda x: layers.standardized(x)[1],
        lambda x: 1.0 / jnp.sqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-6),
        lambda x: 1.0 / np.sqrt(x.var(-1, keepdims=True) + 1e-6),
    ),
    "softmax": (layers.softmax, _plain_softmax, lambda x: scipy.special.softmax(x, axis=-1)),
    "gelu": (layers.gelu, _plain_gelu, lambda x: x * scipy.special.ndtr(x)),
}


@pytest.mark.parametrize("name", TABLE)
def test_values_are_the_closed_form(name):
    ours, _, exact = TABLE[name]
    x = _draw(3, 5, 7, scale=2.0)
    # Measured: 2e-7.
    np.testing.assert_allclose(ours(x), exact(np.asarray(x, np.float64)), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_every_derivative_is_that_of_the_plain_formula(name):
    functions = TABLE[name][:2]
    x, vector, mixing = _draw(3, 7), _draw(3, 7, seed=1), _draw(3, 7, seed=2)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(function, x):
        def loss(x):
            return jnp.sum(jnp.sin(mixing * function(x)))

        gradient = jax.grad(loss)
        forward = jax.jvp(gradient, (x,), (vector,))[1]
        reverse = jax.grad(lambda x: jnp.vdot(gradient(x), vector))(x)
        third = jax.grad(lambda x: jnp.vdot(jax.jvp(gradient, (x,), (vector,))[1], vector))(x)
        return jax.jvp(function, (x,), (vector,)), gradient(x), forward, reverse, third

    ours, plain = (derivatives(function, x) for function in functions)
    # Measured: 3e-6 of the largest.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * float(jnp.abs(b).max())), ours, plain
    )
    forward, reverse = ours[2:4]
    np.testing.assert_allclose(forward, reverse, rtol=0, atol=3e-5 * float(jnp.abs(forward).max()))


@pytest.mark.parametrize("name", TABLE)
def test_rules_hold_under_vmap(name):
    function = TABLE[name][0]
    x = _draw(4, 3, 7)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))
    np.testing.assert_allclose(jax.vmap(gradient)(x), gradient(x), rtol=1e-5, atol=1e-6)


def test_extreme_inputs_stay_finite():
    x = jnp.asarray([-1e30, -50.0, -6.0, 0.0, 6.0, 50.0, 1e30])
    np.testing.assert_allclose(
        layers.gelu(x), [0.0, 0.0, -6 * scipy.special.ndtr(-6.0), 0.0, 6.0, 50.0, 1e30], atol=1e-6
    )
    slope = jax.vmap(jax.grad(layers.gelu))(x[1:-1])
    np.testing.assert_allclose(slope, [0.0, 0.0, 0.5, 1.0, 1.0], atol=1e-6)
    weights = layers.softmax(jnp.asarray([[1e30, 0.0, -1e30]]))
    np.testing.assert_array_equal(weights, [[1.0, 0.0, 0.0]])
    # A token of equal numbers has no variance: it becomes zeros, and its gradient is finite.
    constant = jnp.full((1, 4), 3.0)
    np.testing.assert_array_equal(layers.standardized(constant)[0], jnp.zeros((1, 4)))
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(layers.standardized(x)[0])))(constant)))


def test_a_large_mean_costs_no_variance():
    x = _draw(2, 64) + 1e3
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    # Measured: 6e-5, the rounding of the mean itself. The mean of squares less the squared mean is off by 2e-2.
    np.testing.assert_allclose(layers.standardized(x)[0], exact, atol=3e-4)


def test_bfloat16_is_computed_in_float32():
    x = _draw(64, 32, scale=2.0).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    for ours in (layers.gelu(x), jax.jvp(layers.gelu, (x,), (jnp.ones_like(x),))[1]):
        assert ours.dtype == jnp.bfloat16
    # One rounding: half a unit in the last of 8 bits.
    np.testing.assert_allclose(
        np.asarray(layers.gelu(x), np.float64), exact * scipy.special.ndtr(exact), rtol=2**-8, atol=1e-6
    )
    norm = layers.LayerNorm("bfloat16")
    assert norm.apply({"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}, x).dtype == jnp.bfloat16


def test_layer_norm_is_flax_layer_norm():
    x = _draw(2, 3, 16)
    params = {"scale": _draw(16, seed=1), "bias": _draw(16, seed=2)}
    ours = layers.LayerNorm("float32").apply({"params": params}, x)
    np.testing.assert_allclose(ours, nn.LayerNorm(epsilon=1e-6).apply({"params": params}, x), rtol=1e-4, atol=1e-5)


def test_dense_is_flax_dense_and_its_gradient_copies_nothing():
    x = _draw(8, 16, 24)
    dense = layers.Dense(32)
    variables = dense.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"kernel": (24, 32), "bias": (32,)}}
    np.testing.assert_allclose(dense.apply(variables, x), nn.Dense(32).apply(variables, x), rtol=1e-6)

    def gradient(variables, x):
        return jax.grad(lambda variables: jnp.sum(jnp.sin(dense.apply(variables, x))))(variables)

    compiled = jax.jit(gradient).lower(variables, x).compile().as_text()
    # With two axes to sum over, XLA on CPU transposes the tokens: f32[32,128].
    assert "f32[32,128]" not in compiled
