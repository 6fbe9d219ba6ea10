"""How far a classifier's confidence is from its accuracy.

Everything takes `confidences` (probability of the predicted class) and `correct` (whether the prediction is right), one
an example, on the host in float64. The plug-in calibration error is biased upwards: a perfectly calibrated model has a
positive one, the more so the fewer the images and the more the bins. Hence the debiased estimates and `consistency`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import scipy.fft
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float, Int

from robust_vit import errors
from robust_vit.metrics import classification, statistics

Binning = Literal["width", "mass"]

_GRID = 4096  # Cells of [0, 1] for the smooth error: 3e-11 from direct quadrature on the case of tests/metrics.
_TEMPERATURES = (1e-2, 1e2)


@dataclasses.dataclass(frozen=True)
class Reliability:
    """A reliability diagram's data: one entry a bin; an empty bin's means are NaN, not its midpoint.

    Attributes:
      edges: `[bins + 1]`; bin i is (edges[i], edges[i + 1]], and a confidence of 0 falls into the first.
      counts: examples a bin.
      accuracy: share of right predictions a bin.
      confidence: mean confidence a bin.
    """

    edges: Float[np.ndarray, " edges"]
    counts: Int[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]

    @property
    def weights(self) -> Float[np.ndarray, " bins"]:
        """Share of all examples a bin."""
        return self.counts / self.counts.sum()

    @property
    def gaps(self) -> Float[np.ndarray, " bins"]:
        """Accuracy minus mean confidence; 0 for an empty bin, whose weight is 0."""
        return np.where(self.counts > 0, self.accuracy - self.confidence, 0.0)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Attributes:
      value: divides the logits; above 1 the model was over-confident.
      before: mean negative log-likelihood in nats at temperature 1, on the data of the fit.
      after: the same at the fitted temperature.
      at_bound: the optimum lies outside the interval searched (every example right, or worse than chance).
    """

    value: float
    before: float
    after: float
    at_bound: bool


def reliability(
    confidences: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    *,
    bins: int = 10,
    binning: Binning = "width",
) -> Reliability:
    """Accuracy and mean confidence by bin of confidence.

    Args:
      confidences: in [0, 1].
      correct: whether each prediction is right.
      bins: how many; Kim et al. 2022 (arXiv 2210.05742) and Park & Kim 2022 use 10, Guo et al. 2017 use 15.
      binning: "width" for equal intervals (lo, hi] of [0, 1]; "mass" for quantiles of the confidences, where equal
        confidences share a bin, so that the order of the examples does not matter.
    """
    confidences, correct = _checked(confidences, correct)
    if bins < 1:
        raise errors.UserError(f"bins is {bins}: give at least 1.")
    if binning == "width":
        edges = np.linspace(0.0, 1.0, bins + 1)
    elif binning == "mass":
        edges = np.quantile(confidences, np.linspace(0.0, 1.0, bins + 1), method="inverted_cdf")
        edges[0], edges[-1] = 0.0, 1.0
    else:
        raise errors.unknown("binning", binning, ("width", "mass"))
    # Searching the edges, because ceil(confidence * bins) puts 0.7 into (0.7, 0.8] by rounding.
    index = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(index, weights=correct, minlength=bins) / counts
        confidence = np.bincount(index, weights=confidences, minlength=bins) / counts
    return Reliability(edges, counts, accuracy, confidence)


def expected_error(
    confidences: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    *,
    bins: int = 10,
    binning: Binning = "width",
) -> float:
    """Plug-in expected calibration error, Σ w |accuracy − confidence| over bins (Naeini et al. 2015; Guo et al. 2017).

    With `binning="mass"` it is the adaptive error (Nguyen & O'Connor 2015, arXiv 1508.05154; Nixon et al. 2019, arXiv
    1904.01685).
    """
    diagram = reliability(confidences, correct, bins=bins, binning=binning)
    return float(np.sum(diagram.weights * np.abs(diagram.gaps)))


def debiased_error(
    confidences: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    *,
    bins: int = 10,
    binning: Binning = "width",
) -> float:
    """Expected calibration error with the plug-in's upward bias taken off, and not below 0.

    Each bin's accuracy is taken as normal around its estimate with variance a(1 − a)/n; the bias of |a − c| is then the
    folded normal's mean minus |a − c| (Kumar et al. 2019, arXiv 1909.10155, section 4, there by simulation; here in
    closed form).
    """
    diagram = reliability(confidences, correct, bins=bins, binning=binning)
    gaps, deviation, weights = _noisy_gaps(diagram)
    gaps = np.abs(gaps)
    folded = deviation * math.sqrt(2.0 / math.pi) * np.exp(-0.5 * (gaps / deviation) ** 2) + gaps * (
        1.0 - 2.0 * scipy.special.ndtr(-gaps / deviation)
    )
    return float(max(np.sum(weights * (2.0 * gaps - folded)), 0.0))


def debiased_squared_error(
    confidences: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    *,
    bins: int = 10,
    binning: Binning = "width",
) -> float:
    """Σ w [(a − c)² − a(1 − a)/(n − 1)] over bins: an unbiased estimate of the squared calibration error of the bins.

    It may be negative, as an unbiased estimate of zero must be half of the time. Bins of one example have no variance
    estimate and are left out (Bröcker 2012; Kumar et al. 2019, arXiv 1909.10155, definition 4.1).
    """
    diagram = reliability(confidences, correct, bins=bins, binning=binning)
    filled = diagram.counts > 1
    accuracy, counts = diagram.accuracy[filled], diagram.counts[filled]
    terms = diagram.gaps[filled] ** 2 - accuracy * (1.0 - accuracy) / (counts - 1.0)
    return float(np.sum(counts * terms) / max(np.sum(counts), 1))


def error_interval(
    confidences: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    *,
    bins: int = 10,
    binning: Binning = "width",
    draws: int = 500,
    level: float = statistics.LEVEL,
    seed: int = 0,
) -> statistics.Interval:
    """Median-unbiased expected calibration error with an interval, by inverting a test; no bootstrap covers near zero.

    Suppose that the true gaps of the bins are the observed ones times a factor: the plug-in error then has a known
    distribution (each gap normal with variance a(1 − a)/n). The interval holds the errors under which the observed
    plug-in is not extreme, the estimate is the one under which it is the median. Factor 0 is perfect calibration, so the
    interval reaches 0 just where such a test does not reject.

    Measured coverage of the 95 % interval over 7 kinds of miscalibration and 200 to 5,000 images: 0.86 to 0.99, mean 0.94
    (percentile bootstrap of the debiased error: 0.20 to 0.99, its pivotal form 0.73 to 0.97).
    """
    diagram = reliability(confidences, correct, bins=bins, binning=binning)
    gaps, deviation, weights = _noisy_gaps(diagram)
    noise = deviation * np.random.default_rng(seed).normal(size=(draws, len(gaps)))
    observed = float(weights @ np.abs(gaps))

    def solve(quantile: float) -> float:
        def excess(factor: float) -> float:
            return float(np.quantile(np.abs(factor * gaps + noise) @ weights, quantile)) - observed

        if observed == 0.0 or excess(0.0) >= 0.0:
            return 0.0
        factor = 1.0
        while excess(factor) < 0.0:
            factor *= 1.5
        return observed * float(scipy.optimize.brentq(excess, 0.0, factor, xtol=1e-6))

    low, high = solve((1.0 + level) / 2.0), solve((1.0 - level) / 2.0)
    return statistics.Interval(solve(0.5), low, high, level, "test inversion", "images")


def signed_error(
    confidences: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    *,
    bins: int = 10,
    binning: Binning = "width",
    sign: Literal["kim", "park"] = "kim",
) -> float:
    """Signed calibration error: Σ w (accuracy − confidence), which is accuracy minus mean confidence for any binning.

    Args:
      confidences: in [0, 1].
      correct: whether each prediction is right.
      bins: has no influence on the result; a test holds it to that.
      binning: neither has this.
      sign: "kim" is accuracy − confidence, positive where under-confident (Kim et al. 2022, sECE); "park" is confidence
        − accuracy, positive where over-confident (Park & Kim 2022, ECSE).
    """
    if sign not in ("kim", "park"):
        raise errors.unknown("sign", sign, ("kim", "park"))
    diagram = reliability(confidences, correct, bins=bins, binning=binning)
    total = float(np.sum(diagram.weights * diagram.gaps))
    return total if sign == "kim" else -total


def smooth_error(confidences: Float[np.ndarray, " examples"], correct: Bool[np.ndarray, " examples"]) -> float:
    """Smooth calibration error: no bins and no free bandwidth (Błasiok & Nakkiran 2023, arXiv 2309.12236).

    The residuals `correct − confidence` are smoothed over confidence by a Gaussian kernel of width σ, reflected at 0 and
    1; the result is the integral of their absolute value at the one σ that equals it. The reflected kernel is diagonal
    in the cosine basis, so each σ costs one discrete cosine transform of a grid of 4,096 cells.
    """
    confidences, correct = _checked(confidences, correct)
    position = confidences * _GRID - 0.5
    below = np.floor(position).astype(np.int64)
    share = position - below
    residual = (correct - confidences) / len(confidences)
    # Linear interpolation keeps first moments; what falls off an end is folded back, as the kernel is.
    mass = np.bincount(np.clip(below, 0, _GRID - 1), weights=residual * (1.0 - share), minlength=_GRID)
    mass += np.bincount(np.clip(below + 1, 0, _GRID - 1), weights=residual * share, minlength=_GRID)
    coefficients = scipy.fft.dct(mass, type=2)
    frequencies = np.pi * np.arange(_GRID)

    def error(width: float) -> float:
        smoothed = scipy.fft.idct(coefficients * np.exp(-0.5 * (frequencies * width) ** 2), type=2)
        return float(np.abs(smoothed).sum())

    # The error falls and the width rises, so they meet once; at width 0 it is the mean absolute residual or less.
    if error(1e-6) <= 1e-6:
        return error(1e-6)
    return float(scipy.optimize.brentq(lambda width: error(width) - width, 1e-6, 2.0, xtol=1e-9))


def consistency(
    confidences: Float[np.ndarray, " examples"],
    correct: Bool[np.ndarray, " examples"],
    *,
    bins: int = 10,
    binning: Binning = "width",
    draws: int = 1000,
    seed: int = 0,
) -> statistics.Test:
    """Test that the model is calibrated: is its plug-in error larger than chance gives a calibrated model?

    Outcomes are redrawn from the confidences themselves (consistency resampling, Bröcker & Smith 2007; Vaicenavicius et
    al. 2019, arXiv 1902.06977). The statistic is the plug-in error; the p-value is one-sided and counts the observed
    sample.

    Args:
      confidences: in [0, 1].
      correct: whether each prediction is right.
      bins: of the plug-in error.
      binning: of the plug-in error.
      draws: how many redraws; the p-value is at least 1 / (draws + 1).
      seed: of the redraws.
    """
    confidences, correct = _checked(confidences, correct)
    observed = expected_error(confidences, correct, bins=bins, binning=binning)
    generator = np.random.default_rng(seed)
    exceed = 0
    for _ in range(draws):
        redrawn = generator.random(len(confidences)) < confidences
        exceed += expected_error(confidences, redrawn, bins=bins, binning=binning) >= observed - 1e-12
    return statistics.Test(observed, (exceed + 1) / (draws + 1), "consistency resampling, one-sided", "images")


def fit_temperature(logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]) -> Temperature:
    """The temperature that minimises the negative log-likelihood (Guo et al. 2017, arXiv 1706.04599).

    Fit it on validation images, never on those that it is judged on. The likelihood is concave in 1/T, so its one
    stationary point is bracketed and found to 1e-10.
    """
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(labels)

    def loss(temperature: float) -> float:
        return float(classification.negative_log_likelihood(logits / temperature, labels).mean())

    def slope(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        probabilities = np.exp(classification.log_softmax(logits * inverse))
        true = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)[:, 0]
        return float(np.mean(np.sum(probabilities * logits, axis=1) - true))

    before = loss(1.0)
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    if slope(low) <= 0.0 or slope(high) >= 0.0:
        value = math.exp(low if slope(low) <= 0.0 else high)
        return Temperature(value, before, loss(value), True)
    value = math.exp(scipy.optimize.brentq(slope, low, high, xtol=1e-10))
    return Temperature(value, before, loss(value), False)


def _noisy_gaps(diagram: Reliability) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gap, its standard deviation and its weight for each bin that holds an example."""
    filled = diagram.counts > 0
    counts = diagram.counts[filled]
    # One example in a bin, or all of them right, would otherwise claim no variance: Laplace's rule keeps some.
    smoothed = (diagram.accuracy[filled] * counts + 1.0) / (counts + 2.0)
    return diagram.gaps[filled], np.sqrt(smoothed * (1.0 - smoothed) / counts), diagram.weights[filled]


def _checked(confidences: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confidences, correct = np.asarray(confidences, np.float64), np.asarray(correct)
    if confidences.ndim != 1 or confidences.shape != correct.shape or len(confidences) == 0:
        raise errors.UserError(
            f"confidences have shape {confidences.shape} and correct {correct.shape}: give one of each an example."
        )
    # Softmax in float32 may leave 1 by a rounding; anything more is no probability.
    if not (np.all(confidences >= -1e-6) and np.all(confidences <= 1.0 + 1e-6)):
        raise errors.UserError(
            f"confidences range from {confidences.min()} to {confidences.max()}: expected probabilities in [0, 1]; "
            "apply softmax to logits first."
        )
    return np.clip(confidences, 0.0, 1.0), correct.astype(np.float64)
