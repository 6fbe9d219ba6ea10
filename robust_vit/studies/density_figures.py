"""The figure of spectral densities: on a logarithmic scale, with a band over probes, runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from robust_vit import curvature, plots

_WIDTH = 0.01  # Of the kernel, as a share of the range of the eigenvalues.


def curves(
    densities: Mapping[str, Mapping[str, curvature.Density]], summaries: Mapping[str, Mapping[str, Any]]
) -> matplotlib_figure.Figure:
    """One panel a run: the smoothed density of each phase.

    Args:
      densities: run -> phase ("end", "early") -> density.
      summaries: run -> summary of the study.
    """
    columns = min(len(densities), 3)
    rows = -(-len(densities) // columns)
    with plots.style():
        figure, axes = plots.figure(rows, columns, width=max(3.7 * columns, 5.2), height=3.7 * rows)
        for index, (run, phases) in enumerate(densities.items()):
            axis, color = axes[index // columns, index % columns], plots.color(index)
            ends = [end for found in phases.values() for end in (np.nanmin(found.nodes), np.nanmax(found.nodes))]
            low, high = min(*ends, 0.0), max(*ends, 0.0)
            width = _WIDTH * max(high - low, 1e-12)
            at = np.linspace(low - 5 * width, high + 5 * width, 1200)
            single = 1.0 / (next(iter(phases.values())).dimension * width * np.sqrt(2 * np.pi))
            bottom, top = 0.2 * single, single
            for phase, found in phases.items():
                mean, error = found.curve(at, width=width)
                top = max(top, mean.max())
                mean = np.maximum(mean, 1e-3 * bottom)
                error = np.nan_to_num(error)
                if phase == "end":
                    ends = [np.maximum(mean + sign * 2 * error, 1e-3 * bottom) for sign in (-1, 1)]
                    axis.fill_between(at, *ends, color=color, alpha=0.25, linewidth=0)
                    axis.plot(at, mean, color=color, linewidth=1.4, label="end" if len(phases) > 1 else None)
                else:
                    step = summaries[run]["early"]["step"]
                    dotted = {"linestyle": (0, (1, 1.2)), "linewidth": 1.3, "alpha": 0.8}
                    axis.plot(at, mean, color=color, label=f"early (step {step:,})", **dotted)
            axis.axvline(0.0, color=plots.INK, linewidth=1.0, linestyle=(0, (4, 3)))
            axis.axhline(single, color=plots.INK, linewidth=0.8, linestyle=(0, (1, 2)))
            axis.set_yscale("log")
            axis.set_ylim(bottom, 4 * top)
            axis.set_xlim(at[0], at[-1])
            axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
            axis.set_title(run)
            summary = summaries[run]
            text = f"negative: {summary['negative_share']['value']:.1%} of λ\n{summary['negative_mass']['value']:.1%} of Σ|λ|"
            axis.text(0.98, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=9)
            plots.legend(axis, loc="upper right", bbox_to_anchor=(1.0, 0.84))
            axis.set_xlabel("eigenvalue")
        for spare in axes.flat[len(densities) :]:
            spare.set_visible(False)
        for row in axes:
            row[0].set_ylabel("density of eigenvalues")
    return figure
