"""The figures of patch studies: accuracy over area, and patches beside images that wear them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import lines

from robust_vit import plots
from robust_vit.studies import attack_figures, study

_RUNS_SHOWN = 4
_DASHES = {"patch": "-", "noise": (0, (4, 2))}


def curves(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """Accuracy against covered area: colour tells the run, dashes the noise."""
    with plots.style():
        figure, axes = plots.figure(width=6.4, height=3.9)
        axis = axes[0, 0]
        for index, finding in enumerate(findings.values()):
            summary = finding.summary
            areas = np.concatenate([[0.0], summary["areas"]])
            for name in _DASHES:
                points = summary["curves"][name]
                entries = [summary["clean"], *(point["accuracy"] for point in points)]
                values, low, high = (np.asarray([entry[key] for entry in entries]) for key in ("value", "low", "high"))
                if name == "patch":
                    axis.fill_between(areas, low, high, color=plots.color(index), alpha=0.15, linewidth=0)
                axis.plot(
                    areas,
                    values,
                    color=plots.color(index),
                    linestyle=_DASHES[name],
                    linewidth=2.0 if name == "patch" else 1.4,
                    marker=plots.marker(index),
                    markersize=5.5 if name == "patch" else 3.5,
                    clip_on=False,
                    zorder=3,
                )
        axis.set_ylim(0, 1)
        axis.set_xlim(left=0)
        plots.percent(axis)
        plots.percent(axis, "x")
        axis.set_xlabel("share of the image that is covered")
        axis.set_ylabel("accuracy")
        handles = [
            lines.Line2D([], [], color=plots.color(i), marker=plots.marker(i), label=run)
            for i, run in enumerate(findings)
        ]
        handles += [
            lines.Line2D([], [], color=plots.INK, linestyle=_DASHES[name], label=text)
            for name, text in (("patch", "learned patch"), ("noise", "noise"))
        ]
        axis.legend(handles=handles, loc="lower left")
    return figure


def patches(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """A row a run: its patch, and the first images with it at the largest area."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    first = next(iter(shown.values())).records
    columns = 1 + len(first["exhibit/patched"])
    names = [str(name) for name in first["exhibit/class_names"]]
    with plots.style():
        figure, axes = plots.figure(
            len(shown), columns, width=max(1.25 * columns + 1.3, 4.2), height=0.3 + 1.5 * len(shown)
        )
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
        for row, (run, finding) in enumerate(shown.items()):
            records = finding.records
            plots.images(axes[row, 0], records["exhibit/texture"])
            axes[row, 0].set_title("the patch", **attack_figures.caption())
            attack_figures.side(axes[row, 0], run, plots.color(row))
            for column, image in enumerate(records["exhibit/patched"][: columns - 1]):
                axis = axes[row, column + 1]
                plots.images(axis, image)
                predicted = int(records["prediction/patch"][column, -1])
                right = predicted == int(records["label"][column])
                axis.set_title(
                    ("✓ " if right else "✗ ") + attack_figures.short(names[predicted]),
                    **attack_figures.caption(plots.INK if right else plots.color(row), bold=not right),
                )
    return figure
