"""The figures of spectral densities: on a logarithmic scale, with a band over probes, runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float
from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from robust_vit import curvature, plots

_WIDTH = 0.01  # Of the kernel on a linear axis, as a share of the range of the eigenvalues at the end of training.
_STRETCHED_WIDTH = 0.15  # Of the kernel on the asinh axis: 0.065 of a decade.
_DECADE = math.log(10.0)

Densities = Mapping[str, Mapping[str, curvature.Density]]


def linear(densities: Densities, summaries: Mapping[str, Mapping[str, Any]]) -> matplotlib_figure.Figure:
    """One panel a run: the density of each phase against the eigenvalue, as it is published.

    Args:
      densities: run -> phase ("end", "early") -> density.
      summaries: run -> summary of the study.
    """

    def draw(axis: matplotlib_axes.Axes, index: int, run: str, phases: Mapping[str, curvature.Density]) -> None:
        low, high = _ends(phases["end"])
        width = _WIDTH * max(high - low, 1e-12)
        low, high = map(np.asarray, zip(*map(_ends, phases.values()), strict=True))
        at = np.linspace(low.min() - 5 * width, high.max() + 5 * width, 1600)
        single = 1.0 / (phases["end"].dimension * width * math.sqrt(2 * math.pi))
        found = {phase: one.curve(at, width=width) for phase, one in phases.items()}
        _draw(axis, index, at, found, summaries[run], single)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5))

    return _panels(densities, summaries, draw, "density of eigenvalues")


def stretched(densities: Densities, summaries: Mapping[str, Mapping[str, Any]]) -> matplotlib_figure.Figure:
    """One panel a run: how many eigenvalues there are in a decade of each sign; linear near zero, logarithmic beyond.

    Arguments as of `linear`.
    """

    def draw(axis: matplotlib_axes.Axes, index: int, run: str, phases: Mapping[str, curvature.Density]) -> None:
        unit = 10.0 ** math.floor(math.log10(max(summaries[run]["floor"], 1e-300)))
        low, high = map(np.asarray, zip(*map(_ends, phases.values()), strict=True))
        grid = np.linspace(np.arcsinh(low.min() / unit) - 0.8, np.arcsinh(high.max() / unit) + 0.8, 1600)
        single = _DECADE / (_STRETCHED_WIDTH * math.sqrt(2 * math.pi))
        found = {phase: _per_decade(one, grid, unit) for phase, one in phases.items()}
        _draw(axis, index, np.sinh(grid) * unit, found, summaries[run], single)
        axis.set_xscale("asinh", linear_width=unit)
        largest = max(abs(low).max(), abs(high).max())
        # The first decades lie too near to zero for a label of their own; where there are many, every second has room.
        count = math.ceil(math.log10(largest / unit)) + 1
        decades = unit * 10.0 ** np.arange(1, max(count, 2), 1 if count < 4 else 2)
        axis.xaxis.set_major_locator(ticker.FixedLocator([*-decades[::-1], 0.0, *decades]))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        axis.set_xlim(np.sinh(grid[0]) * unit, np.sinh(grid[-1]) * unit)

    return _panels(densities, summaries, draw, "eigenvalues in a decade")


def _panels(densities: Densities, summaries: Mapping[str, Mapping[str, Any]], draw, label: str):
    columns = min(len(densities), 3)
    rows = -(-len(densities) // columns)
    with plots.style():
        figure, axes = plots.figure(rows, columns, width=max(4.0 * columns, 5.2), height=3.9 * rows)
        for index, (run, phases) in enumerate(densities.items()):
            axis = axes[index // columns, index % columns]
            draw(axis, index, run, phases)
            axis.set_title(run)
            summary = summaries[run]
            words = (
                f"{summary['negative_share']['value']:.2%} below −{summary['floor']:.2g}",
                f"negative mass of the loss {summary['negative_mass_of_loss']['value']:.0%}",
            )
            axis.set_title("\n".join(words), loc="right", fontsize=9, fontweight="normal")
            axis.set_xlabel("eigenvalue (nats)")
            plots.legend(axis, loc="upper right")
        for spare in axes.flat[len(densities) :]:
            spare.set_visible(False)
        for row in axes:
            row[0].set_ylabel(label)
    return figure


def _draw(
    axis: matplotlib_axes.Axes,
    index: int,
    at: Float[np.ndarray, " points"],
    found: Mapping[str, tuple[np.ndarray, np.ndarray]],
    summary: Mapping[str, Any],
    single: float,
) -> None:
    """The curves of one run on a logarithmic scale that ends somewhat below the height of a single eigenvalue."""
    bottom, color = 0.2 * single, plots.color(index)
    lowest = 1e-3 * bottom
    for phase, (mean, error) in found.items():
        mean = np.maximum(mean, lowest)
        if phase == "end":
            ends = [np.maximum(mean + sign * 2 * np.nan_to_num(error), lowest) for sign in (-1, 1)]
            axis.fill_between(at, *ends, color=color, alpha=0.25, linewidth=0)
            axis.plot(at, mean, color=color, linewidth=1.4, label="end" if len(found) > 1 else None)
        else:
            dotted = {"linestyle": (0, (1, 1.2)), "linewidth": 1.3, "alpha": 0.8}
            axis.plot(at, mean, color=color, label=f"early (step {summary['early']['step']:,})", **dotted)
    axis.axvline(0.0, color=plots.INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axis.axhline(single, color=plots.INK, linewidth=0.8, linestyle=(0, (1, 2)))
    plots.logarithmic(axis)
    # Two entries of a legend take a decade and a half.
    axis.set_ylim(bottom, (60 if len(found) > 1 else 3) * max(single, *(mean.max() for mean, _ in found.values())))
    axis.set_xlim(at[0], at[-1])


def _per_decade(found: curvature.Density, grid: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """The number of eigenvalues per decade of the asinh axis and its standard error, smoothed within each sign."""
    points = np.arcsinh(np.nan_to_num(found.nodes) / unit)[:, :, None]
    kernels = sum(scipy.stats.norm.pdf(grid[None, None], sign * points, _STRETCHED_WIDTH) for sign in (-1, 1))
    kernels = np.where((grid[None, None] >= 0) == (points >= 0), kernels, 0.0)
    each = found.dimension * _DECADE * (found.weights[:, :, None] * kernels).sum(axis=1)
    error = each.std(axis=0, ddof=1) / math.sqrt(len(each)) if len(each) > 1 else np.full(each.shape[1], np.nan)
    return each.mean(axis=0), error


def _ends(found: curvature.Density) -> tuple[float, float]:
    return min(float(np.nanmin(found.nodes)), 0.0), max(float(np.nanmax(found.nodes)), 0.0)
