"""The figures of the study of turns and shifts: accuracy against their limits, and images at their worst."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import lines

from robust_vit import plots
from robust_vit.studies import study

_DASHES = ("-", (0, (4, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
_RUNS_SHOWN = 4


def limits(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """Accuracy against the largest turn: colour tells the run, dashes tell the largest shift; the farthest solid."""
    with plots.style():
        figure, axes = plots.figure(width=6.8, height=4.0)
        axis = axes[0, 0]
        shifts: dict[str, object] = {}
        for index, finding in enumerate(findings.values()):
            curves = finding.summary["limits"]
            width = finding.summary["size"][1]
            for place, curve in enumerate(reversed(curves)):
                dashes = _DASHES[place % len(_DASHES)]
                shifts[f"shift up to {curve['shift'] * width:.3g} px" if curve["shift"] else "no shift"] = dashes
                value, low, high = (np.asarray([p[key] for p in curve["accuracy"]]) for key in ("value", "low", "high"))
                if place == 0:
                    axis.fill_between(curve["degrees"], low, high, color=plots.color(index), alpha=0.15, linewidth=0)
                axis.plot(
                    curve["degrees"],
                    value,
                    color=plots.color(index),
                    linestyle=dashes,
                    linewidth=2.0 if place == 0 else 1.4,
                    marker=plots.marker(index),
                    markersize=5.0 if place == 0 else 3.0,
                    clip_on=False,
                    zorder=3,
                )
        axis.set_ylim(0, 1)
        axis.set_xlim(left=0)
        plots.percent(axis)
        axis.set_xlabel("largest turn to either side, degrees")
        axis.set_ylabel("accuracy at the worst of the grid")
        handles = [
            lines.Line2D([], [], color=plots.color(i), marker=plots.marker(i), label=run)
            for i, run in enumerate(findings)
        ]
        handles += [
            lines.Line2D([], [], color=plots.INK, linestyle=dashes, label=text) for text, dashes in shifts.items()
        ]
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def examples(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """The first images of the subset: as they are, then under each run's worst turn and shift."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    first = next(iter(shown.values())).records
    columns, rows = len(first["exhibit/image"]), 1 + len(shown)
    names = [str(name) for name in first["exhibit/class_names"]]
    with plots.style():
        figure, axes = plots.figure(rows, columns, width=max(1.25 * columns + 1.3, 4.2), height=1.6 * rows)
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
        for column in range(columns):
            plots.images(axes[0, column], first["exhibit/image"][column])
            axes[0, column].set_title(_short(names[first["label"][column]]), **_caption(plots.INK))
        _side(axes[0, 0], "clean", plots.INK)
        for index, (run, finding) in enumerate(shown.items()):
            records = finding.records
            height, width = finding.summary["size"]
            for column in range(min(columns, len(records["exhibit/worst"]))):
                axis = axes[1 + index, column]
                plots.images(axis, records["exhibit/worst"][column])
                predicted = int(records["prediction/grid"][column])
                right = predicted == int(records["label"][column])
                axis.set_title(
                    ("✓ " if right else "✗ ") + _short(names[predicted]),
                    **_caption(plots.INK if right else plots.color(index), bold=not right),
                )
                across, down, turn = records["worst/grid"][column]
                # Adding zero turns a negative zero into a plain one.
                text = f"{turn + 0.0:+.0f}°, ({across * width + 0.0:+.2g}, {down * height + 0.0:+.2g}) px"
                axis.set_xlabel(text, fontsize=7, labelpad=2)
            _side(axes[1 + index, 0], run, plots.color(index))
    return figure


def _caption(color: str, *, bold: bool = False) -> dict[str, object]:
    return {"fontsize": 8, "color": color, "loc": "center", "pad": 3, "fontweight": "bold" if bold else "normal"}


def _side(axis: object, text: str, color: str) -> None:
    axis.set_ylabel(text, color=color, rotation=0, ha="right", va="center", fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
