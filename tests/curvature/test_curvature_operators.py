"""The Hessian operator against closed forms, finite differences and a dense Hessian."""

from __future__ import annotations

import contextlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, curvature, errors, losses, trees
from robust_vit.curvature import operators


def _network_loss(params, batch):
    logits = jnp.tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None]) @ params["out"]
    return jnp.mean(losses.cross_entropy(logits, batch["y"]))


def _network(dtype=jnp.float32, count: int = 11):
    rng = np.random.default_rng(0)
    params = {"in": {"kernel": rng.normal(size=(5, 6)), "bias": rng.normal(size=6)}, "out": rng.normal(size=(6, 3))}
    batch = {"x": jnp.asarray(rng.normal(size=(count, 5)), dtype), "y": jnp.arange(count) % 3}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), params), batch


def _squares(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["t"]) ** 2)


def _softmax(params, batch):
    return jnp.mean(losses.cross_entropy(batch["x"] @ params["w"], batch["t"]))


def _deep_scalar(params, batch):
    return jnp.mean((params["a"] * params["b"] * batch["x"] - batch["t"]) ** 2)


def _matrix(operator) -> np.ndarray:
    """Every column of the operator, by unit vectors."""
    flat, unravel = jax.flatten_util.ravel_pytree(operator.like)
    columns = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(operator(unravel(v)))[0])(
        jnp.eye(flat.size, dtype=flat.dtype)
    )
    return np.asarray(columns, np.float64).T


def _closed_forms():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 4))
    w = rng.normal(size=(4, 3))
    p = np.exp(x @ w) / np.exp(x @ w).sum(axis=1, keepdims=True)
    softmax = np.mean(
        [np.kron(np.outer(xi, xi), np.diag(pi) - np.outer(pi, pi)) for xi, pi in zip(x, p, strict=True)], axis=0
    )
    a, b, s, t = 0.7, -1.3, rng.normal(size=9), rng.normal(size=9)
    cross = np.mean(2 * s * (2 * a * b * s - t))
    deep = np.array([[2 * b**2 * np.mean(s**2), cross], [cross, 2 * a**2 * np.mean(s**2)]])
    labels = np.arange(7) % 3
    return {
        "linear regression": (_squares, {"w": w[:, 0]}, {"x": x, "t": x[:, 0]}, 2 / 7 * x.T @ x),
        "softmax regression": (_softmax, {"w": w}, {"x": x, "t": labels}, softmax),
        "two scalar layers": (_deep_scalar, {"a": np.float64(a), "b": np.float64(b)}, {"x": s, "t": t}, deep),
    }


def _cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype if np.asarray(a).dtype.kind == "f" else jnp.int32), tree)


def _precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-14)])
@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("name", _closed_forms())
def test_closed_forms(name, microbatch, dtype, tolerance):
    loss, params, batch, expected = _closed_forms()[name]
    with _precision(dtype):
        operator = curvature.hessian(loss, _cast(params, dtype), _cast(batch, dtype), microbatch=microbatch)
        found = _matrix(operator)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(operator(operator.like)))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    if name == "two scalar layers":
        assert np.linalg.eigvalsh(found)[0] < 0  # Indefinite: the sign is right.


def test_uniform_probabilities_have_one_eigenvalue_of_known_multiplicity():
    """One sample at p = 1/C: |x|^2 / C, C - 1 times, and zero for the rest."""
    x = np.array([[1.0, 2.0, -2.0]], np.float32)
    operator = curvature.hessian(
        _softmax, {"w": jnp.zeros((3, 5))}, {"x": jnp.asarray(x), "t": jnp.zeros(1, jnp.int32)}
    )
    values = np.linalg.eigvalsh(_matrix(operator))
    np.testing.assert_allclose(values, [0.0] * 11 + [9 / 5] * 4, atol=1e-6)


@pytest.mark.parametrize("microbatch", [1, 4, 10, 50])
def test_microbatches_are_weighted_by_their_size(microbatch):
    """11 examples in pieces of any size: the same Hessian. Equal weights for a ragged rest would be off by 10 %."""
    params, batch = _network()
    whole = curvature.hessian(_network_loss, params, batch)
    split = curvature.hessian(_network_loss, params, batch, microbatch=microbatch)
    vector = trees.normal_like(jax.random.key(0), params)
    whole, split = (jax.flatten_util.ravel_pytree(operator(vector))[0] for operator in (whole, split))
    assert np.linalg.norm(whole - split) / np.linalg.norm(whole) < 1e-6  # Measured: 2e-7.


def test_finite_differences_in_float64():
    with jax.enable_x64(True):
        params, batch = _network(jnp.float64)
        vector = trees.normal_like(jax.random.key(0), params)
        product = curvature.hessian(_network_loss, params, batch)(vector)
        ahead, behind = (jax.grad(_network_loss)(trees.add(params, vector, step), batch) for step in (1e-5, -1e-5))
        numeric = trees.scale(1 / 2e-5, trees.add(ahead, behind, -1.0))
        assert float(trees.norm(trees.add(product, numeric, -1.0)) / trees.norm(product)) < 1e-8


def test_the_precision_of_float32():
    params, batch = _network()
    vector = trees.normal_like(jax.random.key(0), params)
    product = curvature.hessian(_network_loss, params, batch)(vector)
    with jax.enable_x64(True):
        wide = _cast(params, np.float64), _cast(batch, np.float64), _cast(vector, np.float64)
        exact = curvature.hessian(_network_loss, *wide[:2])(wide[2])
        error = trees.norm(trees.add(exact, _cast(product, np.float64), -1.0)) / trees.norm(exact)
        assert float(error) < 2e-6  # Measured: 3e-7.


def test_weight_decay_is_a_shift():
    params, batch = _network()
    plain, decayed = (_matrix(curvature.hessian(_network_loss, params, batch, weight_decay=w)) for w in (0.0, 0.25))
    np.testing.assert_allclose(decayed - plain, 0.25 * np.eye(len(plain)), atol=1e-7)


def _classifier_loss(params, batch, model, scale):
    return scale * jnp.mean(losses.cross_entropy(model.with_params(params)(batch["image"]), batch["label"]))


def _apply(variables, images):
    return images.reshape(images.shape[0], -1) @ variables["w"]


def test_the_context_reaches_the_loss():
    images = jax.random.uniform(jax.random.key(0), (6, 2, 2, 1))
    model = classifier.wrap(_apply, {"w": jax.random.normal(jax.random.key(1), (4, 3))})
    batch = {"image": images, "label": jnp.arange(6) % 3}
    once, twice = (
        _matrix(curvature.hessian(_classifier_loss, model.params, batch, model, jnp.float32(s), microbatch=4))
        for s in (1, 2)
    )
    expected = {"x": images.reshape(6, 4), "t": batch["label"]}
    np.testing.assert_allclose(once, _matrix(curvature.hessian(_softmax, model.params, expected)), atol=1e-6)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def _flips(params, batch):
    """A `custom_vjp` whose backward pass is wrong: its Hessian is not symmetric."""

    @jax.custom_vjp
    def tilt(w):
        return jnp.sum(w**3)

    tilt.defvjp(lambda w: (tilt(w), w), lambda w, g: (g * jnp.roll(w, 1) ** 2,))
    return tilt(params["w"]) * jnp.mean(batch["x"])


def test_asymmetry_tells_a_hessian_from_a_mistake():
    params, batch = _network()
    assert float(curvature.asymmetry(curvature.hessian(_network_loss, params, batch), jax.random.key(0))) < 1e-6
    wrong = curvature.hessian(_flips, {"w": jnp.arange(1.0, 6.0)}, {"x": jnp.ones(3)})
    assert float(curvature.asymmetry(wrong, jax.random.key(0))) > 1e-2
    assert float(curvature.asymmetry(operators.Symmetric(jnp.zeros((3, 3))), jax.random.key(0))) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"w": jnp.ones((4, 3), jnp.bfloat16)}}, "parameter w is bfloat16"),
        ({"params": {"w": jnp.ones((4, 3), jnp.int32)}}, "parameter w is int32"),
        ({"batch": {"x": jnp.ones((2, 4)), "t": jnp.zeros(3, jnp.int32)}}, "leading sizes"),
        ({"batch": {"x": jnp.ones((0, 4)), "t": jnp.zeros(0, jnp.int32)}}, "at least 1"),
        ({"batch": {"x": jnp.ones((2, 4)), "t": jnp.int32(0)}}, "leading sizes"),
        ({"microbatch": 0}, "from 1"),
    ],
)
def test_mistakes_say_what_to_do(change, message):
    arguments = {
        "params": {"w": jnp.ones((4, 3))},
        "batch": {"x": jnp.ones((2, 4)), "t": jnp.zeros(2, jnp.int32)},
        "microbatch": None,
        **change,
    }
    with pytest.raises(errors.UserError, match=message):
        curvature.hessian(_softmax, arguments["params"], arguments["batch"], microbatch=arguments["microbatch"])


def test_operators_are_found_by_name():
    assert set(curvature.OPERATORS) == {"hessian"}
    params, batch = _network()
    vector = trees.normal_like(jax.random.key(0), params)
    named = curvature.build("hessian", _network_loss, params, batch, weight_decay=0.1)(vector)
    direct = curvature.hessian(_network_loss, params, batch, weight_decay=0.1)(vector)
    jax.tree.map(np.testing.assert_array_equal, named, direct)
    with pytest.raises(errors.UserError, match="hessian"):
        curvature.build("hesian")
