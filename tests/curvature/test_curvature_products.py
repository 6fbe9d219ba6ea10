"""Products against closed forms, dense matrices, finite differences and each other; what they cost; what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from robust_vit import classifier, curvature, data, errors, losses, trees
from robust_vit.curvature import products
from robust_vit.data import streams


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


def _logistic(params, batch):
    scores = batch["x"] @ params["w"]
    return jnp.mean(jax.nn.softplus(scores) - batch["t"] * scores)


def _rosenbrock(params, batch):
    return jnp.mean(batch["x"]) * ((1 - params["a"]) ** 2 + 100 * (params["b"] - params["a"] ** 2) ** 2)


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
    s1 = 1 / (1 + np.exp(-x @ w[:, 0]))
    bent = np.array([[2 - 400 * (b - 3 * a**2), -400 * a], [-400 * a, 200.0]])
    return {
        "linear regression": (_squares, {"w": w[:, 0]}, {"x": x, "t": x[:, 0]}, 2 / 7 * x.T @ x),
        "logistic regression": (_logistic, {"w": w[:, 0]}, {"x": x, "t": labels % 2.0}, x.T * (s1 * (1 - s1)) @ x / 7),
        "Rosenbrock": (_rosenbrock, {"a": np.float64(a), "b": np.float64(b)}, {"x": s**2}, np.mean(s**2) * bent),
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


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_one_sample_has_the_eigenvalues_of_its_probabilities_times_its_square(scale):
    """`eig(diag(p) - pp') |x|^2`, and zero for the rest; at p = 1/C that is `|x|^2 / C`, C - 1 times."""
    rng = np.random.default_rng(0)
    x, w = np.array([1.0, 2.0, -2.0]), scale * rng.normal(size=(3, 5))
    batch = {"x": jnp.asarray(x[None], jnp.float32), "t": jnp.zeros(1, jnp.int32)}
    values = np.linalg.eigvalsh(_matrix(curvature.hessian(_softmax, {"w": jnp.asarray(w, jnp.float32)}, batch)))
    p = np.exp(x @ w) / np.exp(x @ w).sum()
    expected = 9 * np.linalg.eigvalsh(np.diag(p) - np.outer(p, p))[1:]
    np.testing.assert_allclose(values, [0.0] * 11 + list(expected), atol=2e-6)  # Measured: 7e-7.
    assert np.ptp(p) == 0.0 if scale == 0.0 else np.ptp(p) > 0.2


def test_the_gauss_newton_matrix_of_logistic_regression_is_its_hessian():
    _, params, batch, expected = _closed_forms()["logistic regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    found = curvature.gauss_newton(_linear_logits, params, batch, loss=_logistic_of_scores)
    np.testing.assert_allclose(_matrix(found), expected, atol=2e-6 * np.abs(expected).max())


def _logistic_of_scores(scores, batch):
    return jnp.mean(jax.nn.softplus(scores) - batch["t"] * scores)


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


def _summed(params, batch):
    return len(batch["t"]) * _softmax(params, batch)


def test_a_sum_over_examples_is_refused_where_microbatches_would_be_averaged():
    _, params, batch, _ = _closed_forms()["softmax regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    mean = _matrix(curvature.hessian(_softmax, params, batch, microbatch=3))
    for microbatch in (None, len(batch["t"])):
        total = _matrix(curvature.hessian(_summed, params, batch, microbatch=microbatch))
        np.testing.assert_allclose(total, len(batch["t"]) * mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        errors.UserError, match="not finite"
    ):  # And what was tried on numbers like these has not passed.
        curvature.hessian(_summed, jax.tree.map(lambda leaf: leaf * np.nan, params), batch, microbatch=3)
    with pytest.raises(
        errors.UserError, match="no mean over examples.*over 7 times.*over 3 times.*Divide.*separable=False"
    ):
        curvature.hessian(_summed, params, batch, microbatch=3)
    curvature.hessian(_summed, params, batch, microbatch=3, separable=False)


def _dropped(params, batch, *_):
    """Dropout with one key: a mask for each place in the batch."""
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, batch["x"].shape)
    return _softmax(params, {**batch, "x": jnp.where(kept, 2 * batch["x"], 0.0)})


def _dropped_by_own_keys(params, batch):
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(batch["key"])
    return _softmax(params, {**batch, "x": jnp.where(kept, 2 * batch["x"], 0.0)})


def test_dropout_is_frozen_by_a_key_for_each_example_and_not_by_one_for_all():
    _, params, batch, _ = _closed_forms()["softmax regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    with pytest.raises(errors.UserError, match="places of the examples.*evaluation mode.*separable=False"):
        curvature.hessian(_dropped, params, batch)
    keyed = {**batch, "key": jax.random.split(jax.random.key(0), 7)}
    whole, split = (_matrix(curvature.hessian(_dropped_by_own_keys, params, keyed, microbatch=m)) for m in (None, 2))
    np.testing.assert_allclose(split, whole, atol=1e-6)


def _centred_logits(params, batch):
    return (batch["x"] - jnp.mean(batch["x"], axis=0, keepdims=True)) @ params["w"]


def _dropped_logits(params, batch):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, batch["x"].shape), batch["x"], 0.0) @ params["w"]


def _centred_squares(outputs, batch):
    return jnp.mean((outputs - jnp.mean(outputs, axis=0, keepdims=True)) ** 2) + 0.0 * batch["t"][0]


@pytest.mark.parametrize("outputs", [_centred_logits, _dropped_logits])
def test_outputs_that_depend_on_their_company_or_place_are_refused_unless_they_are_meant(outputs):
    _, params, batch, _ = _closed_forms()["softmax regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    for build, options in (
        (curvature.gauss_newton, {}),
        (curvature.fisher, {}),
        (curvature.fisher, {"kind": "empirical", "labels": batch["t"]}),
        (curvature.fisher, {"kind": "sampled", "key": jax.random.key(0)}),
    ):
        with pytest.raises(errors.UserError, match="output of an example depends on the other.*separable=False"):
            build(outputs, params, batch, **options)
        build(outputs, params, batch, **options, separable=False)
    with pytest.raises(errors.UserError, match="no mean over examples"):
        curvature.gauss_newton(_linear_logits, params, batch, loss=_centred_squares)


def _centred_input_losses(inputs, labels, kernel):
    return _input_losses(inputs - jnp.mean(inputs, axis=0, keepdims=True), labels, kernel)


def test_an_input_hessian_that_would_mix_examples_is_refused_unless_it_is_meant():
    rng = np.random.default_rng(0)
    arguments = (rng.normal(size=(5, 4)), np.arange(5) % 3, rng.normal(size=(4, 3)))
    arguments = [jnp.asarray(one, jnp.float32 if one.dtype.kind == "f" else jnp.int32) for one in arguments]
    with pytest.raises(errors.UserError, match="loss of an example depends on the other.*separable=False"):
        curvature.input_hessian(_centred_input_losses, *arguments)
    curvature.input_hessian(_centred_input_losses, *arguments, separable=False)
    with pytest.raises(errors.UserError, match=r"shape \(\) for 5 examples: expected one number for each"):
        curvature.input_hessian(_input_total, *arguments)


def _input_total(inputs, labels, kernel):
    return _input_losses(inputs, labels, kernel).sum()


def test_logits_have_classes():
    _, params, batch, _ = _closed_forms()["softmax regression"]
    params, batch = _cast(params, np.float32), _cast(batch, np.float32)
    params = {"w": params["w"][:, 0]}
    for build, options in (
        (curvature.gauss_newton, {}),
        (curvature.fisher, {"kind": "empirical", "labels": batch["t"]}),
    ):
        with pytest.raises(errors.UserError, match=r"expected logits \[examples, classes\]"):
            build(_linear_logits, params, batch, **options)


class _Training(nn.Module):
    """A network in training mode: dropout without a key, or BatchNorm whose statistics may not change."""

    kind: str

    @nn.compact
    def __call__(self, inputs):
        if self.kind == "dropout":
            inputs = nn.Dropout(0.5, deterministic=False)(inputs)
        else:
            inputs = nn.BatchNorm(use_running_average=False)(inputs)
        return nn.Dense(3)(inputs)


@dataclasses.dataclass(frozen=True)
class _TrainingLogits:
    kind: str

    def __call__(self, params, batch, *state):
        return _Training(self.kind).apply(
            {"params": params, **({"batch_stats": state[0]} if state else {})}, batch["x"]
        )


@dataclasses.dataclass(frozen=True)
class _TrainingLoss:
    kind: str

    def __call__(self, params, batch, *state):
        return jnp.mean(losses.cross_entropy(_TrainingLogits(self.kind)(params, batch, *state), batch["t"]))


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_a_model_in_training_mode_is_told_so_in_a_line(kind):
    _, _, batch, _ = _closed_forms()["softmax regression"]
    batch = _cast(batch, np.float32)
    variables = dict(_Training(kind).init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, batch["x"]))
    arguments = variables.pop("params"), batch, *variables.values()
    logits, loss = _TrainingLogits(kind), _TrainingLoss(kind)
    for call in (
        lambda: curvature.hessian(loss, *arguments),
        lambda: curvature.gauss_newton(logits, *arguments),
        lambda: curvature.fisher(logits, *arguments, kind="sampled", key=jax.random.key(0)),
        lambda: curvature.worst_case(loss, *arguments, radius=0.1),
        lambda: curvature.jacobian(logits, *arguments)(arguments[0]),
    ):
        with pytest.raises(errors.UserError, match="evaluation mode, with train=False") as refused:
            call()
        assert "\n" not in str(refused.value)


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


def _counted_logits(params, batch):
    jax.debug.callback(lambda: _ASKED.append(batch["x"].shape))
    return _linear_logits(params, batch)


def test_outputs_are_tried_once_on_a_few_examples():
    _ASKED.clear()
    params, batch = {"w": jnp.ones((4, 3))}, {"x": jnp.ones((50, 4))}
    for scale in (1.0, 2.0):
        curvature.gauss_newton(_counted_logits, trees.scale(scale, params), batch)
    jax.effects_barrier()
    assert _ASKED == [(8, 4)] * 2


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


@jax.custom_vjp
def _fused_tanh(x):
    return jnp.tanh(x)


_fused_tanh.defvjp(lambda x: (_fused_tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


def _fused_rows(params, batch):
    return _fused_tanh(batch["x"] @ params["w"])


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
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 2.5e-3  # Measured: 1.2e-3.
    with pytest.raises(errors.UserError, match='custom_vjp.*attention="explicit"') as refused:
        curvature.gauss_newton(_fused_rows, params, batch)
    assert "finite difference" not in str(refused.value)  # It has no mode.


# Other ways to the same product.


def test_reverse_over_reverse_is_forward_over_reverse():
    with jax.enable_x64(True):
        params, batch = _network(jnp.float64)
        forward, reverse = (
            _matrix(curvature.hessian(_network_loss, params, batch, mode=mode)) for mode in products.MODES[:2]
        )
    np.testing.assert_allclose(reverse, forward, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 7e-4), (np.float64, 2e-9)])
def test_finite_differences_of_any_length_of_vector(dtype, tolerance):
    """Measured: 3.4e-4 and 8.7e-10."""
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
    scaled = curvature.Scaled(curvature.hessian(_network_loss, params, batch, microbatch=4), params)
    with pytest.raises(errors.UserError, match="microbatches"):
        curvature.linearise(scaled)
    build = functools.partial(curvature.hessian, _network_loss, params)
    for operator in (curvature.stream(build, [batch]), curvature.Scaled(curvature.stream(build, [batch]), params)):
        with pytest.raises(errors.UserError, match="data set batch by batch"):
            curvature.linearise(operator)
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


_SIZES = []


def _measured_logits(params, batch):
    _SIZES.append(len(batch["x"]))
    return _network_logits(params, batch)


@pytest.mark.parametrize("microbatch", [3, 5])
def test_labels_are_drawn_by_microbatches_as_from_the_whole_batch(microbatch):
    params, batch = _network()
    options = {"kind": "sampled", "key": jax.random.key(0), "separable": False}
    _, expected = curvature.fisher(_network_logits, params, batch, **options).batch
    _SIZES.clear()
    _, labels = curvature.fisher(_measured_logits, params, batch, microbatch=microbatch, **options).batch
    np.testing.assert_array_equal(labels, expected)
    assert len(set(np.asarray(labels))) == 3
    assert max(_SIZES) == microbatch


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


def _pixels_loss(params, batch):
    logits = batch["image"].reshape(len(batch["image"]), -1) @ params["w"]
    return jnp.mean(losses.cross_entropy(logits, batch["label"]))


def test_a_stream_of_this_library_is_read_without_its_padding():
    """Ten images in batches of four: the last one has two, and two of padding that are copies of the first image."""
    rng = np.random.default_rng(0)
    source = data.from_arrays(rng.integers(0, 256, (10, 4, 4, 1), np.uint8), np.arange(10) % 3)
    stream = streams.EvaluationStream(source, batch=4)
    params = {"w": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)}
    build = functools.partial(curvature.hessian, _pixels_loss, params)
    parts = list(stream.iterate())
    assert [int(part["mask"].sum()) for part in parts] == [4, 4, 2]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:10], *parts)
    expected = curvature.hessian(_pixels_loss, params, whole)(params)
    blank = jax.tree.map(np.zeros_like, parts[0])
    for batches in (stream, parts, [*parts, blank]):
        found = curvature.stream(build, batches)(params)
        difference = trees.norm(trees.add(found, expected, -1.0)) / trees.norm(expected)
        assert float(difference) < 1e-6  # Measured: 1e-7; with the padding 3e-2.
    training = streams.TrainingStream(source, batch=4)
    for batches, message in ((training, "no end"), (3, "cannot be read batch by batch"), ([blank], "empty")):
        with pytest.raises(errors.UserError, match=message):
            curvature.stream(build, batches)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda o: curvature.Scaled(o, o.like), lambda o: curvature.within(o, "^in/")])
def test_an_operator_made_of_a_stream_is_that_of_the_whole_batch(wrap):
    params, batch = _network(count=8)
    streamed = wrap(curvature.stream(functools.partial(curvature.hessian, _network_loss, params), _parts(batch, 4, 4)))
    whole = wrap(curvature.hessian(_network_loss, params, batch))
    vector = trees.normal_like(jax.random.key(0), params)
    block = streamed.block(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), vector))
    for found, factor in ((streamed(vector), 1.0), (jax.tree.map(lambda leaf: leaf[1], block), 2.0)):
        expected = trees.scale(factor, whole(vector))
        assert float(trees.norm(trees.add(found, expected, -1.0)) / trees.norm(expected)) < 1e-6  # Measured: 2e-7.
    found, expected = (curvature.lanczos(o, jax.random.key(1), rank=4, top=1).values for o in (streamed, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


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
