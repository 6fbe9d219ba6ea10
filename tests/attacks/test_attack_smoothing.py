"""Randomized smoothing: closed forms of a linear model, the largest radius, bounds that hold, draws of the row alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import smoothing

SHAPE = (3, 3, 2)
SIZE = int(np.prod(SHAPE))
TRACES = []


def halves(variables, images):
    """Two classes on either side of a hyperplane."""
    TRACES.append(None)
    score = images.reshape(images.shape[0], -1) @ variables["w"] + variables["b"]
    return jnp.stack([-score, score], axis=1)


def _model(seed: int = 0):
    weights = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)
    return classifier.wrap(halves, {"w": jnp.asarray(weights), "b": jnp.float32(-0.5 * weights.sum())})


def _images(count: int = 6, seed: int = 1):
    return np.random.default_rng(seed).uniform(0.3, 0.7, size=(count, *SHAPE)).astype(np.float32)


def _margins(model, images):
    weights = np.asarray(model.variables["w"], np.float64)
    score = images.reshape(len(images), -1).astype(np.float64) @ weights + float(model.variables["b"])
    return score / np.linalg.norm(weights)


OPTIONS = {"selection": 50, "estimation": 20_000, "chunk": 250}


def test_a_linear_model_is_certified_up_to_its_distance():
    """The smoothed model of a half-space is that half-space: R tends to the distance to the plane, from below."""
    model, images = _model(), _images()
    margins, sigma = _margins(model, images), 0.5
    assert np.abs(margins).max() < sigma  # No radius is cut off by the number of samples.
    found = smoothing.certify(model, images, sigma=sigma, **OPTIONS)
    proven = found.prediction != smoothing.ABSTAIN
    assert proven.sum() >= 4
    np.testing.assert_array_equal(found.prediction[proven], (margins > 0)[proven].astype(int))
    # The share of votes is binomial around Phi(margin / sigma); the bound lies some three standard deviations below it.
    share = scipy.stats.norm.cdf(np.abs(margins) / sigma)
    error = np.sqrt(share * (1 - share) / OPTIONS["estimation"])
    np.testing.assert_array_less(np.abs(found.votes / OPTIONS["estimation"] - share)[proven], 4.5 * error[proven])
    assert (found.radius <= np.abs(margins) + 1e-3).all()
    low = sigma * scipy.stats.norm.ppf(share - 7.5 * error)
    assert (found.radius >= low)[proven].all()


def test_the_gap_to_the_distance_closes_with_the_samples():
    model, images = _model(), _images()
    gaps = []
    for samples in (500, OPTIONS["estimation"]):
        found = smoothing.certify(model, images, sigma=0.5, **{**OPTIONS, "estimation": samples})
        gaps.append(np.mean(np.abs(_margins(model, images)) - found.radius))
    # As one over the square root of the samples: by about six for forty times as many.
    assert gaps[0] > 3.0 * gaps[1] > 0


@pytest.mark.parametrize(
    ("samples", "alpha", "expected"),
    [(100_000, 0.001, 3.8115), (1_000, 0.001, scipy.stats.norm.ppf(0.001**0.001)), (10, 0.05, None)],
)
def test_the_largest_radius_is_that_of_unanimous_votes(samples, alpha, expected):
    expected = scipy.stats.norm.ppf(alpha ** (1 / samples)) if expected is None else expected
    np.testing.assert_allclose(smoothing.largest_radius(samples, sigma=1.0, alpha=alpha), expected, atol=5e-5)
    np.testing.assert_allclose(smoothing.largest_radius(samples, sigma=0.25, alpha=alpha), 0.25 * expected, atol=5e-5)
    assert smoothing.certified_radius(samples - 1, samples, sigma=1.0, alpha=alpha) < expected


def test_every_vote_for_one_class_gives_the_largest_radius():
    model = _model()
    model = model.with_params({**model.params, "b": jnp.float32(1e3)})
    found = smoothing.certify(model, _images(), sigma=0.25, **{**OPTIONS, "estimation": 500})
    np.testing.assert_allclose(found.radius, smoothing.largest_radius(500, sigma=0.25), rtol=1e-12)
    assert (found.votes == 500).all()
    assert found.right(np.ones(6, int), radius=0.55).all()
    assert not found.right(np.ones(6, int), radius=0.56).any()
    assert not found.right(np.zeros(6, int)).any()


def test_the_bound_holds_as_often_as_it_says():
    """The one-sided bound lies above the true share in a share `alpha` of all samples at most (exactly, over the binomial)."""
    for share, samples, alpha in ((0.8, 60, 0.05), (0.55, 200, 0.01), (0.97, 100, 0.1)):
        votes = np.arange(samples + 1)
        radius = np.asarray([smoothing.certified_radius(k, samples, sigma=1.0, alpha=alpha) for k in votes])
        wrong = radius > scipy.stats.norm.ppf(share)
        assert scipy.stats.binom.pmf(votes, samples, share)[wrong].sum() <= alpha
        # And it is no looser than it has to be: one more vote would break it.
        first = int(np.argmax(wrong))
        assert scipy.stats.binom.sf(first - 2, samples, share) > alpha


def test_on_the_boundary_it_abstains():
    model, images = _model(), _images()
    weights = np.asarray(model.variables["w"])
    steps = _margins(model, images)[:, None] * weights / np.linalg.norm(weights)
    found = smoothing.certify(model, images - steps.reshape(images.shape).astype(np.float32), sigma=0.25, **OPTIONS)
    assert (found.prediction == smoothing.ABSTAIN).all()
    assert (found.radius == 0.0).all()


def test_predictions_follow_the_binomial_test_of_the_first_two():
    model, images = _model(), _images(seed=3)
    sigma, samples, alpha = 0.5, 500, 0.05
    found = smoothing.predict(model, images, sigma=sigma, samples=samples, alpha=alpha, chunk=250)
    votes = smoothing.certify(model, images, sigma=sigma, **{**OPTIONS, "estimation": samples})
    counts = np.maximum(votes.votes, samples - votes.votes)
    sure = np.asarray([scipy.stats.binomtest(int(c), samples, 0.5).pvalue <= alpha for c in counts])
    np.testing.assert_array_equal(found != smoothing.ABSTAIN, sure)
    assert 0 < sure.sum() < 6
    np.testing.assert_array_equal(found[sure], (_margins(model, images) > 0)[sure])


def test_no_attack_breaks_what_is_proven():
    """PGD in L2 on the smoothed model: within the certified radius it finds nothing, a little beyond the plane it does."""
    model, images = _model(), _images()
    found, margins = smoothing.certify(model, images, sigma=0.5, **OPTIONS), np.abs(_margins(model, images))
    smoothed = smoothing.smooth(model, sigma=0.5, samples=512)
    keys = attacks.example_keys(0, np.arange(len(images)))
    attack = attacks.build("pgd", epsilon=1.0, norm="l2", steps=10, random_start=False, stop_on_success=False)
    clear = np.flatnonzero(margins > 0.1)
    assert len(clear) >= 3
    for radii, breaks in ((found.radius, False), (1.5 * margins, True)):
        for row in clear:
            result = attack.replace(epsilon=np.float32(radii[row]))(smoothed, keys, images, found.guess)
            # The smoothed model of a half-space is that half-space, so its answer needs no votes.
            side = _margins(model, np.asarray(result.images))[row] > 0
            assert (side != found.guess[row]) == breaks


def test_the_noise_is_of_the_row_and_the_chunk_alone():
    model, images = _model(), _images(5)
    rows = np.asarray([7, 3, 11, 2, 5])
    options = {"sigma": 0.5, "selection": 40, "estimation": 730, "chunk": 100}
    whole = smoothing.certify(model, images, rows=rows, **options)
    order = np.asarray([4, 2, 0, 1, 3])
    shuffled = smoothing.certify(model, images[order], rows=rows[order], **options)
    np.testing.assert_array_equal(shuffled.votes, whole.votes[order])
    alone = smoothing.certify(model, images[2:3], rows=rows[2:3], **options)
    assert alone.votes[0] == whole.votes[2]
    other = smoothing.certify(model, images, rows=rows, seed=1, **options)
    assert (other.votes != whole.votes).any()
    # More samples are the same ones and others: a chunk's noise does not depend on how many there are.
    fewer = smoothing.certify(model, images, rows=rows, **{**options, "estimation": 700})
    assert ((whole.votes - fewer.votes >= 0) & (whole.votes - fewer.votes <= 30)).all()


def test_one_trace_for_all_sigmas_and_weights():
    options = {"selection": 20, "estimation": 60, "chunk": 20}
    smoothing.certify(_model(), _images(2), sigma=0.1, **options)
    before = len(TRACES)
    smoothing.certify(_model(4), _images(2, seed=8), sigma=0.7, seed=3, **options)
    assert len(TRACES) == before


def unsteady(images):
    return jnp.stack([jnp.log(images[:, 0, 0, 0]), images[:, 0, 0, 1]], axis=1)


def random(images, keys):
    return images[:, 0, 0] + jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "positive"),
        ({"alpha": 0.5}, r"\(0, 0.5\)"),
        ({"chunk": 0}, "chunk is 0"),
        ({"estimation": 0}, "estimation is 0"),
        ({"images": 255.0 * _images(2)}, "divide by 255"),
        ({"model": classifier.wrap(unsteady)}, "NaN or infinite"),
        ({"model": classifier.wrap(random, stochastic=True)}, "draws itself"),
    ],
)
def test_what_cannot_be_certified_is_told(change, message):
    given = {
        "model": _model(),
        "images": _images(2),
        "sigma": 0.5,
        "selection": 10,
        "estimation": 20,
        "chunk": 10,
        **change,
    }
    with pytest.raises(errors.UserError, match=message):
        smoothing.certify(given.pop("model"), given.pop("images"), **given)
