"""FGSM and PGD: closed forms on linear models, invariants, and parity with a plain NumPy implementation in float64."""

from __future__ import annotations

import contextlib

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors, losses

# Small enough that no linear example below leaves [0, 1].
SHAPE = (3, 3, 2)
ROWS = {
    "fgsm": {},
    "pgd": {"steps": 20, "relative_step": 0.25, "random_start": False},
}
DUAL = {"linf": lambda w: np.abs(w).sum(), "l2": np.linalg.norm}


def _linear(variables, images):
    return images.reshape(images.shape[0], -1) @ variables["w"] + variables["b"][None]


def _network(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


def _convolution(variables, images):
    features = jax.lax.conv_general_dilated(
        images, variables["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return _network(variables, jax.nn.relu(features))


def _model(seed: int, kind=_network, classes: int = 4, dtype=np.float32):
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    variables = {
        "u": rng.normal(size=(size, 16)) / np.sqrt(size),
        "w": rng.normal(size=(16, classes)),
        "k": rng.normal(size=(3, 3, 2, 2)) / 3,
    }
    if kind is not _convolution:
        del variables["k"]
    return classifier.wrap(kind, jax.tree.map(lambda a: jnp.asarray(a, dtype), variables))


def _images(seed: int, count: int, dtype=np.float32):
    return np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(dtype)


def _predictions(model, images):
    return np.array(_logits(model, jnp.asarray(images)).argmax(axis=-1), np.int32)


@jax.jit
def _logits(model, images):
    return model(images)


def _precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("goal", "dtype"), [("untargeted", np.float32), ("targeted", np.float32), ("untargeted", np.float64)]
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ROWS)
def test_linear_models_break_at_their_margin(name, norm, goal, dtype):
    """Two classes: the least epsilon is `|margin| / dual norm of the weights`, for every gradient attack (+-1 %)."""
    with _precision(dtype):
        rng = np.random.default_rng(0)
        weights = rng.normal(size=int(np.prod(SHAPE)))
        images = np.asarray(0.5 + 0.05 * rng.normal(size=(8, *SHAPE)), dtype)
        bias = -images.reshape(8, -1).mean(axis=0) @ weights
        model = classifier.wrap(
            _linear,
            {
                "w": jnp.asarray(np.stack([-weights, weights], 1) / 2, dtype),
                "b": jnp.asarray([-bias / 2, bias / 2], dtype),
            },
        )
        margins = np.abs(images.reshape(8, -1) @ weights + bias)
        labels = _predictions(model, images)
        given = labels if goal == "untargeted" else 1 - labels
        keys = attacks.example_keys(0, np.arange(8))
        least = margins / DUAL[norm](weights)
        assert least.max() < 0.3
        for row, epsilon in enumerate(least):
            for factor, breaks in ((0.99, False), (1.01, True)):
                attack = attacks.build(name, epsilon=factor * epsilon, norm=norm, goal=goal, **ROWS[name])
                result = attack(model, keys, images, jnp.asarray(given))
                assert bool(result.success[row]) is breaks
                # The other examples of the batch break exactly where they should, too.
                clear = np.abs(least / (factor * epsilon) - 1) > 0.005
                np.testing.assert_array_equal(np.asarray(result.success)[clear], (least < factor * epsilon)[clear])


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_the_loss_at_the_optimum_of_a_linear_model_is_known(loss):
    """Margin after an attack: the clean margin plus epsilon times the dual norm."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(int(np.prod(SHAPE)), 2)).astype(np.float32)
    model = classifier.wrap(_linear, {"w": jnp.asarray(weights), "b": jnp.zeros(2)})
    images = jnp.full((4, *SHAPE), 0.5)
    labels = jnp.zeros(4, jnp.int32)
    for norm in ("linf", "l2"):
        options = {**ROWS["pgd"], "random_start": (norm, loss) == ("l2", "margin"), "stop_on_success": False}
        attack = attacks.build("pgd", epsilon=0.05, norm=norm, loss=loss, **options)
        result = attack(model, attacks.example_keys(0, np.arange(4)), images, labels)
        clean = losses.margin(model(images), labels)
        expected = np.asarray(clean) + 0.05 * DUAL[norm]((weights[:, 1] - weights[:, 0]).astype(np.float64))
        np.testing.assert_allclose(losses.margin(model(result.images), labels), expected, rtol=2e-3)


def _numpy_gradient(model, images, labels):
    u, w = (np.asarray(model.variables[name], np.float64) for name in "uw")
    hidden = np.tanh(images.reshape(len(images), -1) @ u)
    logits = hidden @ w
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    outer = probabilities - np.eye(w.shape[1])[labels]
    return ((outer @ w.T) * (1 - hidden**2) @ u.T).reshape(images.shape), logits


def _numpy_pgd(model, images, starts, labels, *, norm, epsilon, step, steps):
    """The textbook loop, one example at a time, stopping at the first success."""
    found = []
    for image, start, label in zip(images, starts, labels, strict=True):
        x, evaluated = start, [image] if start is not image else []
        if evaluated and _numpy_gradient(model, image[None], [label])[1].argmax() != label:
            found.append(image)
            continue
        for _ in range(steps):
            gradient, logits = (a[0] for a in _numpy_gradient(model, x[None], [label]))
            if logits.argmax() != label:
                break
            direction = np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient)
            x = x + step * direction
            x = closed_forms.nearest(norm, x, image, epsilon)
        found.append(x)
    return np.stack(found)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 0.15)])
def test_float64_is_numpy(norm, epsilon, random_start):
    with jax.enable_x64(True):
        model, images = _model(3, dtype=np.float64), _images(3, 12, np.float64)
        labels = _predictions(model, images)
        labels[::5] = (labels[::5] + 1) % 4
        keys = attacks.example_keys(0, np.arange(12))
        attack = attacks.build(
            "pgd", epsilon=epsilon, norm=norm, step_size=epsilon / 4, steps=8, random_start=random_start
        )
        result = attack(model, keys, images, jnp.asarray(labels))
        starts = list(images)
        if random_start:
            first = attack.norm.draw(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), images, epsilon)
            starts = list(np.asarray(attack.norm.project(images + first, images, epsilon)))
        else:
            images = np.stack(starts)
            starts = images = list(images)
        expected = _numpy_pgd(model, images, starts, labels, norm=norm, epsilon=epsilon, step=epsilon / 4, steps=8)
        assert 0 < np.asarray(result.success).mean() < 1
        np.testing.assert_allclose(result.images, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kind", "norm", "options"),
    [
        *((name, _network, norm, ROWS[name]) for name in ROWS for norm in ("linf", "l2")),
        ("fgsm", _convolution, "linf", {}),
        ("pgd", _network, "linf", {"steps": 10}),
        ("pgd", _convolution, "l2", {"steps": 10}),
    ],
)
def test_what_holds_for_every_attack(name, kind, norm, options):
    model, images = _model(5, kind), _images(5, 24)
    labels = _predictions(model, images)
    labels[:4] = (labels[:4] + 1) % 4
    keys = attacks.example_keys(1, np.arange(24))
    attack = attacks.build(name, epsilon=0.0, norm=norm, **options)
    radii = np.array([0.0, 0.01, 0.05, 0.2, 0.8], np.float32)
    rates = []
    for epsilon in radii:
        result = attack.replace(epsilon=epsilon)(model, keys, images, labels)
        found = np.asarray(result.images)
        assert found.min() >= 0.0
        assert found.max() <= 1.0
        exact = np.asarray(attack.norm.measure(jnp.asarray(found - images)))
        np.testing.assert_allclose(result.distance, exact, rtol=1e-6)
        assert exact.max() <= epsilon * (1 + 1e-6) + 1e-7
        np.testing.assert_array_equal(result.prediction, _predictions(model, found))
        np.testing.assert_array_equal(result.success, np.asarray(result.prediction) != labels)
        np.testing.assert_allclose(
            result.loss, losses.cross_entropy(model(result.images), labels), rtol=1e-5, atol=1e-6
        )
        # Misclassified to begin with: a success whose image is untouched.
        assert np.asarray(result.success)[:4].all()
        np.testing.assert_array_equal(found[:4], images[:4])
        assert (np.asarray(result.backward_passes) <= attack.evaluations).all()
        np.testing.assert_array_equal(result.forward_passes, result.backward_passes + 1)
        if epsilon == 0:
            np.testing.assert_array_equal(found, images)
            np.testing.assert_array_equal(np.asarray(result.success), np.arange(24) < 4)
        rates.append(np.asarray(result.success).mean())
    if name == "pgd":
        assert rates == sorted(rates)
        assert rates[-1] > 0.9

    order = np.random.default_rng(0).permutation(24)
    permuted = attack.replace(epsilon=np.float32(0.05))(model, keys[order], images[order], labels[order])
    straight = attack.replace(epsilon=np.float32(0.05))(model, keys, images, labels)
    np.testing.assert_array_equal(permuted.images, np.asarray(straight.images)[order])


@pytest.mark.parametrize("kind", [_network, _convolution])
def test_a_map_over_an_attack_is_a_sweep_over_epsilon(kind):
    model, images = _model(6, kind), _images(6, 16)
    labels, keys = _predictions(model, images), attacks.example_keys(0, np.arange(16))
    attack = attacks.build("pgd", epsilon=0.1, steps=3, random_start=kind is _network)
    radii = np.array([0.0, 0.02, 0.05, 0.3], np.float32)
    swept = jax.vmap(lambda one: one(model, keys, images, labels))(attack.sweep(radii))
    for row, epsilon in enumerate(radii):
        one = attack.replace(epsilon=epsilon)(model, keys, images, labels)
        np.testing.assert_array_equal(swept.success[row], one.success)
        # The programs differ, and a sign amplifies rounding: an odd pixel may differ by a step. Measured: none.
        assert np.mean(np.abs(swept.images[row] - one.images) > 1e-6) < 0.01
    assert np.asarray(swept.success).mean(axis=1)[-1] > 0.5


def test_more_steps_and_more_restarts_find_more():
    model, images = _model(7), _images(7, 64)
    model = model.with_params(
        {**model.params, "u": 6.0 * model.params["u"]}
    )  # Bent enough for one step not to be the best.
    labels = _predictions(model, images)
    keys = attacks.example_keys(0, np.arange(64))

    def rate(name="pgd", **options):
        result = attacks.build(name, **{"epsilon": 0.1, **options})(model, keys, images, labels)
        return np.asarray(result.success)

    few, many = (rate(steps=steps, random_start=False) for steps in (1, 30))
    assert few.sum() < many.sum()
    # Steps too short to matter make restarts a random search, whose first draw is the same.
    once, often = (rate(epsilon=0.2, steps=1, relative_step=1e-3, restarts=restarts) for restarts in (1, 8))
    assert (once <= often).all()
    assert once.sum() < often.sum()


def _window(images):
    """Class 1 where the mean pixel is within 0.1 of 0.7, else class 0; the third logit rises with the pixels and never wins."""
    mean = jnp.mean(images, axis=(1, 2, 3))
    return jnp.stack([jnp.zeros_like(mean), 0.1 - jnp.abs(mean - 0.7), mean - 10.0], axis=1)


def _upwards(logits, labels):
    """An adaptive loss: it pulls the pixels up, through the window and out of it again."""
    del labels
    return logits[:, 2]


@pytest.mark.parametrize("stop", [True, False])
def test_a_success_on_the_way_is_not_lost(stop):
    """0.55 -> 0.63, 0.71, 0.79 (all misclassified) -> 0.87: the first of the three comes back."""
    images, labels = jnp.full((2, 2, 2, 1), 0.55), jnp.zeros(2, jnp.int32)
    options = {"steps": 4, "step_size": 0.08, "random_start": False, "loss": _upwards, "stop_on_success": stop}
    attack = attacks.build("pgd", epsilon=0.4, **options)
    result = attack(classifier.wrap(_window), attacks.example_keys(0, np.arange(2)), images, labels)
    assert np.asarray(result.success).all()
    np.testing.assert_allclose(result.distance, 0.08, rtol=1e-5)
    assert (np.asarray(result.backward_passes) == (2 if stop else 4)).all()


def test_without_stopping_every_example_takes_every_step():
    model, images = _model(9), _images(9, 8)
    labels = _predictions(model, images)
    keys = attacks.example_keys(0, np.arange(8))
    attack = attacks.build("pgd", epsilon=0.2, steps=5, random_start=False, stop_on_success=False)
    result = attack(model, keys, images, labels)
    assert (np.asarray(result.backward_passes) == attack.evaluations).all()
    stopped = attack.replace(stop_on_success=True)(model, keys, images, labels)
    assert (np.asarray(result.success) >= np.asarray(stopped.success)).all()
    assert (np.asarray(result.loss) >= np.asarray(stopped.loss)).all()
    assert np.asarray(result.loss).sum() > np.asarray(stopped.loss).sum()


def test_keys_decide_the_start_and_only_of_their_own_example():
    model, images = _model(11), _images(11, 6)
    labels = _predictions(model, images)
    attack = attacks.build("pgd", epsilon=0.01, steps=1, relative_step=1e-6)
    keys = attacks.example_keys(0, np.arange(6))
    first = np.asarray(attack(model, keys, images, labels).images)
    other = np.asarray(attack(model, keys.at[2].set(jax.random.key(99)), images, labels).images)
    changed = (first != other).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, np.arange(6) == 2)


def _constant(images):
    return jnp.zeros((images.shape[0], 2)) + 0.0 * jnp.sum(images, axis=(1, 2, 3))[:, None] + jnp.array([[2.0, 0.0]])


def _saturated(images):
    return 1e4 * jnp.stack([jnp.ones(images.shape[0]), jnp.mean(images, axis=(1, 2, 3))], axis=1)


def _root(images):
    return jnp.sqrt(
        jnp.stack([jnp.max(images, axis=(1, 2, 3)) - images[:, 0, 0, 0], images[:, 0, 0, 0] * 0], 1)
    ) + jnp.array([[2.0, 0.0]])


@pytest.mark.parametrize("model", [_constant, _saturated, _root])
def test_gradients_that_vanish_or_explode_are_counted(model):
    images, labels = jnp.full((3, 2, 2, 1), 0.5), jnp.zeros(3, jnp.int32)
    attack = attacks.build("pgd", epsilon=0.1, steps=4, random_start=False)
    result = attack(classifier.wrap(model), attacks.example_keys(0, np.arange(3)), images, labels)
    assert (np.asarray(result.vanished) == 4).all()
    assert np.isfinite(np.asarray(result.images)).all()
    margin = attacks.build("pgd", epsilon=0.1, steps=4, random_start=False, loss="margin")
    if model is _saturated:
        assert (
            np.asarray(margin(classifier.wrap(model), attacks.example_keys(0, np.arange(3)), images, labels).vanished)
            == 0
        ).all()


class _Dense(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, *, gates=None):
        _TRACES.append(self.dtype)
        return nn.Dense(4, dtype=self.dtype)(images.reshape(images.shape[0], -1)), {}


_TRACES: list[str] = []


def test_new_numbers_and_new_weights_trace_nothing():
    images = jnp.asarray(_images(0, 4))
    labels, keys = jnp.zeros(4, jnp.int32), attacks.example_keys(0, np.arange(4))
    spec = classifier.ImageSpec(SHAPE[:2], 2, mean=(0.5,), std=(0.5,))
    counts = []
    for seed, epsilon in enumerate((0.01, 0.02, 0.3)):
        model = classifier.Classifier(_Dense().init(jax.random.key(seed), images), _Dense(), spec)
        _TRACES.clear()
        attacks.build("pgd", epsilon=epsilon, steps=4, random_start=False)(model, keys, images, labels)
        counts.append(len(_TRACES))
    # The step, the judging pass, the look at how many logits there are and the one at what they are.
    assert counts == [4, 0, 0]


def test_a_bfloat16_model_is_judged_in_float32():
    images = jnp.asarray(_images(2, 64))
    spec = classifier.ImageSpec(SHAPE[:2], 2, mean=(0.5,), std=(0.5,))
    variables = _Dense().init(jax.random.key(0), images)
    low, high = (classifier.Classifier(variables, _Dense(dtype), spec) for dtype in ("bfloat16", "float32"))
    labels = jnp.argmax(high(images), axis=-1).astype(jnp.int32)
    result = attacks.build("fgsm", epsilon=0.005)(low, attacks.example_keys(0, np.arange(64)), images, labels)
    judged = high(result.images)
    np.testing.assert_array_equal(result.success, jnp.argmax(judged, axis=-1) != labels)
    np.testing.assert_allclose(result.loss, losses.cross_entropy(judged, labels), rtol=1e-5)
    assert classifier.in_float32(high) is high
    assert np.abs(np.asarray(low(images), np.float32) - np.asarray(high(images))).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "threat="),
        ({"epsilon": 8}, "8/255, not 8"),
        ({"epsilon": -0.1}, "from 0"),
        ({"epsilon": float("nan")}, "from 0"),
        ({"epsilon": 0.1, "norm": "l3"}, "unknown norm"),
        ({"epsilon": 0.1, "threat": "cifar10/linf-8"}, "threat alone"),
        ({"threat": "cifar10/linf8"}, "unknown threat model"),
        ({"epsilon": 0.1, "steps": 0}, "steps is 0"),
        ({"epsilon": 0.1, "restarts": 2, "random_start": False}, "all the same"),
        ({"epsilon": 0.1, "step_size": 0.1, "relative_step": 1.0}, "one of them"),
        ({"epsilon": 0.0, "step_size": 0.1}, "relative_step"),
        ({"epsilon": 0.1, "relative_step": 0.0}, "positive"),
        ({"epsilon": 0.1, "loss": "crossentropy"}, "cross_entropy"),
        ({"epsilon": 0.1, "goal": "untarget"}, "untargeted"),
        ({"epsilon": 0.1, "stepsize": 0.1}, "'step_size'"),
    ],
)
def test_a_mistake_in_the_options_says_what_to_do(options, message):
    with pytest.raises(errors.UserError, match=message):
        attacks.build("pgd", **options)


def test_an_unknown_attack_lists_the_known():
    with pytest.raises(errors.UserError, match="pgd"):
        attacks.build("pdg", epsilon=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 3, 3, 2), np.uint8)}, "divide uint8"),
        ({"images": np.zeros((4, 18), np.float32)}, "height"),
        ({"labels": np.zeros((4, 4), np.int32)}, "class indices"),
        ({"keys": jnp.zeros((4, 2), jnp.uint32)}, "typed key"),
        ({"keys": jax.random.key(0)}, "jax.random.split"),
    ],
)
def test_a_mistake_in_the_arrays_says_what_to_do(change, message):
    arrays = {
        "keys": attacks.example_keys(0, np.arange(4)),
        "images": _images(0, 4),
        "labels": np.zeros(4, np.int32),
        **change,
    }
    with pytest.raises(errors.UserError, match=message):
        attacks.build("fgsm", epsilon=0.1)(_model(0), arrays["keys"], arrays["images"], arrays["labels"])
