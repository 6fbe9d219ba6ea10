"""Patch-Fool: PCGrad in closed form, which patches are chosen, attention that is drawn, variants, models without attention."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_vit

from robust_vit import attacks, errors, losses
from robust_vit.attacks import evaluation, masked, moments, patch_fool

COUNT = 48
OPTIONS = {"patch": small_vit.PATCH, "patches": 2, "layer": 1, "layers": (1,), "steps": 30}


def _given():
    images, labels = small_vit.images(99, COUNT)
    return attacks.example_keys(0, np.arange(COUNT)), jnp.asarray(images), jnp.asarray(labels)


def _attack(**options):
    return attacks.build("patch_fool", **{**OPTIONS, **options})


def _changed(result, images):
    """Which patches an attack changed, `[batch, grid, grid]`."""
    moved = np.abs(np.asarray(result.images) - np.asarray(images)).max(axis=-1)
    cells = moved.reshape(COUNT, 4, small_vit.PATCH, 4, small_vit.PATCH)
    return cells.max(axis=(2, 4)) > 0


@jax.jit
def _attention(model, images):
    """What each patch receives in block 1, mean over heads and over those who ask."""
    return model.features(images)[1]["block01/attention_weights"].mean(axis=(1, 2))[:, 1:]


def test_conflicting_gradients_are_projected():
    main = jnp.asarray([[3.0, 0.0], [3.0, 0.0], [0.0, 0.0], [1e-25, 0.0]])
    gradient = jnp.asarray([[-2.0, 1.0], [2.0, 1.0], [-2.0, 1.0], [-2.0, 1.0]])
    expected = [[0.0, 1.0], [2.0, 1.0], [-2.0, 1.0], [0.0, 1.0]]
    np.testing.assert_allclose(patch_fool.without_conflict(gradient, main), expected, atol=1e-6)
    rng = np.random.default_rng(0)
    main, gradient = (jnp.asarray(rng.normal(size=(50, 4, 4, 3)), jnp.float32) for _ in range(2))
    left = np.asarray(patch_fool.without_conflict(gradient, main))
    products = np.einsum("bhwc,bhwc->b", left, main)
    conflicts = np.einsum("bhwc,bhwc->b", gradient, main) < 0
    assert conflicts.any()
    assert not conflicts.all()
    np.testing.assert_allclose(products[conflicts], 0.0, atol=1e-4)
    np.testing.assert_array_equal(left[~conflicts], gradient[~conflicts])


def test_it_fools_a_small_vit_by_the_patches_that_receive_most_attention():
    keys, images, labels = _given()
    model = small_vit.model()
    result = _attack()(model, keys, images, labels)
    chosen = np.argsort(-np.asarray(_attention(model, images)), axis=1)[:, :2]
    expected = np.zeros((COUNT, 16), bool)
    np.put_along_axis(expected, chosen, True, axis=1)
    np.testing.assert_array_equal(_changed(result, images).reshape(COUNT, 16), expected)
    np.testing.assert_array_equal(result.backward_passes, 2 * (np.asarray(result.forward_passes) - 1))
    # Measured: 0.56.
    assert np.asarray(result.success).mean() > 0.35


def test_saliency_and_chance_choose_other_patches_and_a_ball_bounds_what_they_become():
    keys, images, _ = _given()
    model = closed_forms.model(0, images.shape[1:], 2)
    labels = jnp.argmax(model(images), axis=1).astype(jnp.int32)
    weights = np.asarray(model.variables["w"])
    difference = np.abs(weights[:, 1] - weights[:, 0]).reshape(4, 4, 4, 4, 3)
    common = {"layers": (), "patches": 1, "steps": 3, "norm": "l2", "epsilon": 0.3}
    result = _attack(select="saliency", **common)(model, keys, images, labels)
    # The gradients of the logits of an affine model are the same everywhere.
    assert (_changed(result, images).reshape(COUNT, 16).argmax(1) == difference.sum(axis=(1, 3, 4)).argmax()).all()
    assert np.asarray(result.distance).max() <= 0.3 * (1 + 1e-5)
    result = _attack(select="random", **common)(model, keys, images, labels)
    changed = _changed(result, images).reshape(COUNT, 16)
    assert (changed.sum(1) == 1).all()
    assert len(np.unique(changed.argmax(1))) > 8
    assert np.asarray(result.distance).max() <= 0.3 * (1 + 1e-5)


def test_attention_is_drawn_to_the_patch():
    """With a loss that has no gradient the attention losses are all that there is."""
    keys, images, labels = _given()
    model = small_vit.model()
    result = _attack(loss=_flat, patches=1, goal="targeted", stop_on_success=False)(model, keys, images, labels * 0 + 3)
    chosen = np.asarray(_attention(model, images)).argmax(1)
    before, after = (np.asarray(_attention(model, x))[np.arange(COUNT), chosen] for x in (images, result.images))
    assert (np.asarray(result.vanished) > 0).all()
    assert np.mean(after > before) > 0.95
    assert after.mean() > 1.5 * before.mean()


def _noisy(keys, images):
    return images + 0.3 * jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)


def test_on_an_expectation_attention_and_loss_are_means_over_the_draws():
    """Of one look at images with a patch chosen: every part against the same draws one by one, and then a whole attack."""
    keys, images, labels = (array[:8] for array in _given())
    model, attack = small_vit.model(), _attack(attention_weight=1.0, epsilon=0.1)
    asked = attacks.expectation(model, transform=_noisy, samples=3)
    state = attack.init(keys, images, labels)
    state = state.replace(chosen=jnp.arange(8), mask=jnp.ones_like(state.mask), count=state.count + 5)
    found = jax.jit(attack.look)(asked, state)
    draws = jax.vmap(lambda key: jax.random.split(_of_evaluation(key, 5), 3))(keys)

    def alone(images):
        answers = [model.features(_noisy(draws[:, index], images)) for index in range(3)]
        received = [features["block01/attention_weights"].mean(axis=1)[..., 1:] for _, features in answers]
        climbed = sum(losses.cross_entropy(logits, labels).sum() for logits, _ in answers) / 3
        drawn = sum(jnp.log(one).mean(axis=1)[jnp.arange(8), jnp.arange(8)].sum() for one in received) / 3
        return jnp.stack([climbed, drawn]), sum(one.mean(axis=1) for one in received) / 3

    (climbed, drawn), received = jax.jit(jax.jacrev(alone, has_aux=True))(images)
    expected = climbed + patch_fool.without_conflict(drawn, climbed)
    np.testing.assert_allclose(found.directions, expected, rtol=2e-3, atol=2e-5)
    chosen = np.asarray(jax.lax.top_k(received, 2)[1])
    mask = np.asarray(found.fixed["mask"])[:, :: small_vit.PATCH, :: small_vit.PATCH, 0].reshape(8, 16)
    np.testing.assert_array_equal(np.sort(chosen, axis=1), np.stack([np.flatnonzero(row) for row in mask]))
    result = _attack(steps=3)(asked, keys, images, labels)
    assert (np.asarray(result.forward_passes) % 3 == 0).all()
    nested = attacks.expectation(attacks.expectation(model, transform=_noisy, samples=2), transform=_noisy, samples=2)
    assert jax.eval_shape(nested.sample_features, images, keys)[1]["block01/attention_weights"].shape[:2] == (4, 8)


def _of_evaluation(key, number):
    return jax.random.fold_in(jax.random.fold_in(key, evaluation._PURPOSE), number)


def _flat(logits, labels):
    del labels
    return 0.0 * logits[:, 0]


def test_a_model_without_attention_or_with_other_blocks_is_told():
    keys, images, labels = _given()
    affine = closed_forms.model(0, images.shape[1:], small_vit.CLASSES)
    with pytest.raises(errors.UserError, match='select="saliency", layers='):
        _attack()(affine, keys, images, labels)
    with pytest.raises(errors.UserError, match='select="saliency", layers='):
        _attack()(attacks.expectation(affine, transform=_noisy, samples=2), keys, images, labels)
    for options, message in (
        ({"layer": 4}, "the model has 0 to 1"),
        ({"layers": (1, 2)}, "the model has 0 to 1"),
        ({"patch": 8}, "attends over 17 tokens"),
        ({"patch": 5}, "16 x 16 pixels"),
        ({"patches": 17}, "has 16 of them"),
    ):
        with pytest.raises(errors.UserError, match=message):
            _attack(**options)(small_vit.model(), keys, images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "attn"}, "attention"),
        ({"patches": 0}, "patches is 0"),
        ({"attention_weight": -1.0}, "from 0"),
        ({"layers": (-1,)}, "layer is -1"),
        ({"learning_rate": 0.0}, "positive"),
        ({"epsilon": 8.0}, "8/255"),
    ],
)
def test_mistakes_say_what_to_do(options, message):
    with pytest.raises(errors.UserError, match=message):
        _attack(**options)


def test_the_rate_decays_by_an_example_s_own_count():
    attack = _attack(decay=0.5, decay_every=2, learning_rate=0.1)
    keys, images, labels = _given()
    state = attack.init(keys, images, labels)
    ones = jnp.ones_like(images)
    counts = jnp.arange(COUNT) + 1
    shares = (1 - 0.9**counts, 1 - 0.999**counts)
    held = moments.Moments(*(ones * share[:, None, None, None] for share in shares))
    moves = masked.MaskedAscent._moves(attack, state.replace(count=counts), held)
    np.testing.assert_allclose(moves[:, 0, 0, 0], 0.1 * 0.5 ** (np.arange(COUNT) // 2), rtol=1e-4)
