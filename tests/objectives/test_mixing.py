"""Mixup and cutmix against closed forms: means of the draws, areas, what the identity is, and where the draws differ."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_vit import classifier, errors, losses, objectives
from robust_vit.objectives import mixing
from robust_vit.training import state as train_state
from robust_vit.training import step as train_step

IMAGES = jax.random.uniform(jax.random.key(0), (8, 12, 10, 3))
LABELS = jnp.arange(8)
KEYS = jax.random.split(jax.random.key(1), 2000)


def _weights(**options) -> np.ndarray:
    draw = jax.jit(jax.vmap(lambda key: mixing.mix(key, IMAGES, LABELS, **options).weight))
    return np.asarray(draw(KEYS))


def test_the_weight_of_mixup_is_a_beta_draw():
    alpha = 0.3
    weights = _weights(mixup=alpha, cutmix=0.0)
    np.testing.assert_allclose(weights.mean(), 0.5, atol=0.04)
    np.testing.assert_allclose(weights.var(), 1 / (4 * (2 * alpha + 1)), atol=0.012)
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_mixup_is_the_weighted_mean_of_neighbours():
    mixed = mixing.mix(KEYS[0], IMAGES, LABELS, mixup=1.0, cutmix=0.0)
    second = np.roll(IMAGES, 1, axis=0)
    np.testing.assert_allclose(mixed.images, mixed.weight * IMAGES + (1 - mixed.weight) * second, rtol=1e-6)
    np.testing.assert_array_equal(mixed.partners, np.roll(LABELS, 1))


def test_cutmix_pastes_one_rectangle_whose_area_is_the_weight():
    mix = jax.jit(lambda key: mixing.mix(key, IMAGES, LABELS, mixup=0.0, cutmix=1.0))
    second = np.roll(IMAGES, 1, axis=0)
    areas = []
    for key in KEYS[:60]:
        mixed = mix(key)
        first_kept = (np.asarray(mixed.images) == np.asarray(IMAGES)).all((0, 3))
        np.testing.assert_array_equal(np.asarray(mixed.images)[:, ~first_kept], second[:, ~first_kept])
        np.testing.assert_allclose(mixed.weight, first_kept.mean(), rtol=1e-6)
        rows, columns = np.flatnonzero(~first_kept.all(1)), np.flatnonzero(~first_kept.all(0))
        if len(rows):
            assert not first_kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].any()
        areas.append(1 - float(mixed.weight))
    assert 0 < np.mean(areas) < 0.5  # Half before it is cut at the border.
    assert max(areas) > 0.6


def test_a_rectangle_has_the_paper_s_sides_and_centre():
    inside = jax.jit(jax.vmap(lambda key: mixing.rectangle(key, jnp.float32(0.75), 40, 60)))(KEYS)
    areas = np.asarray(inside).sum((1, 2))
    assert areas.max() == 20 * 30  # Half of each side: a quarter of the area.
    centres = np.asarray(inside).mean(0)
    # A pixel far from the border is covered by 20 x 30 of the 40 x 60 centres; one in the corner by 10 x 15. Standard errors .01.
    np.testing.assert_allclose(centres[20, 30], 0.25, atol=0.04)
    np.testing.assert_allclose(centres[0, 0], 0.0625, atol=0.025)


def test_a_weight_of_one_is_the_identity(monkeypatch):
    monkeypatch.setattr(jax.random, "beta", lambda *_, **__: jnp.float32(1.0))
    for options in ({"mixup": 1.0, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}):
        mixed = mixing.mix(KEYS[0], IMAGES, LABELS, **options)
        np.testing.assert_array_equal(mixed.images, IMAGES)
        assert mixed.weight == 1


@pytest.mark.slow
def test_the_switch_chooses_between_the_two():
    mix = jax.vmap(lambda key: mixing.mix(key, IMAGES[:, :4, :4], LABELS, mixup=1.0, cutmix=1.0, switch=0.25).weight)
    is_area = np.isclose(np.asarray(mix(KEYS)) * 16 % 1, 0, atol=1e-5)  # Mixup hits a sixteenth almost never.
    np.testing.assert_allclose(is_area.mean(), 0.25, atol=0.04)  # Standard error .01.


class _Linear(nn.Module):
    """Logits from mean colours."""

    @nn.compact
    def __call__(self, images, *, train=False, gates=None, norm_set="main"):
        return nn.Dense(8)(images.mean((1, 2))), {}


SPEC = classifier.ImageSpec(size=(12, 10), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
PARAMS = _Linear().init(jax.random.key(3), IMAGES)["params"]
BATCH = {"image": IMAGES, "label": LABELS}


def _loss(key=KEYS[0], batch=BATCH, **options):
    return objectives.build("supervised", _Linear(), SPEC, **options)(PARAMS, {}, batch, key)


def test_the_loss_is_cross_entropy_with_the_soft_labels():
    for smoothing in (0.0, 0.1):
        loss, (_, metrics) = _loss(mixup=0.8, label_smoothing=smoothing)
        mixed = mixing.mix(jax.random.fold_in(KEYS[0], 1), IMAGES, LABELS, mixup=0.8, cutmix=0.0)
        targets = mixed.weight * jax.nn.one_hot(LABELS, 8) + (1 - mixed.weight) * jax.nn.one_hot(mixed.partners, 8)
        np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
        targets = (1 - smoothing) * targets + smoothing / 8
        logits, _ = _Linear().apply({"params": PARAMS}, SPEC.normalize(mixed.images))
        expected = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        assert 0 <= metrics["accuracy"] <= 1


def test_zero_is_off_to_the_byte():
    logits, _ = _Linear().apply({"params": PARAMS}, SPEC.normalize(IMAGES))
    assert _loss()[0] == _loss(mixup=0.0, cutmix=0.0)[0] == jnp.mean(losses.cross_entropy(logits, LABELS))


@pytest.mark.slow
def test_replicas_and_parts_of_a_batch_have_their_own_draws():
    objective = objectives.build("supervised", _Linear(), SPEC, mixup=1.0)
    loss = jax.jit(lambda batch, key: objective(PARAMS, {}, batch, key)[0])
    together = jax.jit(jax.vmap(loss, in_axes=(None, 0)))(BATCH, KEYS[:4])
    alone = [loss(BATCH, key) for key in KEYS[:4]]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(set(np.asarray(together).tolist())) == 4

    step = jax.jit(train_step.build(objective, optax.sgd(0.1), accumulate=2))
    metrics = (*objective.metrics, *train_step.STEP_METRICS)
    state = step(train_state.create({"params": PARAMS}, optax.sgd(0.1), metrics=metrics, average=False), BATCH, KEYS[0])
    key = jax.random.fold_in(KEYS[0], 0)
    halves = [jax.tree.map(lambda leaf, i=i: leaf[i::2], BATCH) for i in range(2)]
    parts = [loss(half, jax.random.fold_in(key, index)) for index, half in enumerate(halves)]
    np.testing.assert_allclose(state.sums["loss"], np.mean(parts), rtol=1e-5)


def test_bfloat16_images_stay_bfloat16_and_the_weight_float32():
    mixed = jax.eval_shape(lambda: mixing.mix(KEYS[0], IMAGES.astype(jnp.bfloat16), LABELS, mixup=1.0, cutmix=1.0))
    assert mixed.images.dtype == jnp.bfloat16
    assert mixed.weight.dtype == jnp.float32
    gradient = jax.grad(lambda images: _loss(batch={"image": images, "label": LABELS}, cutmix=1.0)[0])(IMAGES)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.1}, r"objective.mixup=-0.1: expected a positive number"),
        ({"cutmix": float("nan")}, r"objective.cutmix=nan"),
        ({"mix_switch": 1.5}, r"objective.mix_switch=1.5: expected a probability"),
        ({"mixupp": 1.0}, "did you mean 'mixup'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(errors.UserError, match=message):
        _loss(**options)
