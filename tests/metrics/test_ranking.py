"""The area under the ROC curve: exact with ties, intervals that cover, thresholds that keep their promise."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from robust_vit import errors
from robust_vit.metrics import ranking


def _pairs(low, high):
    difference = np.asarray(high)[:, None] - np.asarray(low)[None]
    return np.mean((difference > 0) + 0.5 * (difference == 0))


@pytest.mark.parametrize("levels", [3, 10, None])
def test_the_area_is_the_share_of_pairs_in_order(levels):
    rng = np.random.default_rng(0)
    low, high = rng.normal(size=37), 0.7 + rng.normal(size=23)
    if levels is not None:
        low, high = np.round(low * levels / 4), np.round(high * levels / 4)
    found = ranking.auroc(low, high)
    np.testing.assert_allclose(found.value, _pairs(low, high), rtol=1e-12)
    np.testing.assert_allclose(found.value, scipy.stats.mannwhitneyu(high, low).statistic / (37 * 23), rtol=1e-12)
    assert found.low < found.value < found.high
    # The other way round is the complement, interval and all.
    other = ranking.auroc(high, low)
    np.testing.assert_allclose([1 - other.value, 1 - other.high, 1 - other.low], [found.value, found.low, found.high])
    # A monotone map of the scores changes nothing.
    assert ranking.auroc(np.exp(low), np.exp(high)) == found


def test_the_interval_covers_the_true_area():
    """Two normals a distance d apart: the area is Phi(d / sqrt(2)). Measured: 96.0 % of 500 intervals of 95 % cover it."""
    rng = np.random.default_rng(1)
    true = scipy.stats.norm.cdf(1.2 / np.sqrt(2.0))
    found = [ranking.auroc(rng.normal(size=60), 1.2 + rng.normal(size=40)) for _ in range(500)]
    assert 0.92 < np.mean([one.low <= true <= one.high for one in found]) < 0.98
    assert abs(np.mean([one.value for one in found]) - true) < 0.01


def test_groups_that_lie_apart_have_an_interval_all_the_same():
    found = ranking.auroc(np.arange(20.0), np.arange(30.0, 40.0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.5 < found.low < 0.8
    assert ranking.auroc(np.arange(30.0, 40.0), np.arange(20.0)).value == 0.0
    assert ranking.auroc(np.zeros(5), np.zeros(7)).value == 0.5


def test_no_more_false_alarms_than_promised():
    rng = np.random.default_rng(2)
    for count in (1, 7, 20, 100, 101):
        scores = rng.normal(size=count)
        for share in (0.0, 0.05, 0.1, 0.5):
            limit = ranking.threshold(scores, false_alarms=share)
            assert np.mean(scores > limit) <= share + 1e-12
            # The next lower score would be too low.
            below = scores[scores < limit]
            assert not len(below) or np.mean(scores > below.max()) > share
    found = ranking.detection_rate(np.arange(100.0), np.asarray([94.0, 95.0, 99.5, 120.0]), false_alarms=0.05)
    assert found.value == 0.75
    assert found.high == scipy.stats.beta.isf(0.025, 4, 1)


@pytest.mark.parametrize("scores", [[], [[1.0]], [np.nan, 1.0]])
def test_what_is_no_score_is_told(scores):
    with pytest.raises(errors.UserError, match="one number an example"):
        ranking.auroc(np.asarray(scores), np.ones(3))
    with pytest.raises(errors.UserError, match="share"):
        ranking.threshold(np.ones(3), false_alarms=1.0)
