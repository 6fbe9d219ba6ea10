"""The figure of sharpness: the rise of the loss when weights are moved, in absolute units and relative to each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import lines, ticker

from robust_vit import plots
from robust_vit.studies import study

_TITLES = {"raw": "absolute", "adaptive": "relative to each weight"}
_STYLES = {"worst": "-", "one_step": ":"}
_WORDS = {"worst": "worst found", "one_step": "after one step (SAM)"}
_DECADES = 6  # Below the largest rise: what is smaller is rounding.


def curves(findings: Mapping[str, study.Finding], norm: str) -> matplotlib_figure.Figure:
    """Worst case above and average case below, one column a kind, one colour a run; all axes logarithmic."""
    with plots.style():
        figure, axes = plots.figure(2, 2, width=8.8, height=7.0, share_y="row")
        for column, (kind, words) in enumerate(_TITLES.items()):
            entries = {run: finding.summary["kinds"][kind] for run, finding in findings.items()}
            unit = ", relative" if kind == "adaptive" else ""
            _panel(axes[0, column], entries, "radii", _STYLES, f"radius ({'L2' if norm == 'l2' else 'L∞'}{unit})")
            _panel(axes[1, column], entries, "spreads", {"average": "-"}, f"spread of each weight's change{unit}")
            axes[0, column].set_title(f"At worst, {words}")
            axes[1, column].set_title(f"On average, {words}")
        for axis in axes[:, 0]:
            axis.set_ylabel("rise of the training loss (nats)")
        measures = [
            lines.Line2D([], [], color=plots.INK, linestyle=style, linewidth=1.4, label=_WORDS[name])
            for name, style in _STYLES.items()
        ]
        runs = [
            lines.Line2D([], [], color=plots.color(index), marker=plots.marker(index), label=run)
            for index, run in enumerate(findings)
        ]
        axes[0, 0].legend(handles=[*runs, *measures], loc="best")
    return figure


def _panel(axis: matplotlib_axes.Axes, entries: Mapping[str, Any], along: str, styles: Mapping[str, Any], words: str):
    highest = max(point["value"] for entry in entries.values() for name in styles for point in entry[name])
    floor = max(highest, 1e-30) * 10.0**-_DECADES
    for index, entry in enumerate(entries.values()):
        places = np.asarray(entry[along])
        for name, style in styles.items():
            values, low, high = (np.asarray([point[key] for point in entry[name]]) for key in ("value", "low", "high"))
            seen, strong = values > floor, style == "-"
            if strong:
                band = np.maximum(low, floor), np.maximum(high, floor)
                axis.fill_between(places, *band, where=seen, color=plots.color(index), alpha=0.15, linewidth=0)
            axis.plot(
                places[seen],
                values[seen],
                color=plots.color(index),
                linestyle=style,
                linewidth=2.0 if strong else 1.4,
                marker=plots.marker(index),
                markersize=5.5 if strong else 3.5,
            )
    plots.logarithmic(axis, "x")
    plots.logarithmic(axis)
    axis.xaxis.set_major_locator(ticker.FixedLocator(sorted({at for entry in entries.values() for at in entry[along]})))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel(words)
