"""How well a score tells two groups apart: the area under the ROC curve, exact with ties, and the rate at a given false alarm."""

from __future__ import annotations

import numpy as np
import scipy.stats
from jaxtyping import Float

from robust_vit import errors
from robust_vit.metrics import statistics


def auroc(
    negatives: Float[np.ndarray, " negatives"],
    positives: Float[np.ndarray, " positives"],
    *,
    level: float = statistics.LEVEL,
    over: str = "images",
) -> statistics.Interval:
    """The chance that a positive scores higher than a negative, ties counted by half, with DeLong's interval.

    The interval is for two groups drawn apart (DeLong et al. 1988), on the logit of the area, so that it stays in [0, 1]. Where
    the scores are apart there is no variance to see, and it ends where Clopper and Pearson's would, of the smaller group.

    Args:
      negatives: scores of the group that should score low.
      positives: scores of the group that should score high.
      level: the nominal coverage.
      over: what was sampled.

    Raises:
      errors.UserError: an empty group, scores that are not numbers.
    """
    low, high = _checked(negatives), _checked(positives)
    ranks = scipy.stats.rankdata(np.concatenate([low, high]))
    # A group's share of the other that lies below (or above) each of its members: their mean is the area on either side.
    above = (ranks[len(low) :] - scipy.stats.rankdata(high)) / len(low)
    below = 1.0 - (ranks[: len(low)] - scipy.stats.rankdata(low)) / len(high)
    area = float(above.mean())
    if area in (0.0, 1.0):
        count = min(len(low), len(high))
        ends = statistics.proportion(round(area) * count, count, level=level)
        return statistics.Interval(area, ends.low, ends.high, level, "Clopper-Pearson of the smaller group", over)
    variance = sum(group.var(ddof=1) / len(group) if len(group) > 1 else 0.25 for group in (above, below))
    middle, spread = np.log(area / (1.0 - area)), np.sqrt(variance) / (area * (1.0 - area))
    quantile = scipy.stats.norm.ppf((1.0 + level) / 2.0)
    ends = [float(1.0 / (1.0 + np.exp(-(middle + sign * quantile * spread)))) for sign in (-1.0, 1.0)]
    return statistics.Interval(area, *ends, level, "DeLong on the logit", over)


def detection_rate(
    negatives: Float[np.ndarray, " negatives"],
    positives: Float[np.ndarray, " positives"],
    *,
    false_alarms: float = 0.05,
    over: str = "images",
) -> statistics.Interval:
    """Share of positives above the threshold that at most `false_alarms` of the negatives exceed.

    Clopper-Pearson's interval is over the positives alone: the threshold is taken as given.
    """
    chosen = threshold(negatives, false_alarms=false_alarms)
    high = _checked(positives)
    return statistics.proportion((high > chosen).sum(), len(high), over=over)


def threshold(negatives: Float[np.ndarray, " negatives"], *, false_alarms: float = 0.05) -> float:
    """The least of the scores that at most this share of the negatives exceeds."""
    if not 0.0 <= false_alarms < 1.0:
        raise errors.UserError(f"false_alarms is {false_alarms}: expected a share in [0, 1), for example 0.05.")
    low = np.sort(_checked(negatives))
    return float(low[len(low) - 1 - int(np.floor(false_alarms * len(low) + 1e-9))])


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise errors.UserError(
            f"scores have shape {scores.shape} or hold NaN: give one number an example, at least one."
        )
    return scores
