"""Products against closed forms, dense matrices, finite differences and each other; what they cost; what they refuse."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, curvature, errors, losses, trees
from robust_vit.curvature import products


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"w": jnp.ones((4, 3), jnp.bfloat16)}}, "parameter w is bfloat16"),
        ({"params": {"w": jnp.ones((4, 3), jnp.int32)}}, "parameter w is int32"),
        ({"batch": {"x": jnp.ones((2, 4)), "t": jnp.zeros(3, jnp.int32)}}, "leading sizes"),
        ({"batch": {"x": jnp.ones((0, 4)), "t": jnp.zeros(0, jnp.int32)}}, "at least 1"),
        ({"batch": {"x": jnp.ones((2, 4)), "t": jnp.int32(0)}}, "leading sizes"),
        ({"microbatch": 0}, "from 1"),
        ({"params": {}}, "no parameters"),
        ({"subset": "v"}, "matches no parameter; paths look like w"),
        ({"subset": "("}, "no regular expression"),
        ({"mode": "forward"}, "forward over reverse"),
        ({"params": {"w": jnp.full((4, 5), jnp.nan)}}, "not finite"),
    ],
)
def test_mistakes_say_what_to_do(change, message):
    arguments = {
        "params": {"w": jnp.ones((4, 3))},
        "batch": {"x": jnp.ones((2, 4)), "t": jnp.zeros(2, jnp.int32)},
        **change,
    }
    with pytest.raises(errors.UserError, match=message):
        curvature.hessian(_softmax, arguments.pop("params"), arguments.pop("batch"), **arguments)


def _centred(params, batch):
    """A loss with statistics over the batch, as BatchNorm in training mode makes one."""
    return _softmax(params, {**batch, "x": batch["x"] - jnp.mean(batch["x"], axis=0, keepdims=True)})


def test_statistics_over_the_batch_are_refused_unless_they_are_meant():
    _, params, batch, _ = _closed_forms()["softmax regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    with pytest.raises(errors.UserError, match="evaluation mode.*separable=False"):
        curvature.hessian(_centred, params, batch)
    found = _matrix(curvature.hessian(_centred, params, batch, separable=False))
    with pytest.raises(errors.UserError, match="evaluation mode"):  # Again: only what passed is not tried again.
        curvature.hessian(_centred, params, batch)
    centred = {**batch, "x": batch["x"] - batch["x"].mean(axis=0, keepdims=True)}
    np.testing.assert_allclose(found, _matrix(curvature.hessian(_softmax, params, centred)), atol=1e-6)


_ASKED = []


def _counted(params, batch):
    _ASKED.append(batch["x"].shape)
    jax.debug.callback(lambda: _ASKED.append("run"))
    return _softmax(params, batch)


def test_a_loss_is_tried_once():
    _, params, batch, _ = _closed_forms()["softmax regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    for scale in (1.0, 2.0):
        curvature.hessian(_counted, trees.scale(scale, params), batch)
    jax.effects_barrier()
    assert _ASKED.count("run") == 4


def _vector_loss(params, batch):
    return losses.cross_entropy(batch["x"] @ params["w"], batch["t"])


@jax.custom_vjp
def _fused(x):
    return jnp.sum(jnp.tanh(x))


def _fused_backward(x, g):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (g * jax.pure_callback(lambda x: 1 - np.tanh(x) ** 2, shape, x, vmap_method="sequential"),)


_fused.defvjp(lambda x: (_fused(x), x), _fused_backward)


def _fused_loss(params, batch):
    return _fused(batch["x"] @ params["w"]) / batch["x"].shape[0]


def _plain_loss(params, batch):
    return jnp.sum(jnp.tanh(batch["x"] @ params["w"])) / batch["x"].shape[0]


def test_what_cannot_be_differentiated_twice_is_named_and_finite_differences_are_the_way_out():
    _, params, batch, _ = _closed_forms()["softmax regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    with pytest.raises(errors.UserError, match="scalar"):
        curvature.hessian(_vector_loss, params, batch)
    with pytest.raises(errors.UserError, match='attention="explicit".*finite difference'):
        curvature.hessian(_fused_loss, params, batch)
    found = _matrix(curvature.hessian(_fused_loss, params, batch, mode="finite difference"))
    exact = _matrix(curvature.hessian(_plain_loss, params, batch))
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-2


# Other ways to the same product.


def test_reverse_over_reverse_is_forward_over_reverse():
    with jax.enable_x64(True):
        params, batch = _network(jnp.float64)
        forward, reverse = (
            _matrix(curvature.hessian(_network_loss, params, batch, mode=mode)) for mode in products.MODES[:2]
        )
    np.testing.assert_allclose(reverse, forward, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.float64, 1e-8)])
def test_finite_differences_of_any_length_of_vector(dtype, tolerance):
    """Measured: 2e-4 and 4e-10."""
    with _precision(dtype):
        params, batch = _network(jnp.dtype(dtype))
        exact, numeric = (curvature.hessian(_network_loss, params, batch, mode=mode) for mode in products.MODES[::2])
        for length in (1e-3, 1.0, 1e3):
            vector = trees.scale(length, trees.normal_like(jax.random.key(0), params))
            difference = trees.norm(trees.add(exact(vector), numeric(vector), -1.0))
            assert float(difference / trees.norm(exact(vector))) < tolerance
        assert float(trees.norm(numeric(trees.zeros_like(params)))) == 0.0


@pytest.mark.parametrize("microbatch", [None, 4])
def test_a_block_is_its_vectors(microbatch):
    params, batch = _network()
    operator = curvature.hessian(_network_loss, params, batch, microbatch=microbatch)
    vectors = [trees.normal_like(jax.random.key(seed), params) for seed in range(3)]
    block = jax.vmap(operator)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors))
    for index, vector in enumerate(vectors):
        alone = operator(vector)
        difference = trees.norm(trees.add(alone, jax.tree.map(lambda leaf, i=index: leaf[i], block), -1.0))
        assert float(difference / trees.norm(alone)) < 1e-6  # Measured: 2e-7.


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_a_linearised_operator_is_the_operator(name):
    params, batch = _network()
    operator = curvature.build(name, {"hessian": _network_loss, "gauss_newton": _network_logits}[name], params, batch)
    np.testing.assert_allclose(_matrix(curvature.linearise(operator)), _matrix(operator), atol=1e-6)


def test_what_cannot_be_linearised_says_so():
    params, batch = _network()
    with pytest.raises(errors.UserError, match="microbatches"):
        curvature.linearise(curvature.hessian(_network_loss, params, batch, microbatch=4))
    with pytest.raises(errors.UserError, match="another mode"):
        curvature.linearise(curvature.hessian(_network_loss, params, batch, mode="finite difference"))


# A subset of the parameters.


def test_a_subset_is_a_block_of_the_whole():
    params, batch = _network()
    whole = _matrix(curvature.hessian(_network_loss, params, batch))
    blocks = {pattern: curvature.hessian(_network_loss, params, batch, subset=pattern) for pattern in ("^in/", "out$")}
    assert blocks["^in/"].like["out"] is None
    assert blocks["out$"].like["in"] == {"bias": None, "kernel": None}
    split = trees.count(params["in"])
    np.testing.assert_allclose(_matrix(blocks["^in/"]), whole[:split, :split], atol=1e-6)
    np.testing.assert_allclose(_matrix(blocks["out$"]), whole[split:, split:], atol=1e-6)


def test_a_subset_may_leave_out_what_has_no_derivative():
    params, batch = _network()
    counted = {**params, "steps": jnp.int32(3)}
    with pytest.raises(errors.UserError, match="steps is int32.*subset"):
        curvature.hessian(_network_loss, counted, batch)
    found = curvature.hessian(_network_loss, counted, batch, subset="in|out")
    np.testing.assert_allclose(_matrix(found), _matrix(curvature.hessian(_network_loss, params, batch)), atol=1e-7)


# Gauss-Newton and Fisher.


def _network_logits(params, batch):
    return jnp.tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None]) @ params["out"]


def _network_cross_entropy(logits, batch):
    return jnp.mean(losses.cross_entropy(logits, batch["y"]))


def _network_squares(logits, batch):
    return jnp.mean(jnp.sum((logits - jax.nn.one_hot(batch["y"], 3)) ** 2, axis=-1))


def _jacobian(params, batch) -> np.ndarray:
    """`[examples, classes, parameters]` of the logits, dense."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jacrev(lambda flat: _network_logits(unravel(flat), batch))(flat))


@pytest.mark.parametrize("microbatch", [None, 4])
def test_gauss_newton_is_the_dense_one(microbatch):
    with jax.enable_x64(True):
        params, batch = _network(jnp.float64)
        jacobian, p = _jacobian(params, batch), np.asarray(jax.nn.softmax(_network_logits(params, batch)))
        options = {"microbatch": microbatch, "weight_decay": 0.5}
        analytic = _matrix(curvature.gauss_newton(_network_logits, params, batch, **options))
        general, squares = (
            _matrix(curvature.gauss_newton(_network_logits, params, batch, loss=loss, **options))
            for loss in (_network_cross_entropy, _network_squares)
        )
    inner = [np.diag(row) - np.outer(row, row) for row in p]
    shift = 0.5 * np.eye(jacobian.shape[-1])
    expected = np.mean([j.T @ h @ j for j, h in zip(jacobian, inner, strict=True)], axis=0) + shift
    np.testing.assert_allclose(analytic, expected, atol=1e-13)
    np.testing.assert_allclose(general, expected, atol=1e-13)
    np.testing.assert_allclose(squares, np.mean([2 * j.T @ j for j in jacobian], axis=0) + shift, atol=1e-13)
    assert np.linalg.eigvalsh(analytic)[0] > 0.5 - 1e-12


def test_gauss_newton_of_a_linear_model_is_its_hessian():
    _, params, batch, expected = _closed_forms()["softmax regression"]
    found = curvature.gauss_newton(_linear_logits, _cast(params, np.float32), _cast(batch, np.float32))
    np.testing.assert_allclose(_matrix(found), expected, atol=2e-6 * np.abs(expected).max())


def _linear_logits(params, batch):
    return batch["x"] @ params["w"]


@pytest.mark.parametrize("microbatch", [None, 4])
def test_the_empirical_fisher_is_the_mean_of_outer_products(microbatch):
    with jax.enable_x64(True):
        params, batch = _network(jnp.float64)
        p = np.asarray(jax.nn.softmax(_network_logits(params, batch)))
        scores = np.einsum("nc,ncp->np", np.eye(3)[np.asarray(batch["y"])] - p, _jacobian(params, batch))
        found = curvature.fisher(
            _network_logits, params, batch, kind="empirical", labels=batch["y"], microbatch=microbatch
        )
        np.testing.assert_allclose(_matrix(found), scores.T @ scores / len(scores), atol=1e-13)


def test_the_true_fisher_is_the_mean_over_labels_that_the_model_draws():
    with jax.enable_x64(True):
        params, batch = _network(jnp.float64, count=1)
        p = np.asarray(jax.nn.softmax(_network_logits(params, batch)))[0]
        each = [
            _matrix(curvature.fisher(_network_logits, params, batch, kind="empirical", labels=jnp.array([label])))
            for label in range(3)
        ]
        true = _matrix(curvature.fisher(_network_logits, params, batch))
    np.testing.assert_allclose(true, sum(share * one for share, one in zip(p, each, strict=True)), atol=1e-14)


def test_sampled_labels_are_drawn_as_the_model_says_and_stay():
    params, batch = _network(count=2000)
    operator = curvature.fisher(_network_logits, params, batch, kind="sampled", key=jax.random.key(0))
    _, labels = operator.batch
    expected = np.asarray(jax.nn.softmax(_network_logits(params, batch))).mean(axis=0)
    np.testing.assert_allclose(np.bincount(labels, minlength=3) / 2000, expected, atol=0.04)  # Four standard errors.
    again = curvature.fisher(_network_logits, params, batch, kind="empirical", labels=labels)
    vector = trees.normal_like(jax.random.key(1), params)
    jax.tree.map(np.testing.assert_array_equal, operator(vector), again(vector))
    assert float(curvature.indeterminism(operator, jax.random.key(2))) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "exact"}, "true"),
        ({"kind": "empirical"}, "needs `labels`"),
        ({"kind": "sampled"}, "needs `key`"),
        ({"labels": jnp.zeros(11, jnp.int32)}, "takes no `labels`"),
    ],
)
def test_a_fisher_says_what_it_needs(options, message):
    params, batch = _network()
    with pytest.raises(errors.UserError, match=message):
        curvature.fisher(_network_logits, params, batch, **options)


# In the input.


def _input_losses(inputs, labels, kernel):
    return losses.cross_entropy(inputs @ kernel, labels)


def test_the_input_hessian_of_a_linear_model_mixes_no_examples():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        inputs, kernel, labels = rng.normal(size=(4, 5)), rng.normal(size=(5, 3)), np.arange(4) % 3
        operator = curvature.input_hessian(_input_losses, jnp.asarray(inputs), jnp.asarray(labels), jnp.asarray(kernel))
        found = _matrix(operator).reshape(4, 5, 4, 5)
    p = np.exp(inputs @ kernel) / np.exp(inputs @ kernel).sum(axis=1, keepdims=True)
    for one in range(4):
        for other in range(4):
            inner = (np.diag(p[one]) - np.outer(p[one], p[one])) if one == other else np.zeros((3, 3))
            np.testing.assert_allclose(found[one, :, other], kernel @ inner @ kernel.T, atol=1e-13)


def _linear_map(point, kernel):
    return point @ kernel


def test_the_jacobian_of_a_linear_map_and_its_singular_values():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 3)).astype(np.float32)
    jacobian = curvature.jacobian(_linear_map, jnp.zeros(5), jnp.asarray(kernel))
    vector, dual = rng.normal(size=5).astype(np.float32), rng.normal(size=3).astype(np.float32)
    np.testing.assert_allclose(jacobian(jnp.asarray(vector)), vector @ kernel, rtol=1e-5)
    np.testing.assert_allclose(jacobian.transposed(jnp.asarray(dual)), kernel @ dual, rtol=1e-5)
    found = curvature.lanczos(jacobian.gram(), jax.random.key(0), rank=5, top=3, which="largest")
    np.testing.assert_allclose(np.sqrt(found.values), np.linalg.svd(kernel)[1], rtol=1e-5)


# A data set.


def _parts(batch, *sizes):
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda leaf, e=end, n=size: leaf[e - n : e], batch) for end, size in zip(ends, sizes, strict=True)
    ]


def test_a_stream_weighs_every_example_the_same():
    params, batch = _network()
    build = functools.partial(curvature.hessian, _network_loss, params)
    streamed = curvature.stream(build, _parts(batch, 4, 4, 3), weight_decay=0.25)
    vectors = [trees.normal_like(jax.random.key(seed), params) for seed in range(2)]
    block = streamed.block(jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors))
    for index, vector in enumerate(vectors):
        expected = curvature.hessian(_network_loss, params, batch, weight_decay=0.25)(vector)
        for found in (streamed(vector), jax.tree.map(lambda leaf, i=index: leaf[i], block)):
            assert float(trees.norm(trees.add(found, expected, -1.0)) / trees.norm(expected)) < 1e-6  # Measured: 2e-7.


def test_a_stream_has_to_be_read_more_than_once():
    params, batch = _network()
    build = functools.partial(curvature.hessian, _network_loss, params)
    with pytest.raises(errors.UserError, match="only once"):
        curvature.stream(build, iter([batch]))
    with pytest.raises(errors.UserError, match="empty"):
        curvature.stream(build, [])


# What a product costs, in matrix products of one gradient, by XLA's count.

LAYERS, WIDTH = 6, 64


def _deep(params, batch):
    for kernel in params:
        batch = jnp.tanh(batch @ kernel)
    return batch


def _deep_loss(params, batch):
    return jnp.mean(_deep(params, batch) ** 2)


def _flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_products_cost_what_their_passes_cost():
    """L layers whose input is no parameter: a gradient is 3L - 1 products, a Hessian product 8L - 5, 6L - 4 linearised."""
    params = [jnp.full((WIDTH, WIDTH), 0.1)] * LAYERS
    batch = jnp.ones((256, WIDTH))
    gradient = _flops(jax.grad(_deep_loss), params, batch)
    unit = gradient / (3 * LAYERS - 1)
    hessian = curvature.hessian(_deep_loss, params, batch)
    newton = curvature.gauss_newton(_deep, params, batch, loss=_mean_square)
    block = jax.tree.map(lambda leaf: jnp.ones((4, *leaf.shape)), params)
    found = {
        "hessian": _flops(lambda o, v: o(v), hessian, params) / unit,
        "linearised": _flops(lambda o, v: o(v), curvature.linearise(hessian), params) / unit,
        "block of 4": _flops(lambda o, v: jax.vmap(o)(v), hessian, block) / unit,
        "gauss-newton": _flops(lambda o, v: o(v), newton, params) / unit,
        "gauss-newton linearised": _flops(lambda o, v: o(v), curvature.linearise(newton), params) / unit,
    }
    expected = {
        "hessian": 8 * LAYERS - 5,
        "linearised": 6 * LAYERS - 4,
        "block of 4": 2 * LAYERS - 1 + 4 * (6 * LAYERS - 4),
        "gauss-newton": 5 * LAYERS - 2,
        "gauss-newton linearised": 4 * LAYERS - 2,
    }
    for name, count in expected.items():
        np.testing.assert_allclose(found[name], count, rtol=0.06, err_msg=name)


def _mean_square(outputs, batch):
    del batch
    return jnp.mean(outputs**2)


def test_operators_are_found_by_name():
    assert set(curvature.OPERATORS) == {"hessian", "gauss_newton", "fisher", "input_hessian"}
    params, batch = _network()
    vector = trees.normal_like(jax.random.key(0), params)
    named = curvature.build("hessian", _network_loss, params, batch, weight_decay=0.1)(vector)
    direct = curvature.hessian(_network_loss, params, batch, weight_decay=0.1)(vector)
    jax.tree.map(np.testing.assert_array_equal, named, direct)
    with pytest.raises(errors.UserError, match="hessian"):
        curvature.build("hesian")
