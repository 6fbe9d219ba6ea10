"""What records of bent representations say: how far paths turn, how that grows with the step, and with what it goes along."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from robust_vit import tables
from robust_vit.metrics import statistics
from robust_vit.studies import study


def bends(records: Mapping[str, np.ndarray], start: str) -> dict[str, Any]:
    """Means of what paths from a start do, with intervals over images, and the shares of what has no value."""
    angles, rate = records[f"angles/{start}"], records[f"rate/{start}"]
    return {
        "angle": plain(statistics.mean(per_image(angles))),
        "total": plain(statistics.mean(per_image(angles.sum(axis=-1, dtype=np.float64)))),
        "straightness": plain(statistics.mean(per_image(records[f"straightness/{start}"]))),
        "off_line": plain(statistics.mean(1.0 - per_image(records[f"linearity/{start}"]))),
        "rate": plain(statistics.mean(per_image(rate))),
        "no_rate": float(np.mean(rate == 0)),
        "below_noise": float(np.mean(angles < records[f"noise/{start}"])),
    }


def exponent(
    tangents: Float[np.ndarray, "images directions sizes"], sizes: Sequence[float], step: float
) -> dict[str, Any] | None:
    """The power of the step with which the tangents' angle grows, over the two decades up to `step`: 1 of a smooth path.

    Of the median angle over images and directions, where it is above rounding and below half a radian, beyond which angles have
    nowhere to grow to. None where fewer than two sizes are left. The interval is over images.
    """
    near = np.asarray([step / 100 <= size <= step for size in sizes])
    places = np.log(np.asarray(sizes, np.float64))

    def slope(tangents: np.ndarray) -> float:
        typical = np.median(tangents.reshape(-1, len(places)).astype(np.float64), axis=0)
        chosen = near & (typical > 1e-5) & (typical < 0.5)
        return float(np.polyfit(places[chosen], np.log(typical[chosen]), 1)[0]) if chosen.sum() > 1 else float("nan")

    if not np.isfinite(slope(tangents)):
        return None
    found = statistics.bootstrap(slope, tangents, draws=500)
    return plain(found) if np.isfinite([found.low, found.high]).all() else None


def correlation(confidence: Float[np.ndarray, " images"], angles: Float[np.ndarray, " images"]) -> dict[str, Any]:
    """Spearman's rank correlation with an interval over images; zero where one of the two does not vary."""

    def spearman(left: np.ndarray, right: np.ndarray) -> float:
        return 0.0 if np.ptp(left) == 0 or np.ptp(right) == 0 else float(scipy.stats.spearmanr(left, right).statistic)

    return plain(statistics.bootstrap(spearman, confidence.astype(np.float64), angles, draws=500))


def table(findings: Mapping[str, study.Finding], starts: Mapping[str, str], caption: str) -> tables.Table:
    """One row a run and start."""
    rows = []
    for run, finding in findings.items():
        summary = finding.summary
        for index, (name, words) in enumerate(starts.items()):
            entry = summary["starts"][name]
            formats = {"angle": ".3f", "total": ".2f", "straightness": ".3f", "off_line": ".2%", "rate": ".3g"}
            cells = [study.number(entry[key], format) for key, format in formats.items()]
            whole = [study.number(summary[key], ".2f") if index == 0 else None for key in ("exponent", "correlation")]
            rows.append((run, words, *cells, *whole))
    return tables.Table(
        "How features turn while images move along a line",
        (
            "run",
            "path",
            "mean θ (rad)",
            "total turning (rad)",
            "chord / path",
            "variance off the line",
            "exact turning rate (rad / ε)",
            "θ grows with step to the power",
            "rank correlation of θ with confidence",
        ),
        rows,
        caption,
    )


def count_text(findings: Mapping[str, study.Finding]) -> str:
    """How many images the runs were asked about: "10 images"."""
    counts = sorted({finding.summary["examples"] for finding in findings.values()})
    return f"{'–'.join(str(number) for number in counts)} images"


def per_image(values: np.ndarray) -> Float[np.ndarray, " images"]:
    """Means over everything of an image, in float64. An interval over images of these holds the spread over directions, too."""
    return values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)


def plain(interval: statistics.Interval) -> dict[str, Any]:
    """An interval as plain JSON."""
    return dataclasses.asdict(interval)
