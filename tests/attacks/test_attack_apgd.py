"""Auto-PGD: its schedule, its losses' invariants, and what it finds on affine models and on bent ones."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors, losses
from robust_vit.attacks import apgd, auto_pgd

SHAPE = (3, 3, 2)


def _bent(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


def _model(seed: int, classes: int = 5, bend: float = 2.0):
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    variables = {"u": bend * rng.normal(size=(size, 24)) / np.sqrt(size), "w": rng.normal(size=(24, classes))}
    return classifier.wrap(_bent, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), variables))


def _images(seed: int, count: int, shape=SHAPE):
    return np.random.default_rng(seed).uniform(size=(count, *shape)).astype(np.float32)


def _predictions(model, images):
    return np.asarray(model(jnp.asarray(images)).argmax(axis=-1), np.int32)


def test_checkpoints_are_those_of_the_paper():
    """Of 100 steps: 0.22, then 0.03 less each time, at least 0.06 (Croce & Hein 2020, section 3.2)."""
    table = auto_pgd.course(100, False, apgd.FIXED)
    assert np.flatnonzero(table.checkpoint).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert table.window[table.checkpoint].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    assert len(table.index) == 101
    assert np.flatnonzero(table.last).tolist() == [100]


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_run_in_l1_shares_its_steps_among_three_balls(steps):
    table = auto_pgd.course(steps, True, apgd.SHRINKING)
    assert table.radius[table.last].tolist() == [3, 2, 1]
    assert (~table.last).sum() == steps
    if steps == 100:
        assert np.flatnonzero(table.last).tolist() == [30, 61, 102]
        assert table.window[table.checkpoint].max() == 1


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_passes_are_as_stated(norm):
    model, images = _model(0), _images(0, 4)
    labels = _predictions(model, images)
    attack = attacks.build("apgd_ce", epsilon=1e-6, norm=norm, steps=9, restarts=2)
    result = attack(model, attacks.example_keys(0, np.arange(4)), images, labels)
    expected = 1 + 2 * (9 + (3 if norm == "l1" else 1))
    assert attack.evaluations == expected
    assert (np.asarray(result.backward_passes) == expected).all()
    assert (np.asarray(result.forward_passes) == expected + 1).all()


def test_in_l1_affine_models_in_many_dimensions_break_near_their_distance():
    """None within it. At 1.01 times it 14 of 16 break (measured), at 1.05 times all."""
    shape = (16, 16, 3)
    model, images = closed_forms.model(3, shape, 2), _images(1, 16, shape)
    labels = _predictions(model, images)
    exact = closed_forms.distances("l1", model, images, labels)
    attack, keys = attacks.build("apgd_ce", epsilon=0.1, norm="l1"), attacks.example_keys(0, np.arange(16))
    broken = {
        factor: np.asarray(
            attack.replace(epsilon=np.asarray(factor * exact, np.float32))(model, keys, images, labels).success
        ).sum()
        for factor in (0.99, 1.01, 1.05)
    }
    assert broken[0.99] == 0
    assert broken[1.01] >= 13
    assert broken[1.05] == 16


def test_no_weaker_than_pgd_and_that_than_fgsm():
    """Robust accuracy on a bent model, at equal passes."""
    model, images = _model(3, bend=6.0), _images(3, 96)
    labels, keys = _predictions(model, images), attacks.example_keys(0, np.arange(96))

    def robust(name, **options):
        result = attacks.build(name, epsilon=0.05, **options)(model, keys, images, labels)
        return 1.0 - np.asarray(result.success).mean()

    single, iterated, auto = robust("fgsm"), robust("pgd", steps=40), robust("apgd_ce", steps=40)
    targeted = robust("apgd_t", steps=40, targets=4)
    assert single > iterated >= auto > 0
    assert auto >= targeted


def test_targets_are_the_likeliest_other_classes_in_order():
    model, images = _model(5), _images(5, 8)
    labels = _predictions(model, images)
    attack = attacks.build("apgd_t", epsilon=1e-6, steps=1, targets=3)
    keys = attacks.example_keys(0, np.arange(8))
    state = attack.init(keys, images, jnp.asarray(labels))
    step = jax.jit(type(attack).step)
    state = step(attack, model, state)
    order = np.argsort(-np.asarray(model(jnp.asarray(images))), axis=-1)
    np.testing.assert_array_equal(state.targets, order[:, 1:4])
    # They stay while the images move.
    state = step(attack, model, state.replace(count=state.count + 1))
    np.testing.assert_array_equal(state.targets, order[:, 1:4])


def test_without_stopping_the_largest_loss_comes_back():
    model, images = _model(7), _images(7, 16)
    labels, keys = _predictions(model, images), attacks.example_keys(0, np.arange(16))
    attack = attacks.build("apgd_ce", epsilon=0.2, steps=15, stop_on_success=False)
    full = attack(model, keys, images, labels)
    stopped = attack.replace(stop_on_success=True)(model, keys, images, labels)
    assert (np.asarray(full.backward_passes) == attack.evaluations).all()
    np.testing.assert_array_equal(full.success, stopped.success)
    assert (np.asarray(full.loss) >= np.asarray(stopped.loss) - 1e-6).all()
    assert np.asarray(full.loss).sum() > np.asarray(stopped.loss).sum()


def test_any_loss_can_be_climbed():
    """An adaptive loss that pulls the pixels up finds the model whose class changes there."""
    model = classifier.wrap(_brightness)
    images, labels = _images(9, 4) * 0.2 + 0.3, jnp.zeros(4, jnp.int32)
    result = attacks.build("apgd", epsilon=0.3, steps=10, loss=_upwards)(
        model, attacks.example_keys(0, np.arange(4)), images, labels
    )
    assert np.asarray(result.success).all()


def _brightness(images):
    mean = jnp.mean(images, axis=(1, 2, 3))
    return jnp.stack([jnp.zeros_like(mean), jnp.where(mean > 0.6, 1.0, -1.0), mean - 10.0], axis=1)


def _upwards(logits, labels):
    del labels
    return logits[:, 2]


def _mute(images):
    """Not a number where a pixel is bright."""
    mean = jnp.mean(images, axis=(1, 2, 3))
    return jnp.stack([jnp.where(mean > 0.55, jnp.nan, 1.0 - mean), mean - 1.0], axis=1)


def test_a_loss_that_is_not_a_number_is_no_progress():
    images, labels = jnp.full((2, *SHAPE), 0.5), jnp.zeros(2, jnp.int32)
    attack = attacks.build("apgd", epsilon=0.2, steps=10, loss="margin", stop_on_success=False)
    result = attack(classifier.wrap(_mute), attacks.example_keys(0, np.arange(2)), images, labels)
    assert np.isfinite(np.asarray(result.images)).all()
    assert np.isfinite(np.asarray(result.loss)).all()


@pytest.mark.parametrize(
    ("name", "options", "classes", "message"),
    [
        ("apgd_dlr", {}, 2, "apgd_ce"),
        ("apgd_t", {"targets": 2}, 3, "apgd_ce"),
        ("apgd_t", {}, 5, "targets=4"),
    ],
)
def test_too_few_classes_are_an_error_that_names_the_remedy(name, options, classes, message):
    model, images = _model(0, classes), _images(0, 2)
    with pytest.raises(errors.UserError, match=message):
        attacks.build(name, epsilon=0.1, **options)(
            model, attacks.example_keys(0, np.arange(2)), images, np.zeros(2, np.int32)
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("apgd", {"loss": "crossentropy"}, "cross_entropy"),
        ("apgd_ce", {"steps": 0}, "steps is 0"),
        ("apgd_ce", {"restarts": 1.5}, "restarts is 1.5"),
        ("apgd_t", {"targets": 0}, "targets is 0"),
        ("apgd_t", {"goal": "targeted"}, "unknown option"),
    ],
)
def test_a_mistake_in_the_options_says_what_to_do(name, options, message):
    with pytest.raises(errors.UserError, match=message):
        attacks.build(name, epsilon=0.1, **options)


def _numpy_dlr(logits, label):
    ordered = np.sort(logits)[::-1]
    other = np.max(np.delete(logits, label))
    return (other - logits[label]) / (ordered[0] - ordered[2])


def _numpy_targeted_dlr(logits, label, target):
    ordered = np.sort(logits)[::-1]
    return (logits[target] - logits[label]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


def test_dlr_is_its_formula_and_knows_no_shift_and_no_scale():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 6))
    labels, targets = rng.integers(0, 6, 64), rng.integers(0, 6, 64)
    with jax.enable_x64(True):
        for scaled in (logits, 100 * logits - 7):
            found = losses.dlr(jnp.asarray(scaled), jnp.asarray(labels))
            np.testing.assert_allclose(found, list(map(_numpy_dlr, logits, labels)), rtol=1e-11)
            found = losses.targeted_dlr(jnp.asarray(scaled), jnp.asarray(labels), jnp.asarray(targets))
            np.testing.assert_allclose(found, list(map(_numpy_targeted_dlr, logits, labels, targets)), rtol=1e-11)


@pytest.mark.parametrize("logits", [[1.0, 1, 1, 1, 0], [0.0, 0, 0, 0, 0], [5.0, 5, 5, 5, -1e4], [1e-30, 0, 0, 0, 0]])
def test_ties_give_finite_losses_and_gradients(logits):
    logits, labels = jnp.asarray([logits, logits]), jnp.asarray([0, 4])
    for loss in (losses.dlr, lambda x, y: losses.targeted_dlr(x, y, jnp.asarray([1, 2]))):
        assert np.isfinite(np.asarray(loss(logits, labels))).all()
        gradients = jax.grad(lambda x, loss=loss: loss(x, labels).sum())(logits)
        assert np.isfinite(np.asarray(gradients)).all()
        assert np.abs(np.asarray(gradients)).max() > 0
