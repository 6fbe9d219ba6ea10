"""The planted-adversarial test: strong attacks pass, weak and broken ones fail, and what is planted is there."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import gradient, planting

SHAPE = (6, 6, 2)
EPSILON = 0.05


class Network(nn.Module):
    """Two layers; `masked` rounds the pixels and hides the gradient."""

    masked: bool = False

    @nn.compact
    def __call__(self, images, *, gates=None):
        if self.masked:
            images = jax.lax.stop_gradient(images)
        x = images.reshape(images.shape[0], -1)
        x = nn.gelu(nn.Dense(96)(x))
        return nn.Dense(5)(x), {"pre_logits": x, "short": x[:, :2]}


def _model(masked: bool = False):
    spec = classifier.ImageSpec(SHAPE[:2], 2, mean=(0.5,), std=(0.25,))
    variables = Network().init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    return classifier.Classifier(variables, Network(masked), spec)


def _images(count: int = 8):
    return np.random.default_rng(0).uniform(size=(count, *SHAPE)).astype(np.float32)


def _attack(**options):
    return attacks.build("pgd", **{"epsilon": EPSILON, "steps": 30, "relative_step": 0.1, **options})


class Lazy(gradient.ProjectedAscent, kw_only=True):
    """Steps that lead nowhere."""

    def _move(self, state, gradients, phase):
        return state.images


def test_an_attack_that_works_finds_what_is_planted_and_guessing_does_not():
    found = attacks.planted(_model(), _images(), _attack(), epsilon=EPSILON)
    assert found.planted.all()
    assert found.passed
    assert found.success.value == 1.0
    assert found.random_points == 31
    assert found.chance.value < 0.5
    assert (found.distance <= EPSILON * (1 + 1e-5)).all()
    assert "passed" in str(found)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms(norm):
    epsilon = {"l2": 0.5, "l1": 3.0}[norm]
    attack = _attack(epsilon=epsilon, norm=norm)
    found = attacks.planted(_model(), _images(3), attack, epsilon=epsilon, norm=norm, random_points=20)
    assert found.planted.all()
    assert found.success.value == 1.0


def test_an_attack_that_does_not_move_fails():
    lazy = Lazy(epsilon=np.float32(EPSILON), relative_step=np.float32(0.1), steps=30, random_start=False)
    found = attacks.planted(_model(), _images(4), lazy, epsilon=EPSILON, random_points=20)
    assert found.planted.all()
    assert not found.passed
    assert found.success.value == 0.0
    assert "FAILED" in str(found)


def test_a_masked_gradient_fails():
    """The example is there all the same: only the way to it is hidden."""
    found = attacks.planted(
        _model(masked=True), _images(4), _attack(random_start=False), epsilon=EPSILON, random_points=20
    )
    assert found.planted.all()
    assert found.success.value == 0.0


def _plain(images):
    rows = jnp.arange(images[0].size * 12.0).reshape(-1, 12)
    return jnp.tanh((images.reshape(images.shape[0], -1) - 0.5) @ jnp.sin(rows))


def test_a_function_is_tested_on_its_logits():
    """It names no features: the head reads the logits, of which there are enough for a few inner points."""
    found = attacks.planted(_plain, _images(4), _attack(), epsilon=EPSILON, random_points=20)
    wrapped = attacks.planted(classifier.wrap(_plain), _images(4), _attack(), epsilon=EPSILON, random_points=20)
    assert found.planted.sum() == 3  # Of one image no head on so few logits tells the points apart.
    assert found.success.value == 1.0
    np.testing.assert_array_equal(wrapped.distance, found.distance)
    lazy = Lazy(epsilon=np.float32(EPSILON), relative_step=np.float32(0.1), steps=30, random_start=False)
    assert attacks.planted(_plain, _images(4), lazy, epsilon=EPSILON, random_points=20).success.value == 0.0


def test_an_image_depends_on_its_row_alone():
    images, rows = _images(4), np.asarray([9, 2, 7, 4])
    options = {"epsilon": EPSILON, "random_points": 20}
    whole = attacks.planted(_model(), images, _attack(), rows=rows, **options)
    half = attacks.planted(_model(), images[2:], _attack(), rows=rows[2:], **options)
    for name in ("planted", "found", "guessed", "distance"):
        np.testing.assert_array_equal(getattr(half, name), getattr(whole, name)[2:])


def test_the_head_separates_whatever_can_be_separated():
    rng = np.random.default_rng(1)
    for points, width in ((5, 40), (20, 30), (2, 2)):
        features = rng.normal(size=(points, width)) * rng.uniform(0.01, 100.0)
        weights, bias = planting.head(features)
        scores = features @ weights + bias
        assert (scores[:-1] < 0).all()
        np.testing.assert_allclose(scores[-1], 1.0 - planting.CLOSENESS, rtol=1e-4)
        np.testing.assert_allclose(scores[:-1].max(), -planting.CLOSENESS, rtol=1e-4)
    # A point in the middle of the others cannot be told from them: it stays on their side.
    middle = np.concatenate([np.eye(2), -np.eye(2), np.zeros((1, 2))])
    weights, bias = planting.head(middle)
    assert not ((middle @ weights + bias)[-1] > 1e-9 and ((middle @ weights + bias)[:-1] < -1e-9).all())


def test_points_lie_where_they_should():
    model = planting.Planted(_model(), jnp.zeros(96), jnp.float32(0.0), "pre_logits", 5)
    logits = np.asarray(model(_images(2)))
    assert logits.shape == (2, 5)
    assert (logits[:, 2:].max(axis=1) < logits[:, :2].min(axis=1)).all()
    norm, image = attacks.NORMS["l2"], np.full(SHAPE, 0.5, np.float32)
    for surface in (True, False):
        points = planting._points(norm, jax.random.key(0), image, np.float32(0.3), 40, surface)
        length = np.sqrt(((points - image) ** 2).sum(axis=(1, 2, 3)))
        assert length.max() <= 0.3 * (1 + 1e-5)
        assert (length.min() > 0.2999) == surface


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": jax.tree_util.Partial(lambda images: images[:, 0, 0]), "layer": "pre_logits"}, "without features"),
        ({"model": classifier.wrap(lambda images: images[:, 0, 0]), "layer": "pre_logits"}, "names no features"),
        ({"model": lambda images: jax.nn.softmax(images[:, 0, 0])}, "before the softmax"),
        ({"layer": "prelogits"}, "did you mean 'pre_logits'"),
        ({"attack": attacks.build("fmn", norm="linf")}, "no ball"),
        ({"norm": "l2"}, "both in one norm"),
        ({"attack": _attack(goal="targeted")}, "untargeted"),
        ({"epsilon": 0.0}, "positive"),
        ({"layer": "short", "inner": 60}, "give fewer"),
    ],
)
def test_what_cannot_be_tested_is_told(change, message):
    given = {"model": _model(), "attack": _attack(steps=1), "epsilon": EPSILON, "random_points": 1, **change}
    with pytest.raises(errors.UserError, match=message):
        attacks.planted(given.pop("model"), _images(1), given.pop("attack"), **given)
