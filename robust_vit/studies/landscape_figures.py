"""The figures of a loss landscape: contours of all runs on one scale, surfaces, and profiles along the axes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib import axes as matplotlib_axes
from matplotlib import colors, ticker
from matplotlib import figure as matplotlib_figure
from mpl_toolkits import mplot3d

from robust_vit import plots
from robust_vit.studies import landscape_numbers, study

# Without its brightest tenth, on which white lines would not be seen.
_MAP = colors.ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, 256)))
_DARK = "#20242a"  # Text on a white ground of its own, whatever the page's.
_COLUMNS = 3  # Panels side by side at the width of a page.
_DECADES = 4.0  # That colours and heights span at most, down from the highest loss.


def contours(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """The loss in the first plane of each run from above, with the checkpoints of a trajectory."""
    grids = {run: _grid(finding) for run, finding in findings.items()}
    levels = _levels(grids)
    norm = colors.LogNorm(levels[0], levels[-1])
    rows, columns = _layout(len(grids))
    with plots.style():
        figure, axes = plots.figure(rows, columns, width=max(3.5 * columns + 0.9, 4.6), height=3.4 * rows + 0.25)
        for axis in axes.ravel()[len(grids) :]:
            axis.set_visible(False)
        for axis, (run, grid) in zip(axes.ravel(), grids.items(), strict=False):
            x, y = grid.axes
            # Levels of the logarithm: between grid points the loss itself is far from linear where it spans decades.
            values, heights = np.log10(_shown(grid.loss[0], levels)).T, np.log10(levels)
            # Filled between the levels of the lines, finer by half: flat colour shows a level's shape better than a gradient.
            fine = np.interp(np.arange(0, len(levels) - 0.75, 0.5), np.arange(len(levels)), heights)
            axis.contourf(x, y, values, levels=fine, vmin=heights[0], vmax=heights[-1], cmap=_MAP, extend="both")
            lines = axis.contour(
                x, y, values, levels=heights, colors="white", linewidths=0.7, linestyles="solid", alpha=0.75
            )
            axis.clabel(lines, levels=heights[1::2], fontsize=7, fmt=lambda value: f"{10**value:.2g}")
            axis.plot(0, 0, marker="+", color="white", markersize=11, markeredgewidth=2.2)
            _trajectory(axis, findings[run].records)
            axis.set_title(run)
            axis.grid(False)
            _name_axes(axis, findings[run])
            axis.set_xlim(x[0], x[-1])
            axis.set_ylim(y[0], y[-1])
            for each in (axis.xaxis, axis.yaxis):
                each.set_major_locator(ticker.MaxNLocator(5))
        mapped = matplotlib.cm.ScalarMappable(norm=norm, cmap=_MAP)
        bar = figure.colorbar(mapped, ax=list(axes.ravel()[: len(grids)]), shrink=0.9, pad=0.02, aspect=28)
        bar.set_label(_quantity(findings))
        _nats(bar.ax.yaxis)
        bar.outline.set_visible(False)
    return figure


def surfaces(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """The loss in the first plane of each run as a surface; heights are logarithmic and the same for all."""
    grids = {run: _grid(finding) for run, finding in findings.items()}
    levels = _levels(grids)
    low, high = np.log10(levels[0]), np.log10(levels[-1])
    rows, columns = _layout(len(grids))
    with plots.style():
        figure = matplotlib_figure.Figure(figsize=(max(3.4 * columns + 0.3, 4.4), 3.1 * rows), layout="constrained")
        for number, (run, grid) in enumerate(grids.items(), start=1):
            axis: mplot3d.Axes3D = figure.add_subplot(rows, columns, number, projection="3d")
            x, y = np.meshgrid(*grid.axes, indexing="ij")
            heights = np.log10(_shown(grid.loss[0], levels))
            axis.plot_surface(
                x,
                y,
                heights,
                cmap=_MAP,
                vmin=low,
                vmax=high,
                rcount=len(x),
                ccount=len(y),
                linewidth=0.2,
                edgecolor=(1, 1, 1, 0.35),
                antialiased=True,
            )
            axis.set_zlim(low, high)
            axis.view_init(elev=28, azim=-58)
            axis.set_box_aspect((1, 1, 0.8), zoom=0.95)
            axis.set_title(run, pad=-8, loc="center")
            axis.xaxis.set_major_locator(ticker.MaxNLocator(3))
            axis.yaxis.set_major_locator(ticker.MaxNLocator(3))
            axis.zaxis.set_major_locator(ticker.FixedLocator(np.log10(_ticks(levels[0], levels[-1]))))
            axis.zaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{10**value:.3g}"))
            axis.tick_params(labelsize=7, pad=0)
            for each in (axis.xaxis, axis.yaxis, axis.zaxis):
                each.set_pane_color((0, 0, 0, 0))
                each.line.set_color(plots.INK)
                each._axinfo["grid"].update(color=(*colors.to_rgb(plots.INK), 0.18), linewidth=0.6)
            first, second = (label.split(" (")[0].removeprefix("random ") for label in _labels(findings[run]))
            axis.set_xlabel(first, fontsize=8, labelpad=-4)
            axis.set_ylabel(second, fontsize=8, labelpad=-4)
            axis.set_zlabel("loss (nats)", fontsize=8, labelpad=-4)
    return figure


def profiles(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """The loss along each axis through the weights, one panel an axis, one colour a run, one line a plane."""
    grids = {run: _grid(finding) for run, finding in findings.items()}
    count = max(len(grid.axes) for grid in grids.values())
    with plots.style():
        figure, panels = plots.figure(1, count, width=max(3.9 * count, 5.4), height=3.4, share_y=True)
        for number in range(count):
            axis = panels[0, number]
            for index, (run, grid) in enumerate(grids.items()):
                for plane, (offsets, line) in enumerate(_lines(grid, number)):
                    shown = np.where(np.isfinite(line) & (line > 0), line, np.nan)
                    axis.plot(
                        offsets,
                        shown,
                        color=plots.color(index),
                        marker=plots.marker(index),
                        markersize=3.2,
                        linewidth=1.6 if len(grid.loss) == 1 else 1.0,
                        alpha=1.0 if len(grid.loss) == 1 else 0.6,
                        label=run if plane == 0 else None,
                    )
            plots.logarithmic(axis)
            _nats(axis.yaxis)
            axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
            axis.axvline(0.0, color=plots.INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
            labels = [_labels(finding)[number] for finding in findings.values()]
            # Numbers of one run do not stand for all.
            axis.set_xlabel(labels[0] if len(set(labels)) == 1 else _plain_label(findings, number))
        panels[0, 0].set_ylabel(_quantity(findings))
        plots.legend(panels[0, 0], loc="best")
    return figure


def _grid(finding: study.Finding) -> landscape_numbers.Surface:
    return landscape_numbers.surface(finding.records, l2=finding.settings["l2"])


def _quantity(findings: Mapping[str, study.Finding]) -> str:
    l2 = next(iter(findings.values())).settings["l2"]
    return f"loss ({'NLL + L2' if l2 else 'NLL'}, nats)"


def _lines(grid: landscape_numbers.Surface, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The offsets along an axis, and the losses there of each plane."""
    start = [int(np.flatnonzero(axis == 0)[0]) for axis in grid.axes]
    chosen = [slice(None) if other == number else start[other] for other in range(len(start))]
    return [(grid.axes[number], plane[tuple(chosen)]) for plane in grid.loss]


def _trajectory(axis: matplotlib_axes.Axes, records: Mapping[str, np.ndarray]) -> None:
    points = records.get(study.EXHIBIT + "trajectory")
    if points is None or points.shape[1] < 2:
        return
    way = np.concatenate([points[:, :2], np.zeros((1, 2))])
    axis.plot(
        *way.T, color="white", linewidth=1.6, marker="o", markersize=4, markeredgecolor=plots.INK, markeredgewidth=0.6
    )
    steps = records[study.EXHIBIT + "trajectory_step"]
    for place in sorted({0, len(steps) - 1}):
        axis.annotate(
            f"step {steps[place]}",
            points[place, :2],
            xytext=(6, 6),
            textcoords="offset points",
            color=_DARK,
            fontsize=7.5,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.2},
        )


def _name_axes(axis: matplotlib_axes.Axes, finding: study.Finding) -> None:
    first, second = _labels(finding)
    axis.set_xlabel(first)
    axis.set_ylabel(second)


def _labels(finding: study.Finding) -> list[str]:
    """What each axis is, and in what unit."""
    settings, summary = finding.settings, finding.summary
    count = len(summary["spans"])
    if settings["plane"] == "trajectory":
        return [f"component {number + 1} ({summary['explained'][number]:.0%})" for number in range(count)]
    normalised = settings["normalisation"] not in (None, "none") or (
        settings["plane"] == "random" and settings["normalisation"] is None
    )
    unit = "filter norms" if normalised else "distance"
    if settings["plane"] == "eigenvectors":
        values = [f"{value:.3g}".replace("-", "−") for value in summary["eigenvalues"]]
        return [f"eigenvector of {values[number]} ({unit})" for number in range(count)]
    return [f"random direction {number + 1} ({unit})" for number in range(count)]


def _plain_label(findings: Mapping[str, study.Finding], number: int) -> str:
    plane = next(iter(findings.values())).settings["plane"]
    return f"{'component' if plane == 'trajectory' else 'eigenvector'} {number + 1} (distance in the weights)"


def _layout(count: int) -> tuple[int, int]:
    columns = min(count, _COLUMNS)
    return -(-count // columns), columns


def _levels(grids: Mapping[str, landscape_numbers.Surface]) -> np.ndarray:
    """The levels that all runs share: eight or so equal ratios between the lowest and the highest loss."""
    everything = np.concatenate([grid.loss[0].ravel() for grid in grids.values()])
    everything = everything[np.isfinite(everything) & (everything > 0)]
    if not len(everything):
        return np.array([0.1, 1.0])
    high = float(everything.max())
    low = max(float(everything.min()), high * 10.0**-_DECADES)
    if high / low < 1.05:
        low, high = low / 1.05, high * 1.05
    return np.geomspace(low, high, 10)


def _shown(loss: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Losses within the levels; what is not finite is as high as can be."""
    return np.clip(np.where(np.isfinite(loss), loss, levels[-1]), levels[0], levels[-1])


def _ticks(low: float, high: float) -> np.ndarray:
    """Round numbers of a logarithmic scale: powers of ten, with 2 and 5 where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    values = np.array([step * 10.0**power for power in powers for step in steps])
    return values[(values >= low * 0.999) & (values <= high * 1.001)]


def _nats(axis) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())
