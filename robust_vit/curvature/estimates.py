"""Stochastic estimates: a value with its standard error over samples, and what it cost."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over independent samples. Plain NumPy in float64.

    Attributes:
      value: the estimate; a scalar, or one a row.
      standard_error: of the value, over samples; not a number for one sample.
      samples: how many.
      applications: of the operator.
      converged: the standard error reached what was asked for; true where nothing was.
    """

    value: float | np.ndarray
    standard_error: float | np.ndarray
    samples: int
    applications: int
    converged: bool = True


def over_samples(samples: Float[np.ndarray, " samples"], applications: int) -> Estimate:
    """The mean of the samples and its standard error."""
    count = len(samples)
    error = float(np.std(samples, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    return Estimate(float(np.mean(samples)), error, count, applications)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate of `factor` times as much."""
    return dataclasses.replace(
        estimate, value=factor * estimate.value, standard_error=abs(factor) * estimate.standard_error
    )


def ratio(parts: Float[np.ndarray, " samples"], wholes: Float[np.ndarray, " samples"], applications: int) -> Estimate:
    """The mean of the parts over the mean of the wholes, with the standard error of the delta method; zero of nothing."""
    whole = float(np.mean(wholes))
    if whole == 0:
        return Estimate(0.0, 0.0, len(parts), applications)
    value = float(np.mean(parts)) / whole
    return dataclasses.replace(over_samples((parts - value * wholes) / whole, applications), value=value)
