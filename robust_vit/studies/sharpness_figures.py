"""The figure of sharpness: the rise of the loss against the radius, in absolute units and relative to each weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import lines, ticker

from robust_vit import plots
from robust_vit.studies import study

_TITLES = {"raw": "Raw", "adaptive": "Adaptive: relative to each weight"}
_STYLES = {"worst": "-", "one_step": ":", "average": (0, (4, 2))}
_WORDS = {"worst": "worst case found", "one_step": "after one step (SAM)", "average": "average over directions"}
_DECADES = 6  # Below the largest rise: what is smaller is rounding.


def curves(findings: Mapping[str, study.Finding], norm: str) -> matplotlib_figure.Figure:
    """One panel a kind, one colour a run, one line style a measure; both axes logarithmic."""
    with plots.style():
        figure, axes = plots.figure(1, 2, width=8.8, height=4.2, share_y=True)
        highest = max(
            entry["value"]
            for finding in findings.values()
            for kind in _TITLES
            for entry in finding.summary["kinds"][kind]["worst"]
        )
        floor = max(highest, 1e-30) * 10.0**-_DECADES
        for column, (kind, title) in enumerate(_TITLES.items()):
            axis = axes[0, column]
            for index, finding in enumerate(findings.values()):
                entry = finding.summary["kinds"][kind]
                radii = np.asarray(entry["radii"])
                for name, style in _STYLES.items():
                    values, low, high = (np.asarray([p[key] for p in entry[name]]) for key in ("value", "low", "high"))
                    seen = values > floor
                    strong = name == "worst"
                    if strong:
                        axis.fill_between(
                            radii,
                            np.maximum(low, floor),
                            np.maximum(high, floor),
                            color=plots.color(index),
                            alpha=0.15,
                            linewidth=0,
                        )
                    axis.plot(
                        radii[seen],
                        values[seen],
                        color=plots.color(index),
                        linestyle=style,
                        linewidth=2.0 if strong else 1.4,
                        marker=plots.marker(index),
                        markersize=5.5 if strong else 3.5,
                    )
            axis.set_xscale("log")
            axis.set_yscale("log")
            marks = sorted(
                {radius for finding in findings.values() for radius in finding.summary["kinds"][kind]["radii"]}
            )
            axis.xaxis.set_major_locator(ticker.FixedLocator(marks))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_title(title)
            axis.set_xlabel(f"radius ({'L2' if norm == 'l2' else 'L∞'}{', relative' if kind == 'adaptive' else ''})")
        axes[0, 0].set_ylabel("rise of the training loss (nats)")
        runs = [
            lines.Line2D([], [], color=plots.color(index), marker=plots.marker(index), label=run)
            for index, run in enumerate(findings)
        ]
        measures = [
            lines.Line2D([], [], color=plots.INK, linestyle=style, linewidth=1.4, label=_WORDS[name])
            for name, style in _STYLES.items()
        ]
        axes[0, 0].legend(handles=runs, loc="upper left")
        axes[0, 1].legend(handles=measures, loc="lower right")
    return figure
