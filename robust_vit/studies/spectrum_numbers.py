"""Numbers of Hessian spectra from their records: means over mini-batches, and what is in each block of the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from robust_vit import curvature
from robust_vit.metrics import statistics
from robust_vit.studies import study

_OVER = "mini-batches"


def interval(values: Float[np.ndarray, " mini_batches"]) -> dict[str, Any]:
    """The mean with its interval, as plain JSON."""
    return dataclasses.asdict(statistics.mean(values, over=_OVER))


def negative(
    values: Float[np.ndarray, "mini_batches top"], noise: Float[np.ndarray, " mini_batches"]
) -> dict[str, Any]:
    """NEP, the share of negative ones among the values of largest magnitude (`curvature.negative_share`)."""
    return interval(curvature.negative_share(values, noise=noise))


def positive(
    values: Float[np.ndarray, "mini_batches top"], noise: Float[np.ndarray, " mini_batches"]
) -> dict[str, Any]:
    """APE, the mean of the positive ones of all mini-batches together (`curvature.positive_mean`)."""

    def mean(values: np.ndarray, noise: np.ndarray) -> float:
        return curvature.positive_mean(values, noise=noise)

    return dataclasses.asdict(statistics.bootstrap(mean, values, noise, over=_OVER))


def blocks(records: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, dict[str, Any]]:
    """The top eigenvalues of each block, from the stem to the head: magnitudes by rank, their signs, NEP and APE.

    Args:
      records: of a study with `blocks`; in older ones there is the largest of each block alone.
      prefix: "early/" for the early phase.
    """
    tops, noise = records[f"{prefix}blocks/values"], records[f"{prefix}noise"]
    tops = tops[..., None] if tops.ndim == 2 else tops
    found = {}
    for index, name in enumerate(records[f"{study.EXHIBIT}blocks"]):
        values = tops[:, index]
        values = values[:, np.isfinite(values).all(axis=0)]  # A small block has fewer.
        found[str(name)] = {
            "magnitudes": [interval(sizes) for sizes in np.abs(values).T],
            "negatives": [float(share) for share in (values < -noise[:, None]).mean(axis=0)],
            "nep": negative(values, noise),
            "ape": positive(values, noise),
        }
    return found
