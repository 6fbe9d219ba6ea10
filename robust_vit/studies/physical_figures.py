"""The figures of the physical study: accuracy and destruction over the channel's strength, and photographs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import lines

from robust_vit import plots
from robust_vit.studies import attack_figures, study

_RUNS_SHOWN = 2
_DASHES = {"clean": (0, (1.2, 1.6)), "digital": (0, (4, 2)), "expectation": "-"}
_NAMES = {"clean": "clean image", "digital": "attack on the file", "expectation": "attack on the channel's mean"}


def curves(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """Left accuracy, right destruction rate: colour tells the run, dashes the kind of image."""
    with plots.style():
        figure, axes = plots.figure(1, 2, width=8.4, height=3.9)
        for index, finding in enumerate(findings.values()):
            for kind in _DASHES:
                entry = finding.summary["kinds"][kind]
                points = entry["photographs"]
                strengths = [0.0, *(point["strength"] for point in points)]
                _line(axes[0, 0], index, kind, strengths, [entry["file"], *(point["accuracy"] for point in points)])
                kept = [point for point in points if point.get("destruction") is not None]
                if kept:
                    destroyed = [point["destruction"] for point in kept]
                    _line(axes[0, 1], index, kind, [point["strength"] for point in kept], destroyed)
        for axis, text in ((axes[0, 0], "accuracy on photographs"), (axes[0, 1], "destruction rate")):
            axis.set_ylim(0, 1)
            axis.set_xlim(left=0)
            plots.percent(axis)
            axis.set_xlabel("strength of the channel")
            axis.set_ylabel(text)
        handles = [
            lines.Line2D([], [], color=plots.color(i), marker=plots.marker(i), label=run)
            for i, run in enumerate(findings)
        ]
        handles += [
            lines.Line2D([], [], color=plots.INK, linestyle=_DASHES[kind], label=_NAMES[kind]) for kind in _DASHES
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def photographs(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """Rows in pairs, file and photograph: clean images of the first run, then both attacks of each run."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    first = next(iter(shown.values())).records
    columns = len(first["exhibit/file/clean"])
    names = [str(name) for name in first["exhibit/class_names"]]
    rows = [("clean", 0, next(iter(shown)))]
    rows += [(kind, index, run) for index, run in enumerate(shown) for kind in ("digital", "expectation")]
    with plots.style():
        figure, axes = plots.figure(
            2 * len(rows), columns, width=max(1.25 * columns + 2.0, 4.4), height=1.42 * 2 * len(rows)
        )
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
        for position, (kind, index, run) in enumerate(rows):
            records = shown[run].records
            for offset, part in enumerate(("file", "photograph")):
                pixels = records[f"exhibit/{part}/{kind}"]
                predictions = records[f"{part}/{kind}"]
                predictions = predictions if part == "file" else predictions[:, -1]
                for column in range(min(columns, len(pixels))):
                    axis = axes[2 * position + offset, column]
                    plots.images(axis, pixels[column])
                    right = int(predictions[column]) == int(records["label"][column])
                    axis.set_title(
                        ("✓ " if right else "✗ ") + attack_figures.short(names[int(predictions[column])]),
                        **attack_figures.caption(plots.INK if right else plots.color(index), bold=not right),
                    )
                text = kind if kind == "clean" else f"{attack_figures.short(run)},\n{kind}"
                text = text if part == "file" else "photograph"
                color = plots.INK if kind == "clean" or part != "file" else plots.color(index)
                attack_figures.side(axes[2 * position + offset, 0], text, color)
    return figure


def _line(axis, index: int, kind: str, strengths: list[float], entries: list[Mapping]) -> None:
    values, low, high = (np.asarray([entry[key] for entry in entries]) for key in ("value", "low", "high"))
    if kind == "expectation":
        axis.fill_between(strengths, low, high, color=plots.color(index), alpha=0.15, linewidth=0)
    axis.plot(
        strengths,
        values,
        color=plots.color(index),
        linestyle=_DASHES[kind],
        linewidth=2.0 if kind == "expectation" else 1.4,
        marker=plots.marker(index),
        markersize=5.0 if kind == "expectation" else 3.5,
        clip_on=False,
        zorder=3,
    )
