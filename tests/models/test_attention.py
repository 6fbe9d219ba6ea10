"""Attention against its formula; neighbourhoods; gating draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import errors
from robust_vit.models import attention, gating


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _reference(query, key, value, bias=None, allowed=None):
    query, key, value = (each.astype(np.float64) for each in (query, key, value))
    logits = np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(query.shape[-1])
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ value, weights


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_the_formula(biased, masked):
    query, key, value = _draw(2, 3, 4, 8), _draw(2, 3, 5, 8, seed=1), _draw(2, 3, 5, 8, seed=2)
    bias = _draw(3, 4, 5, seed=3) if biased else None
    allowed = np.arange(5)[None, :] <= np.arange(4)[:, None] if masked else None
    out, weights = attention.attend(query, key, value, bias=bias, allowed=allowed)
    expected, expected_weights = _reference(query, key, value, bias, allowed)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-6)
    if masked:
        assert np.all(np.asarray(weights)[..., ~allowed] == 0.0)


def test_attend_keeps_bfloat16_and_is_stable_at_large_logits():
    query = jnp.asarray(100.0 * _draw(1, 1, 3, 8), jnp.bfloat16)
    out, weights = attention.attend(query, query, query)
    assert out.dtype == weights.dtype == jnp.bfloat16
    assert jnp.all(jnp.isfinite(out))
    np.testing.assert_allclose(jnp.sum(weights.astype(jnp.float32), -1), 1.0, atol=1e-2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_is_attend_with_tokens_before_heads(biased, masked):
    query, key, value = (jnp.asarray(_draw(2, 3, 4, 8, seed=seed)) for seed in range(3))
    bias = jnp.asarray(_draw(3, 4, 4, seed=3)) if biased else None
    allowed = jnp.asarray(np.tri(4, dtype=bool)) if masked else None

    def explicit(query, key, value):
        return attention.attend(query, key, value, bias=bias, allowed=allowed)

    def fused(query, key, value):
        parts = (each.swapaxes(1, 2) for each in (query, key, value))
        mixed, weights = attention.fused(*parts, bias=bias, allowed=allowed)
        return mixed.swapaxes(1, 2), weights

    def gradient(function):
        return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args)[0])), argnums=(0, 1, 2)))

    ours, theirs = (
        (function(query, key, value), gradient(function)(query, key, value)) for function in (explicit, fused)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), ours, theirs)


def test_weights_that_nobody_reads_are_not_computed_beside_the_fused_path():
    tokens = jnp.asarray(_draw(2, 16, 3, 8))

    def products(function):
        return jax.jit(function).lower(tokens).compile().as_text().count(" dot(")

    alone = products(lambda x: attention.fused(x, x, x)[0])
    assert products(lambda x: attention.fused(x, x, x)) > alone
    # Logits and values: two.
    assert alone == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": jnp.float32}, 'computes in bfloat16, not float32: set dtype="bfloat16", or attention="explicit"'),
        ({"depth": 12}, "multiple of 8 channels, 128 at most, not 12: change width or heads"),
        ({"depth": 256}, "not 256"),
        ({"shifted": True}, 'even number of tokens beside a bias or a mask, not 197: set head="gap"'),
    ],
)
def test_what_the_kernel_of_a_gpu_cannot_do_is_told(given, message):
    fits = {"dtype": jnp.bfloat16, "depth": 64, "tokens": 197, "shifted": False}
    attention.check_kernel(**fits)
    with pytest.raises(errors.UserError, match=message) as caught:
        attention.check_kernel(**{**fits, **given})
    assert "\n" not in str(caught.value)


def test_on_a_gpu_fused_asks_for_the_kernel(monkeypatch):
    asked = []

    def kernel(query, key, value, *, implementation, **_):
        asked.append(implementation)
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    half = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    attention.fused(half, half, half)
    assert asked == ["cudnn"]
    with pytest.raises(errors.UserError, match='set dtype="bfloat16"'):
        attention.fused(*3 * (jnp.ones((1, 4, 2, 8)),))


def test_second_derivatives_agree():
    query, key, value = (jnp.asarray(_draw(1, 2, 4, 3, seed=seed)) for seed in range(3))
    direction = jnp.asarray(_draw(1, 2, 4, 3, seed=9))

    def loss(query):
        return jnp.sum(jnp.sin(attention.attend(query, key, value)[0]))

    gradient = jax.jit(jax.grad(loss))
    forward = jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (direction,))[1])(query)
    reverse = jax.jit(jax.grad(lambda q: jnp.vdot(jax.grad(loss)(q), direction)))(query)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-6)
    step = 1e-2
    difference = (gradient(query + step * direction) - gradient(query - step * direction)) / (2 * step)
    # Central differences in float32: measured error 2e-4.
    np.testing.assert_allclose(forward, difference, atol=2e-3)


def test_neighbourhood_counts_what_a_padded_convolution_sees():
    mask = attention.neighbourhood((4, 5), window=3, class_token=False)
    assert mask.shape == (20, 20)
    np.testing.assert_array_equal(mask, mask.T)
    ones = jnp.ones((1, 4, 5, 1))
    seen = jax.lax.conv_general_dilated(
        ones, jnp.ones((3, 3, 1, 1)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_array_equal(mask.sum(axis=1), np.asarray(seen).reshape(-1))


def test_neighbourhood_with_a_class_token_and_its_extremes():
    mask = attention.neighbourhood((3, 3), window=1, class_token=True)
    expected = np.eye(10, dtype=bool)
    expected[0], expected[:, 0] = True, True
    np.testing.assert_array_equal(mask, expected)
    assert attention.neighbourhood((3, 3), window=5, class_token=True).all()
    assert not attention.neighbourhood((3, 3), window=3, class_token=True).all()


def test_stochastic_depth_rates_and_mean():
    batch, count, rate = 20_000, 4, 0.4
    gates = np.asarray(gating.stochastic_depth(jax.random.key(0), None, rate=rate, batch=batch, branches=count))
    rates = rate * np.arange(1, count + 1) / count
    error = np.sqrt(rates * (1 - rates) / batch)
    np.testing.assert_array_less(np.abs((gates == 0).mean(axis=0) - rates), 4 * error)
    for column, dropped in zip(gates.T, rates, strict=True):
        np.testing.assert_allclose(np.unique(column), [0.0, 1 / (1 - dropped)], rtol=1e-6)
    np.testing.assert_allclose(gates.mean(axis=0), 1.0, atol=0.03)
    # Rows are their own draws, and so are the branches of a row.
    assert len(np.unique(gates == 0, axis=0)) == 2**count


def test_stochastic_depth_multiplies_gates():
    given = jnp.asarray([[0.0, 2.0]])
    drawn = gating.stochastic_depth(jax.random.key(0), None, rate=0.5, batch=8, branches=2)
    both = gating.stochastic_depth(jax.random.key(0), given, rate=0.5, batch=8, branches=2)
    np.testing.assert_array_equal(both, drawn * given)


def test_gate_keeps_the_dtype_of_the_branch():
    branch = jnp.ones((2, 3, 4), jnp.bfloat16)
    gated = gating.apply(branch, jnp.asarray([0.5, 2.0]))
    assert gated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gated[:, 0, 0].astype(jnp.float32), [0.5, 2.0])
    assert gating.apply(branch, None) is branch
