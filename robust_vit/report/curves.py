"""Training curves of all runs, from `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from robust_vit import plots
from robust_vit.report import runs as run_lib

# What a reader looks for, in this order: the last part of the key, the axis label, whether it is a share, log scale.
_PANELS = (
    ("loss", "loss (nats)", False, True),
    ("accuracy", "accuracy", True, False),
    ("learning_rate", "learning rate", False, False),
)


def training(runs: Sequence[run_lib.Run]) -> matplotlib_figure.Figure | None:
    """Loss, accuracy and learning rate against the step; None where no run has metrics.

    One colour a run. A key `<split>/<metric>` is solid for training and dashed for held-out data.
    """
    panels = [panel for panel in _PANELS if any(_keys(run, panel[0]) for run in runs)]
    if not panels:
        return None
    with plots.style():
        drawn, axes = plots.figure(1, len(panels), width=3.3 * len(panels) if len(panels) > 1 else 5.0, height=2.9)
        for axis, (metric, title, share, logarithmic) in zip(axes[0], panels, strict=True):
            for index, run in enumerate(runs):
                for key in _keys(run, metric):
                    points = [(line["step"], _mean(line[key])) for line in run.metrics if key in line]
                    points = [point for point in points if math.isfinite(point[1])]
                    held_out = not _is_training(key)
                    split = key.rpartition("/")[0].replace("_", " ")
                    axis.plot(
                        *zip(*points, strict=True),
                        color=plots.color(index),
                        linestyle="--" if held_out else "-",
                        linewidth=1.4,
                        marker=plots.marker(index) if held_out and len(points) <= 30 else None,
                        markersize=3.5,
                        label=f"{run.name}, {split}" if split else run.name,
                    )
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(ticker.MaxNLocator("auto", integer=True))
            if logarithmic:
                plots.logarithmic(axis)
            if share:
                plots.percent(axis)
            if axis is axes[0][0] or len(panels) == 1:
                plots.legend(axis)
    return drawn


def _keys(run: run_lib.Run, metric: str) -> list[str]:
    keys = {
        key
        for line in run.metrics
        for key in line
        if key.rpartition("/")[2] == metric and math.isfinite(_mean(line[key]))
    }
    return sorted(keys)


def _is_training(key: str) -> bool:
    return key.startswith("train") or "/" not in key


def _mean(value: Any) -> float:
    """A metric of several replicas is a list: its mean. NaN for what is no number."""
    try:
        return float(np.mean(np.asarray(value, np.float64)))
    except (TypeError, ValueError):
        return math.nan
