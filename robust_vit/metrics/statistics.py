"""Intervals and tests for what a study reports. Each result names what it is over: images, seeds, draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Real

from robust_vit import errors, tables

LEVEL = 0.95
DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    Attributes:
      value: the estimate.
      low: lower end.
      high: upper end.
      level: the nominal coverage.
      method: how the interval was made.
      over: what was sampled, for example "images".
    """

    value: float
    low: float
    high: float
    level: float
    method: str
    over: str

    def number(self, format: str = ".3f") -> tables.Number:
        """The interval as a table's cell."""
        return tables.Number(self.value, self.low, self.high, self.over, format)


@dataclasses.dataclass(frozen=True)
class Test:
    """A hypothesis test.

    Attributes:
      statistic: what the p-value was computed from.
      p_value: two-sided unless `method` says otherwise.
      method: the test's name.
      over: what was sampled.
    """

    __test__ = False  # Not a test case of pytest, for all its name.

    statistic: float
    p_value: float
    method: str
    over: str


def proportion(successes: int, trials: int, *, level: float = LEVEL, over: str = "images") -> Interval:
    """Share of successes with the exact binomial interval, which covers at least `level` (Clopper & Pearson 1934)."""
    successes, trials = int(successes), int(trials)
    if not 0 <= successes <= trials or trials == 0:
        raise errors.UserError(f"{successes} successes in {trials} trials: give 0 <= successes <= trials, trials > 0.")
    tail = (1.0 - level) / 2.0
    low = 0.0 if successes == 0 else float(scipy.stats.beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(scipy.stats.beta.isf(tail, successes + 1, trials - successes))
    return Interval(successes / trials, low, high, level, "Clopper-Pearson", over)


def mean(
    values: Real[np.ndarray, " examples"],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
    over: str = "images",
) -> Interval:
    """Mean with a percentile bootstrap interval (Efron 1979). The draws are a function of `seed` alone."""
    values = _checked(values)
    generator = np.random.default_rng(seed)
    # One draw at a time: a [draws, examples] array of indices would not fit for a large test set.
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return _percentile(float(values.mean()), np.asarray(means), level, "percentile bootstrap", over)


def bootstrap(
    statistic: Callable[..., float],
    *arrays: np.ndarray,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
    over: str = "images",
    pivotal: bool = False,
) -> Interval:
    """Any statistic with a bootstrap interval; all arrays are resampled by the same rows (paired).

    Args:
      statistic: `statistic(*arrays) -> number`.
      *arrays: equal leading lengths: one row an example.
      draws: how many resamples, each one evaluation of the statistic.
      level: the nominal coverage.
      seed: of the draws.
      over: what a row is.
      pivotal: reflect the percentiles about the estimate (the "basic" interval). For a statistic that resampling
        biases, as it does a calibration error: the resamples lie above the estimate, so their percentiles miss it.
    """
    length = len(arrays[0])
    if length == 0 or any(len(array) != length for array in arrays):
        raise errors.UserError(f"arrays have lengths {[len(array) for array in arrays]}: give equal, positive lengths.")
    generator = np.random.default_rng(seed)
    replicates = np.empty(draws)
    for draw in range(draws):
        rows = generator.integers(0, length, length)
        replicates[draw] = statistic(*(array[rows] for array in arrays))
    value = float(statistic(*arrays))
    if pivotal:
        return _percentile(value, 2.0 * value - replicates, level, "pivotal bootstrap", over)
    return _percentile(value, replicates, level, "percentile bootstrap", over)


def paired_difference(
    first: Real[np.ndarray, " examples"],
    second: Real[np.ndarray, " examples"],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
    over: str = "images",
) -> Interval:
    """Mean of `second - first`, row by row, with a paired percentile bootstrap interval."""
    first, second = _pair(first, second)
    found = mean(second - first, draws=draws, level=level, seed=seed, over=over)
    return dataclasses.replace(found, method="paired percentile bootstrap")


def hierarchical_difference(
    first: Float[np.ndarray, "seeds examples"],
    second: Float[np.ndarray, "other_seeds examples"],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Mean of `second - first` over seeds and images, with a bootstrap that resamples both.

    Each draw resamples the seeds of each model, and the images once for all of them: every seed was judged on the same
    images, so an image's difficulty does not average out over seeds (the pigeonhole bootstrap, Owen 2007, arXiv
    0712.1111). With fewer than five seeds the seeds' part of the interval is too narrow.

    Args:
      first: one row a seed of the first model, one column an image.
      second: the same images under the second model.
    """
    first, second = (np.atleast_2d(np.asarray(array, np.float64)) for array in (first, second))
    if first.shape[1] != second.shape[1] or first.size == 0 or second.size == 0:
        raise errors.UserError(
            f"values have shapes {first.shape} and {second.shape}: give [seeds, examples] over the same examples."
        )
    generator = np.random.default_rng(seed)
    examples = first.shape[1]
    replicates = np.empty(draws)
    for draw in range(draws):
        images = generator.integers(0, examples, examples)
        means = []
        for values in (first, second):
            seeds = generator.integers(0, len(values), len(values))
            means.append(values[:, images].mean(axis=1)[seeds].mean())
        replicates[draw] = means[1] - means[0]
    over = "seeds and images" if max(len(first), len(second)) > 1 else "images"
    return _percentile(float(second.mean() - first.mean()), replicates, level, "hierarchical bootstrap", over)


def mcnemar(first: Bool[np.ndarray, " examples"], second: Bool[np.ndarray, " examples"]) -> Test:
    """Exact two-sided test that two models are right equally often on the same images (McNemar 1947).

    The statistic is the number of images that only `second` gets right, minus those that only `first` does.
    """
    first, second = _pair(np.asarray(first, bool), np.asarray(second, bool))
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(~first & second))
    discordant = only_first + only_second
    p_value = scipy.stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    return Test(float(only_second - only_first), float(p_value), "exact McNemar", "images")


def sign_flip(
    first: Real[np.ndarray, " examples"],
    second: Real[np.ndarray, " examples"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    over: str = "images",
) -> Test:
    """Two-sided permutation test that paired differences have mean zero: signs flipped at random (Fisher 1935).

    The p-value counts the observed sample among the draws, so it is never zero and never too small.
    """
    first, second = _pair(first, second)
    difference = second - first
    observed = abs(difference.mean())
    generator = np.random.default_rng(seed)
    exceed = sum(
        abs(np.mean(difference * generator.choice((-1.0, 1.0), len(difference)))) >= observed * (1.0 - 1e-12)
        for _ in range(draws)
    )
    return Test(float(difference.mean()), float((exceed + 1) / (draws + 1)), "paired sign-flip permutation", over)


def swap(
    statistic: Callable[..., float],
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Test:
    """Two-sided permutation test of a difference of any statistic: the two models' rows are swapped at random.

    Args:
      statistic: `statistic(*arrays) -> number`, for one model.
      first: the first model's arrays, one row an image.
      second: the second model's arrays, the same images.
      draws: how many random swaps.
      seed: of the swaps.
    """
    first, second = [np.asarray(array) for array in first], [np.asarray(array) for array in second]
    observed = statistic(*second) - statistic(*first)
    generator = np.random.default_rng(seed)
    exceed = 0
    for _ in range(draws):
        swapped = generator.random(len(first[0])) < 0.5
        left = [np.where(swapped, b, a) for a, b in zip(first, second, strict=True)]
        right = [np.where(swapped, a, b) for a, b in zip(first, second, strict=True)]
        exceed += abs(statistic(*right) - statistic(*left)) >= abs(observed) - 1e-12
    return Test(float(observed), float((exceed + 1) / (draws + 1)), "paired swap permutation", "images")


def equivalence(
    first: Real[np.ndarray, " examples"], second: Real[np.ndarray, " examples"], *, margin: float, over: str = "images"
) -> Test:
    """Two one-sided t tests that the mean paired difference lies within `margin` of zero (TOST, Schuirmann 1987).

    A small p-value shows equivalence; a large one shows nothing. The statistic is the mean difference.
    """
    if margin <= 0:
        raise errors.UserError(f"margin is {margin}: give a positive difference that would not matter.")
    first, second = _pair(first, second)
    difference = second - first
    if len(difference) < 2:
        raise errors.UserError("one paired example: equivalence needs at least two.")
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    center = float(difference.mean())
    if error == 0.0:
        return Test(center, 0.0 if abs(center) < margin else 1.0, "TOST, paired t", over)
    freedom = len(difference) - 1
    below = scipy.stats.t.sf((center + margin) / error, freedom)
    above = scipy.stats.t.cdf((center - margin) / error, freedom)
    return Test(center, float(max(below, above)), "TOST, paired t", over)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values adjusted for the size of their family, in the given order (Holm 1979).

    Rejecting what is below alpha keeps the chance of any false rejection below alpha. NaN entries (tests that could
    not be made) stay NaN and do not count in the family.
    """
    given = np.asarray(p_values, np.float64)
    adjusted = np.full(given.shape, np.nan)
    valid = np.flatnonzero(~np.isnan(given))
    order = valid[np.argsort(given[valid], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


def _percentile(value: float, replicates: np.ndarray, level: float, method: str, over: str) -> Interval:
    low, high = np.quantile(replicates, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(value, float(low), float(high), level, method, over)


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise errors.UserError(f"values have shape {values.shape}: give one number an example, at least one.")
    return values


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise errors.UserError(
            f"paired values have shapes {first.shape} and {second.shape}: give one number an example, the same examples."
        )
    if first.dtype == bool and second.dtype == bool:
        return first, second
    return first.astype(np.float64), second.astype(np.float64)
