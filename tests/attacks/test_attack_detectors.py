"""Detectors: closed forms of their scores, and attacks that do not know of them against those that do."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial.distance

from robust_vit import attacks, classifier, errors, losses
from robust_vit.attacks import detectors
from robust_vit.metrics import ranking

SHAPE = (3, 3, 2)
SIZE = int(np.prod(SHAPE))
FREE = 6  # Pixels that vary among clean images; the others hardly do.
EPSILON = 0.12


class Flat(flax.struct.PyTreeNode):
    """A linear model whose features are its pixels."""

    weights: jax.Array

    def __call__(self, images):
        return self.features(images)[0]

    def features(self, images, gates=None):
        flat = images.reshape(images.shape[0], -1)
        score = (flat - 0.5) @ self.weights
        return 8.0 * jnp.stack([-score, score], axis=1), {"pre_logits": flat}


@pytest.fixture(scope="module")
def model():
    return Flat(jnp.ones(SIZE, jnp.float32))


def clean(count, seed):
    """Two classes that differ, and vary, in the free pixels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    noise = np.where(np.arange(SIZE) < FREE, 0.06, 0.002) * rng.normal(size=(count, SIZE))
    flat = 0.5 + np.where(np.arange(SIZE) < FREE, (2 * labels[:, None] - 1) * 0.05, 0.0) + noise
    return flat.reshape(count, *SHAPE).astype(np.float32), labels


@jax.jit
def scored(detector, images):
    return detector.scores(images)


def test_mahalanobis_is_the_distance_to_the_nearest_mean(model):
    images, labels = clean(400, 0)
    detector = detectors.fit("mahalanobis", model, images, labels, ridge=1e-9, batch=128)
    flat = images.reshape(400, -1).astype(np.float64)
    means = np.stack([flat[labels == label].mean(axis=0) for label in (0, 1)])
    centred = flat - means[labels]
    inverse = np.linalg.inv(centred.T @ centred / 400)
    others = clean(20, 1)[0]
    expected = scipy.spatial.distance.cdist(others.reshape(20, -1), means, "mahalanobis", VI=inverse).min(axis=1) ** 2
    np.testing.assert_allclose(scored(detector, others), expected, rtol=2e-3)
    # In the model's own features the squared distance is chi-squared with as many degrees of freedom as there are pixels.
    assert abs(np.asarray(scored(detector, clean(400, 2)[0])).mean() / SIZE - 1) < 0.15


def test_mahalanobis_of_few_images_is_finite(model):
    images, labels = clean(8, 0)
    found = np.asarray(scored(detectors.fit("mahalanobis", model, images, labels), clean(5, 1)[0]))
    assert np.isfinite(found).all()
    assert (found >= 0).all()


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_the_local_dimension_is_that_of_the_manifold(model, dimension):
    """Uniform in a cube of that dimension: the maximum-likelihood estimate is right up to the cube's edges."""
    rng = np.random.default_rng(3)

    def draw(count, low, high):
        flat = np.full((count, SIZE), 0.5)
        flat[:, :dimension] = rng.uniform(low, high, (count, dimension))
        return flat.reshape(count, *SHAPE).astype(np.float32)

    detector = detectors.fit("local_dimension", model, draw(3000, 0.0, 1.0), neighbours=50)
    # (k - 1) / (k - 2) is the estimator's bias; 0.15 is four standard errors of the mean of 60, neighbours shared.
    found = np.asarray(scored(detector, draw(60, 0.3, 0.7))).mean()
    assert abs(found / dimension - 1) < 0.15


def test_an_image_of_the_bank_does_not_count_itself_as_infinitely_near(model):
    images, _ = clean(60, 0)
    found = np.asarray(scored(detectors.fit("local_dimension", model, images, neighbours=5), images))
    assert np.isfinite(found).all()
    assert (found > 0).all()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_median_is_scipys(window):
    images = np.random.default_rng(4).uniform(size=(3, 5, 6, 2)).astype(np.float32)
    expected = scipy.ndimage.median_filter(images, size=(1, window, window, 1), mode="reflect")
    np.testing.assert_array_equal(jax.jit(detectors.median, static_argnums=1)(images, window), expected)


def test_bits_are_rounded_and_gradients_pass():
    images = np.random.default_rng(5).uniform(size=(2, 4, 4, 1)).astype(np.float32)
    np.testing.assert_allclose(detectors.round_bits(jnp.asarray(images), 3), np.round(images * 7) / 7, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(detectors.round_bits(x, 3) ** 2))(jnp.asarray(images))
    np.testing.assert_allclose(gradient, 2 * np.round(images * 7) / 7, atol=1e-6)


def _probabilities(model, images):
    logits = np.asarray(model(jnp.asarray(images)), np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_squeezing_is_the_largest_change_of_the_probabilities(model):
    images, _ = clean(6, 0)
    found = scored(detectors.fit("squeezing", model, images, bits=2, window=3), images)
    squeezed = [
        np.round(images * 3) / 3,
        scipy.ndimage.median_filter(images, size=(1, 3, 3, 1), mode="reflect"),
    ]
    plain = _probabilities(model, images)
    changes = [np.abs(plain - _probabilities(model, other)).sum(axis=1) for other in squeezed]
    np.testing.assert_allclose(found, np.max(changes, axis=0), atol=1e-5)


@pytest.mark.parametrize("name", detectors.DETECTORS)
def test_every_detector_can_be_differentiated(model, name):
    images, labels = clean(120, 0)
    detector = detectors.fit(name, model, images, labels)
    others = clean(8, 1)[0]
    gradient = jax.jit(jax.grad(lambda x, d: jnp.sum(d.scores(x))))(others, detector)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).sum(axis=(1, 2, 3)) > 0).all()


def test_an_attack_that_knows_the_detector_evades_it(model):
    """PGD moves all pixels and is seen; the adaptive attack stays among those that vary anyway (measured: 100 %, area 0.79)."""
    images, labels = clean(400, 0)
    detector = detectors.fit("mahalanobis", model, images, labels)
    held_out, truth = clean(100, 1)
    right = np.asarray(model(jnp.asarray(held_out))).argmax(axis=1) == truth
    held_out, truth = held_out[right], truth[right]
    scores = np.asarray(scored(detector, held_out))
    guarded = detectors.guard(detector, scores, false_alarms=0.05)
    keys = attacks.example_keys(0, np.arange(len(truth)))
    plain = attacks.build("pgd", epsilon=EPSILON, steps=20, loss="margin")(model, keys, held_out, truth)
    adaptive = attacks.build("apgd", epsilon=EPSILON, loss=detectors.evasion, goal=detectors.evade(2))
    adaptive = adaptive(guarded, keys, held_out, truth)
    broken = np.asarray(plain.success)
    assert broken.mean() > 0.95
    seen = {
        name: np.asarray(scored(detector, np.asarray(r.images)))
        for name, r in (("plain", plain), ("adaptive", adaptive))
    }
    assert ranking.auroc(scores, seen["plain"][broken]).value > 0.99
    assert ranking.detection_rate(scores, seen["plain"][broken]).value > 0.95
    evaded = np.asarray(adaptive.success)
    assert evaded.mean() > 0.9
    # What evades has another class, no alarm, and an area near a half; and lies in the same ball.
    assert (np.asarray(model(adaptive.images)).argmax(axis=1) != truth)[evaded].all()
    assert (seen["adaptive"][evaded] <= float(guarded.threshold) * (1 + 1e-5)).all()
    assert ranking.auroc(scores, seen["adaptive"][evaded]).value < 0.9
    assert np.abs(np.asarray(adaptive.images) - held_out).max() <= EPSILON * (1 + 1e-5)
    # The attack that does not know of it evades far less often.
    unaware = guarded(plain.images)
    assert np.mean(np.asarray(unaware).argmax(axis=1) == 2) > 0.95


# Measured areas of the plain and the adaptive attack: 1.000 and 0.369; 0.995 and 0.597; 0.899 and 0.165.
ADAPTIVE = {
    "mahalanobis": ({}, 0.99, 0.5),
    "local_dimension": ({"neighbours": 100}, 0.98, 0.7),
    "squeezing": ({"bits": 4}, 0.85, 0.3),
}


@pytest.mark.parametrize("name", detectors.DETECTORS)
def test_every_detector_is_scored_against_attacks_that_know_of_it(model, name):
    options, least, most = ADAPTIVE[name]
    detector = detectors.fit(name, model, *clean(400, 0), **options)
    images, labels = clean(150, 1)
    found = attacks.evaluate_detector(detector, images, labels, epsilon=0.06, steps=40, rows=np.arange(150) + 7)
    right = np.asarray(model(jnp.asarray(images))).argmax(axis=1) == labels
    np.testing.assert_array_equal(found.row, np.flatnonzero(right) + 7)
    np.testing.assert_array_equal(found.label, labels[right])
    np.testing.assert_allclose(found.clean, scored(detector, images[right]), rtol=1e-4)
    assert found.misled.all()
    assert found.area("plain").value > least
    assert found.area("adaptive").value < most
    # Who knows of the detector knows the plain attack too.
    assert (found.adaptive <= found.plain).all()
    # The numbers are those of the rows.
    area = ranking.auroc(found.clean, found.adaptive[found.misled[:, 1]])
    assert found.area("adaptive") == area
    evaded = found.misled[:, 1] & (found.adaptive <= found.threshold)
    assert found.evaded("adaptive").value == evaded.mean() > 0.6
    assert np.mean(found.clean > found.threshold) <= 0.05
    assert set(found.records()) >= {"row", "label", "clean", "plain", "adaptive", "misled"}
    assert [row[:2] for row in found.table(name).rows] == [(name, "plain"), (name, "adaptive")]


def test_a_detector_of_a_model_that_misleads_nobody_has_no_area():
    found = attacks.DetectorResult(
        row=np.arange(3),
        label=np.zeros(3, int),
        clean=np.asarray([0.0, 1.0, 2.0]),
        plain=np.asarray([3.0, 0.5, 9.0]),
        adaptive=np.zeros(3),
        misled=np.asarray([[True, False], [False, False], [True, False]]),
        threshold=2.0,
        false_alarms=0.05,
        forward_passes=np.ones(3, int),
        backward_passes=np.ones(3, int),
    )
    assert found.area("plain").value == 1.0
    assert found.area("adaptive") is None
    assert found.evaded("plain").value == 0.0
    assert str(found.table().rows[1][3]) == "None"
    with pytest.raises(errors.UserError, match="did you mean 'adaptive'"):
        found.area("adaptve")


def test_a_half_precision_detector_is_judged_in_float32():
    """The twin of a guarded model holds no half precision, in its detector neither."""
    low, high = _half("bfloat16"), _half("float32")
    images, labels = clean(40, 0)
    detector = detectors.fit("mahalanobis", low, images, labels)
    guarded = detectors.guard(detector, np.asarray(scored(detector, images)))
    twin = classifier.in_float32(guarded)
    assert twin.model.module.dtype == twin.detector.model.module.dtype == "float32"
    np.testing.assert_array_equal(
        twin(images), guarded.replace(model=high, detector=detector.replace(model=high))(images)
    )
    assert classifier.in_float32({"a": (low, 1.0), "b": [high]})["a"][0].module.dtype == "float32"


class _Dense(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, images, *, gates=None):
        x = images.reshape(images.shape[0], -1)
        return nn.Dense(2, dtype=self.dtype)(x).astype(jnp.float32), {"pre_logits": x.astype(self.dtype)}


def _half(dtype):
    spec = classifier.ImageSpec(SHAPE[:2], 2, mean=(0.5,), std=(0.5,))
    return classifier.Classifier(_Dense(dtype).init(jax.random.key(0), jnp.zeros((1, *SHAPE))), _Dense(dtype), spec)


def test_the_evasion_loss_is_positive_just_where_the_goal_is_reached():
    rng = np.random.default_rng(6)
    logits, excess = rng.normal(size=(500, 4)), rng.normal(size=500)
    outputs = jnp.asarray(np.concatenate([logits, logits.max(axis=1, keepdims=True) + excess[:, None]], 1), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, 500), jnp.int32)
    reached = detectors.evade(4).achieved(jnp.argmax(outputs, axis=1), labels)
    loss = np.asarray(detectors.evasion(outputs, labels))
    margin = np.asarray(losses.margin(jnp.asarray(logits, jnp.float32), labels))
    np.testing.assert_allclose(loss, margin - np.maximum(excess, 0.0), atol=1e-5)
    assert np.asarray(reached)[loss > 0][excess[loss > 0] < 0].all()
    np.testing.assert_array_equal(reached, (margin > 0) & (excess < 0))


def test_stealth_rises_as_the_score_falls_once_the_class_is_won():
    rng = np.random.default_rng(7)
    logits, excess = rng.normal(size=(500, 4)), rng.normal(size=500)
    outputs = np.concatenate([logits, logits.max(axis=1, keepdims=True) + excess[:, None]], 1).astype(np.float32)
    labels = jnp.asarray(rng.integers(0, 4, 500), jnp.int32)
    margin = np.asarray(losses.margin(jnp.asarray(logits, jnp.float32), labels))
    found = np.asarray(detectors.stealth(jnp.asarray(outputs), labels))
    np.testing.assert_allclose(found, np.where(margin > 0, -excess, margin - np.maximum(excess, 0.0)), atol=1e-5)
    np.testing.assert_array_equal(found > 0, (margin > 0) & (excess < 0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mahalanobs", {}, "mahalanobis"),
        ("mahalanobis", {"labels": None}, "give labels"),
        ("mahalanobis", {"labels": np.full(30, -1)}, "from -1 to -1"),
        ("local_dimension", {"model": Flat(jnp.full(SIZE, jnp.nan))}, "NaN or infinite"),
        ("mahalanobis", {"layer": "prelogits"}, "pre_logits"),
        ("mahalanobis", {"model": classifier.wrap(lambda images: images[:, 0, 0])}, "names no features"),
        ("local_dimension", {"neighbours": 500}, "fewer neighbours"),
        ("squeezing", {"bits": 0}, "bits is 0"),
        ("squeezing", {"bit": 3}, "did you mean 'bits'"),
    ],
)
def test_what_cannot_be_fitted_is_told(model, name, options, message):
    images, labels = clean(30, 0)
    given = {"model": model, "images": images, "labels": labels, **options}
    with pytest.raises(errors.UserError, match=message):
        detectors.fit(name, given.pop("model"), given.pop("images"), given.pop("labels"), **given)
