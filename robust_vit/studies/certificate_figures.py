"""The figure of certified robustness: certified accuracy against the radius, with what attacks leave beside it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import lines, ticker

from robust_vit import plots
from robust_vit.studies import study

_DASHES = ("-", (0, (4, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))


def curves(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """Colour tells the run, dashes tell the noise; open markers are the upper bounds of the attack."""
    with plots.style():
        figure, axes = plots.figure(width=6.8, height=4.0)
        axis = axes[0, 0]
        sigmas = sorted({level["sigma"] for f in findings.values() for level in f.summary["levels"].values()})
        dashes = {sigma: _DASHES[i % len(_DASHES)] for i, sigma in enumerate(sigmas)}
        for index, finding in enumerate(findings.values()):
            for level in finding.summary["levels"].values():
                sizes, values, low, high = (
                    np.asarray([point[key] for point in level["curve"]]) for key in ("radius", "value", "low", "high")
                )
                axis.fill_between(sizes, low, high, color=plots.color(index), alpha=0.12, linewidth=0)
                style = {"color": plots.color(index), "linestyle": dashes[level["sigma"]]}
                axis.plot([*sizes, sizes[-1]], [*values, 0.0], clip_on=False, zorder=3, **style)
                axis.plot(
                    [point["radius"] for point in level["attacked"]],
                    [point["value"] for point in level["attacked"]],
                    marker=plots.marker(index),
                    markerfacecolor="none",
                    markersize=6,
                    linewidth=0.8,
                    alpha=0.8,
                    **style,
                )
        axis.set_ylim(0, 1)
        axis.set_xlim(left=0)
        plots.percent(axis)
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("L2 radius r, pixels in [0, 1]")
        axis.set_ylabel("certified accuracy")
        handles = [
            lines.Line2D([], [], color=plots.color(i), marker=plots.marker(i), markerfacecolor="none", label=run)
            for i, run in enumerate(findings)
        ]
        handles += [lines.Line2D([], [], color=plots.INK, linestyle=dashes[s], label=f"σ = {s:g}") for s in sigmas]
        axis.legend(handles=handles, loc="upper right")
    return figure
