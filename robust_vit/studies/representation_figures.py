"""The figures of bent representations: direction changes along the path and against the step size, and paths in their planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from robust_vit import plots
from robust_vit.studies import attack_figures, study

STARTS = {"start": "from the image", "jump": "after the jump"}
CAPTIONS = {
    "direction_change": (
        "Angle θ(n) between step n of the features and the step before it, while images move along lines in equal steps; 0 goes "
        "straight on. Light: smallest to largest over all images and directions; dark: the middle half; line: median; dots: "
        "mean; dotted: median of what rounding makes of a straight path"
    ),
    "step_size": (
        "The first angle against the length of the step: median over images and directions, and the middle half. A smooth "
        "path's angle is the step times its exact turning rate (dashed, where there is one); with kinks it grows more slowly "
        "and is larger. Tangents are exact derivatives at both ends of the step; differences of features drown in rounding "
        "(dotted) at small steps. The upright line is the step of the other figure"
    ),
    "paths": (
        "Paths of pixels and of features, each in the plane of its own two principal components, turned so that its ends lie "
        "level, in units of their distance, both axes alike. Pixels go straight, and around a corner where the path begins "
        "with the jump; four directions an image at most, the first test images, not selected"
    ),
}
_RUNS_SHOWN = 4
_LIGHT, _DARK = 0.14, 0.32


def changes(findings: Mapping[str, study.Finding], span: float, steps: int) -> matplotlib_figure.Figure:
    """Direction changes against the number of the step: one column a run, one row a start."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    starts = [name for name in STARTS if f"angles/{name}" in next(iter(shown.values())).records]
    with plots.style():
        figure, axes = plots.figure(
            len(starts),
            len(shown),
            width=1.2 + 3.1 * len(shown),
            height=0.7 + 2.3 * len(starts),
            share_x=True,
            share_y=True,
        )
        for column, (run, finding) in enumerate(shown.items()):
            for row, name in enumerate(starts):
                axis, color = axes[row, column], plots.color(column)
                angles, noise = (_pooled(finding.records[f"{key}/{name}"]) for key in ("angles", "noise"))
                places = np.arange(1, angles.shape[1] + 1)
                low, first, middle, third, high = np.quantile(angles, (0.0, 0.25, 0.5, 0.75, 1.0), axis=0)
                axis.fill_between(places, low, high, color=color, alpha=_LIGHT, linewidth=0)
                axis.fill_between(places, first, third, color=color, alpha=_DARK, linewidth=0)
                axis.plot(places, middle, color=color, linewidth=1.6)
                axis.plot(places, angles.mean(axis=0), color=color, marker="o", markersize=3.2, linestyle="none")
                axis.plot(places, np.median(noise, axis=0), color=plots.INK, linewidth=1.0, linestyle=(0, (1, 1.5)))
                axis.set_title(f"{run}, {STARTS[name]}" if len(starts) > 1 else run, fontsize=10, pad=5)
                axis.set_xlim(0.5, places[-1] + 0.5)
                axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
                if row == len(starts) - 1:
                    axis.set_xlabel(f"step n (of ε = {span / steps:g})")
        axes[0, 0].set_ylim(bottom=0.0)
        for row in range(len(starts)):
            axes[row, 0].set_ylabel("direction change θ(n) (rad)")
    return figure


def step_sizes(
    findings: Mapping[str, study.Finding], sizes: Sequence[float], chosen: float
) -> matplotlib_figure.Figure:
    """The first angle against the step size, by differences and by tangents, with its floor: one panel a run."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    with plots.style():
        figure, axes = plots.figure(1, len(shown), width=1.6 + 3.4 * len(shown), height=4.1, share_x=True, share_y=True)
        order = np.argsort(sizes)
        places = np.asarray(sizes, np.float64)[order]
        largest = []
        for column, (run, finding) in enumerate(shown.items()):
            axis, color, records = axes[0, column], plots.color(column), finding.records
            angles, noise, tangents = (
                _pooled(records[f"sizes/{key}"])[:, order] for key in ("angles", "noise", "tangents")
            )
            first, middle, third = np.quantile(angles, (0.25, 0.5, 0.75), axis=0)
            axis.fill_between(places, _positive(first), _positive(third), color=color, alpha=_LIGHT, linewidth=0)
            style = {"color": color, "markersize": 4}
            axis.plot(places, _positive(middle), marker="o", label="between differences", **style)
            axis.plot(
                places,
                _positive(np.median(tangents, axis=0)),
                marker="s",
                markerfacecolor="none",
                linewidth=1.2,
                label="between exact tangents",
                **style,
            )
            rate = float(np.median(records["rate/start"]))
            if rate > 0:
                label = "step × exact turning rate"
                axis.plot(places, rate * places, color=color, linewidth=1.2, linestyle=(0, (4, 2)), label=label)
            floor = np.median(noise, axis=0)
            axis.plot(places, floor, color=plots.INK, linewidth=1.2, linestyle=(0, (1, 1.5)), label="rounding")
            axis.axvline(chosen, color=plots.INK, linewidth=0.8, alpha=0.5)
            axis.set_title(run if rate > 0 else f"{run} (turning rate 0)", fontsize=10, pad=5)
            axis.set_xlabel("step size Δ (RMS change of a pixel)")
            largest.append(max(np.quantile(tangents, 0.5, axis=0).max(), middle.max(), 1e-6))
            plots.logarithmic(axis, "x")
            plots.logarithmic(axis)
        # What a piecewise linear model has of exact zeros, and a line that leaves the angles, set no limits.
        axes[0, 0].set_ylim(min(1e-5, max(largest) / 10), max(4.0, *largest))
        axes[0, 0].set_ylabel("direction change (rad)")
        with_most = max(range(len(shown)), key=lambda column: len(axes[0, column].get_lines()))
        handles, labels = axes[0, with_most].get_legend_handles_labels()
        columns = 2 if len(shown) == 1 else 4
        key = figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5)
        for handle in key.legend_handles:  # What is drawn, in any run's colour.
            handle.set_color(plots.INK)
    return figure


def paths(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """Paths of pixels and of each run's features in their planes: one row a run, one column an image and start."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    first = next(iter(shown.values())).records
    starts = [name for name in STARTS if f"exhibit/plane/{name}" in first]
    images = len(first[f"exhibit/plane/{starts[0]}"])
    names = [str(name) for name in first["exhibit/class_names"]]
    columns = [(image, name) for image in range(images) for name in starts]
    rows = [("pixels", first, "pixels", plots.INK)]
    rows += [(run, finding.records, "plane", plots.color(index)) for index, (run, finding) in enumerate(shown.items())]
    with plots.style():
        figure, axes = plots.figure(
            len(rows),
            len(columns),
            width=0.9 + 2.3 * len(columns),
            height=0.6 + 1.35 * len(rows),
            share_x=True,
            share_y=True,
        )
        for row, (label, records, key, color) in enumerate(rows):
            for column, (image, name) in enumerate(columns):
                axis = axes[row, column]
                planes = records[f"exhibit/{key}/{name}"]
                for index in range(planes.shape[1] if image < len(planes) else 0):
                    path = planes[image, index]
                    style = {"color": color, "alpha": 1.0 if index == 0 else 0.45}
                    axis.plot(*path.T, linewidth=1.5, **style)
                    axis.plot(*path[::4].T, linestyle="none", marker="o", markersize=2.2, **style)
                axis.set_aspect("equal", adjustable="box")
                axis.tick_params(labelsize=8)
                if row == 0:
                    text = f"{attack_figures.short(names[first['label'][image]])}, {_WAYS[name]}"
                    axis.set_title(text, fontsize=9.5, pad=5)
            axes[row, 0].set_ylabel(label, color=color)
        for axis in axes[-1]:
            axis.set_xlabel("along (ends' distance)", fontsize=9)
    return figure


_WAYS = {"start": "straight on", "jump": "jump, then on"}


def _pooled(values: np.ndarray) -> np.ndarray:
    """`[images, directions, places]` as `[paths, places]`."""
    return values.reshape(-1, values.shape[-1])


def _positive(values: np.ndarray) -> np.ndarray:
    """Zeros left out: a logarithmic axis has no place for them."""
    return np.where(values > 0, values, np.nan)
