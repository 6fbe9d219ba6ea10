"""The figures of curvature in the input: distributions, confidence, and the patterns along which the loss bends most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from robust_vit import plots
from robust_vit.studies import attack_figures, study

_GROUPS = 10  # Of images by their confidence.
_RUNS_SHOWN = 4
_DECADES = 12  # Below the largest value: what is smaller is drawn at the edge.
_LARGEST = "largest eigenvalue λ₁ (nats / pixel range²)"


def bins(confidence: Float[np.ndarray, " examples"], values: Float[np.ndarray, " examples"]) -> list[dict[str, Any]]:
    """The median value of each tenth of the images by confidence."""
    groups = np.array_split(np.argsort(confidence, kind="stable"), min(_GROUPS, len(values)))
    return [
        {
            "confidence": float(np.median(confidence[rows])),
            "median": float(np.median(values[rows])),
            "examples": len(rows),
        }
        for rows in groups
    ]


def distributions(findings: Mapping[str, study.Finding], output: str) -> matplotlib_figure.Figure:
    """How λ₁ and σ₁ are distributed, λ₁ against confidence, and the smallest eigenvalue beside the largest."""
    largest = max(finding.records["top"].max() for finding in findings.values())
    floor = max(largest, 1e-300) * 10.0**-_DECADES
    with plots.style():
        figure, axes = plots.figure(2, 2, width=8.8, height=7.2)
        for index, (run, finding) in enumerate(findings.items()):
            records = finding.records
            top, bottom = np.maximum(records["top"], floor), -records["bottom"]
            dots = {"color": plots.color(index), "linestyle": "none", "alpha": 0.35, "markeredgewidth": 0}
            dots |= {"marker": plots.marker(index), "markersize": 3.5}
            _cumulative(axes[0, 0], top, plots.color(index), run)
            _cumulative(axes[0, 1], records["jacobian"], plots.color(index), run)
            places = np.clip(records["confidence"], *plots.CONFIDENCES)
            axes[1, 0].plot(places, top, **dots)
            entries = finding.summary["bins"]
            axes[1, 0].plot(
                np.clip([entry["confidence"] for entry in entries], *plots.CONFIDENCES),
                np.maximum([entry["median"] for entry in entries], floor),
                color=plots.color(index),
                marker=plots.marker(index),
                markersize=5,
                label=run,
                zorder=3,
            )
            seen = bottom > records["noise"]
            axes[1, 1].plot(top[seen], bottom[seen], **dots)
        for axis, words in (
            (axes[0, 0], _LARGEST),
            (axes[0, 1], f"σ₁ of the Jacobian of the {output} (per pixel range)"),
        ):
            plots.logarithmic(axis, "x")
            low, high = axis.get_xlim()
            if high < 50 * low:  # One power of ten at most would be named.
                axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high > 4 * low else range(1, 10)))
                axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.set_xlabel(words)
            axis.set_ylabel("share of images below")
            plots.percent(axis)
        axes[0, 0].set_title("Curvature of the loss")
        axes[0, 1].set_title("Stretch of the answer")
        plots.logarithmic(axes[1, 0])
        axes[1, 0].set_xlabel("confidence of the model")
        axes[1, 0].set_ylabel(_LARGEST)
        axes[1, 0].set_title("Curvature and confidence")
        plots.confidence(axes[1, 0])
        axes[1, 0].tick_params(axis="x", labelsize=8)
        _diagonal(axes[1, 1], any((-f.records["bottom"] > f.records["noise"]).any() for f in findings.values()))
        plots.legend(axes[0, 0], loc="best")
    return figure


def patterns(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """The first images and, of each run, the pattern of largest curvature with its eigenvalue."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    first = next(iter(shown.values())).records
    columns = len(first["exhibit/images"])
    names = [str(name) for name in first["exhibit/class_names"]]
    rows = 1 + len(shown)
    with plots.style():
        figure, axes = plots.figure(rows, columns, width=max(1.25 * columns + 1.6, 4.2), height=1.55 * rows)
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
        for column in range(columns):
            plots.images(axes[0, column], first["exhibit/images"][column])
            axes[0, column].set_title(attack_figures.short(names[first["label"][column]]), **attack_figures.caption())
        attack_figures.side(axes[0, 0], "image", plots.INK)
        for index, (run, finding) in enumerate(shown.items()):
            line, records = axes[1 + index], finding.records
            for column in range(min(columns, len(records["exhibit/patterns"]))):
                plots.images(line[column], records["exhibit/patterns"][column], symmetric=True)
                line[column].set_title(
                    f"λ₁ = {records['top'][column]:.2g}", **attack_figures.caption(plots.color(index))
                )
            attack_figures.side(line[0], run, plots.color(index))
    return figure


def _cumulative(axis: matplotlib_axes.Axes, values: np.ndarray, color: str, label: str) -> None:
    values = np.sort(values[values > 0])
    if len(values):
        axis.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=color, label=label)


def _diagonal(axis: matplotlib_axes.Axes, anything: bool) -> None:
    axis.set_title("Downwards and upwards")
    axis.set_xlabel(_LARGEST)
    axis.set_ylabel("minus the smallest eigenvalue")
    if not anything:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.text(0.5, 0.5, "no image bends downwards", transform=axis.transAxes, ha="center", va="center")
        return
    plots.logarithmic(axis, "x")
    plots.logarithmic(axis)
    low, high = (f(axis.get_xlim()[i], axis.get_ylim()[i]) for i, f in enumerate((max, min)))
    if low < high:
        axis.plot([low, high], [low, high], color=plots.INK, linewidth=1.0, linestyle=":", zorder=1)
