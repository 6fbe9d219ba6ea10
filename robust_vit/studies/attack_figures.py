"""The figures of attack studies: curves over epsilon, and images beside their perturbations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colors, lines, patches, ticker
from matplotlib import figure as matplotlib_figure

from robust_vit import plots
from robust_vit.studies import study

NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
_DASHES = ("-", (0, (4, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (8, 2)), (0, (3, 1, 1.2, 1, 1.2, 1)))
_RUNS_SHOWN = 4


def size_text(size: float) -> str:
    """An epsilon as people write it: 0.1 where that is all of it, else in 255ths where it is whole or half ones."""
    if abs(float(f"{size:.3g}") - size) < 1e-12:
        return f"{size:.3g}"
    levels = size * 255
    if abs(2 * levels - round(2 * levels)) < 1e-6:
        return f"{round(2 * levels) / 2:g}/255"
    return f"{size:.3g}"


def budget(summary: Mapping[str, Any]) -> str:
    """Norm and epsilon of a summary as people write them: "L∞, ε = 8/255"."""
    return f"{NORMS.get(summary['norm'], summary['norm'])}, ε = {size_text(summary['epsilon'])}"


def curves(findings: Mapping[str, study.Finding], attacks: Mapping[str, str]) -> matplotlib_figure.Figure:
    """Robust accuracy against epsilon: colour tells the run, dashes tell the attack; the last attack is solid.

    Args:
      findings: of `attack_curve`, by run.
      attacks: key in the summary's curves -> label, weakest first.
    """
    with plots.style():
        figure, axes = plots.figure(width=7.6, height=4.0)
        axis = axes[0, 0]
        dashes = {name: _DASHES[(len(attacks) - 1 - i) % len(_DASHES)] for i, name in enumerate(attacks)}
        for index, finding in enumerate(findings.values()):
            summary = finding.summary
            sizes = np.concatenate([[0.0], summary["epsilons"]])
            for name in filter(summary["curves"].get, attacks):
                points = [summary["clean"], *summary["curves"][name]]
                values, low, high = (np.asarray([p[key] for p in points]) for key in ("value", "low", "high"))
                strongest = name == next(reversed(attacks))
                if strongest:
                    axis.fill_between(sizes, low, high, color=plots.color(index), alpha=0.15, linewidth=0)
                axis.plot(
                    sizes,
                    values,
                    color=plots.color(index),
                    linestyle=dashes[name],
                    linewidth=2.0 if strongest else 1.4,
                    marker=plots.marker(index),
                    markersize=5.5 if strongest else 3.5,
                    clip_on=False,
                    zorder=3,
                )
                raw = np.asarray([point["raw"] for point in summary["curves"][name]])
                differs = np.abs(raw - values[1:]) > 1e-9
                if differs.any():
                    axis.plot(
                        sizes[1:][differs],
                        raw[differs],
                        linestyle="none",
                        marker="x",
                        color=plots.color(index),
                        markersize=4.5,
                        alpha=0.7,
                    )
        summary = next(iter(findings.values())).summary
        axis.axvline(summary["epsilon"], color=plots.INK, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.7)
        axis.annotate(
            f"ε = {size_text(summary['epsilon'])}",
            (summary["epsilon"], 1.0),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
        )
        axis.set_ylim(0, 1)
        axis.set_xlim(left=0)
        plots.percent(axis)
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        norm = NORMS.get(summary["norm"], summary["norm"])
        axis.set_xlabel(f"size ε of the perturbation, {norm}, pixels in [0, 1]")
        axis.set_ylabel("robust accuracy")
        handles = [
            lines.Line2D([], [], color=plots.color(i), marker=plots.marker(i), label=run)
            for i, run in enumerate(findings)
        ]
        handles += [
            lines.Line2D([], [], color=plots.INK, linestyle=dashes[name], label=label)
            for name, label in reversed(attacks.items())
        ]
        # Beside the curves: with many attacks there is no corner that all of them leave free.
        axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def examples(findings: Mapping[str, study.Finding], attack: str) -> matplotlib_figure.Figure:
    """The first images of the subset: clean, then each run's adversarial image and its perturbation, scaled to be seen."""
    shown = {run: f for run, f in findings.items() if "exhibit/adversarial" in f.records}
    shown = dict(list(shown.items())[:_RUNS_SHOWN])
    first = next(iter(shown.values())).records
    columns = len(first["exhibit/image"])
    names = [str(name) for name in first["exhibit/class_names"]]
    rows = 1 + 2 * len(shown)
    with plots.style():
        figure, axes = plots.figure(rows, columns, width=max(1.25 * columns + 1.3, 4.2), height=1.42 * rows)
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
        for column in range(columns):
            plots.images(axes[0, column], first["exhibit/image"][column])
            axes[0, column].set_title(short(names[first["label"][column]]), **caption())
        side(axes[0, 0], "clean", plots.INK)
        for index, (run, finding) in enumerate(shown.items()):
            records, summary = finding.records, finding.summary
            top, bottom = axes[1 + 2 * index], axes[2 + 2 * index]
            for column in range(min(columns, len(records["exhibit/adversarial"]))):
                adversarial = records["exhibit/adversarial"][column]
                plots.images(top[column], adversarial)
                # Not by the largest pixel: the same grey is the same change in every column and every run.
                change = (adversarial - records["exhibit/image"][column]) / _unit(summary, adversarial)
                plots.images(bottom[column], np.clip(0.5 + 0.5 * change, 0.0, 1.0))
                predicted = int(records["exhibit/prediction"][column])
                right = predicted == int(records["label"][column])
                same = not right and np.array_equal(adversarial, records["exhibit/image"][column])
                top[column].set_title(
                    ("✓ " if right else "✗ ") + short(names[predicted]) + (" (as it is)" if same else ""),
                    **caption(plots.INK if right else plots.color(index), bold=not right),
                )
            side(top[0], run, plots.color(index))
            side(bottom[0], "change", plots.INK)
        summary = next(iter(shown.values())).summary
        norm = NORMS.get(summary["norm"], summary["norm"])
        figure.suptitle(
            f"{attack}, {norm}, ε = {size_text(summary['epsilon'])}",
            fontsize=10,
            fontweight="bold",
            x=0.01,
            ha="left",
        )
    return figure


def matrix(
    findings: Mapping[str, study.Finding], targets: Sequence[str], attacks: Mapping[str, str]
) -> matplotlib_figure.Figure:
    """How often images made on the row's run fool the column's, one panel an attack; the stronger the darker.

    Args:
      findings: of `transfer`, by run.
      targets: the columns.
      attacks: key in the summary -> label.
    """
    rows, columns = len(findings), len(targets)
    with plots.style():
        width = len(attacks) * max(0.85 * columns, 2.6) + 1.6
        figure, axes = plots.figure(1, len(attacks), width=width, height=0.62 * rows + 1.5, share_y=True)
        for axis, (attack, title) in zip(axes[0], attacks.items(), strict=True):
            for row, finding in enumerate(findings.values()):
                for column, target in enumerate(targets):
                    entry = finding.summary["attacked"].get(attack, {}).get(target, {}).get("rate")
                    if entry is None:
                        continue
                    own = target == finding.summary["source"]
                    cell = patches.Rectangle(
                        (column - 0.47, row - 0.45),
                        0.94,
                        0.9,
                        facecolor=(*colors.to_rgb(plots.color(0)), 0.06 + 0.6 * entry["value"]),
                        edgecolor=plots.INK if own else "none",
                        linewidth=1.2,
                    )
                    axis.add_patch(cell)
                    axis.annotate(f"{entry['value']:.0%}", (column, row), ha="center", va="center", fontsize=10)
            axis.set_xlim(-0.55, columns - 0.45)
            axis.set_ylim(rows - 0.45, -0.55)
            axis.set_xticks(range(columns), targets)
            axis.set_yticks(range(rows), list(findings))
            axis.grid(False)
            axis.tick_params(length=0)
            for spine in axis.spines.values():
                spine.set_visible(False)
            axis.set_title(title)
            axis.set_xlabel("shown to")
        axes[0, 0].set_ylabel("made on")
    return figure


def progression(findings: Mapping[str, study.Finding], attacks: Mapping[str, str]) -> matplotlib_figure.Figure:
    """Mean loss, and the share still right below it, against the steps; one column an attack.

    Args:
      findings: of `loss_progression`, by run.
      attacks: key in the summary -> label.
    """
    with plots.style():
        width = 3.4 * len(attacks) + 1.0
        figure, axes = plots.figure(
            2, len(attacks), width=width, height=4.8, share_x="col", share_y="row", ratios=(3, 2)
        )
        for column, (attack, title) in enumerate(attacks.items()):
            for row, key in enumerate(("loss", "right")):
                axis = axes[row, column]
                for index, (run, finding) in enumerate(findings.items()):
                    points = finding.summary["curves"].get(attack, {}).get(key, [])
                    values, low, high = (
                        np.asarray([point[end] for point in points]) for end in ("value", "low", "high")
                    )
                    steps = np.arange(len(values))
                    axis.fill_between(steps, low, high, color=plots.color(index), alpha=0.15, linewidth=0)
                    marker = {"marker": plots.marker(index), "markersize": 4}
                    axis.plot(steps, values, color=plots.color(index), label=run, **marker)
                axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
            axes[0, column].set_title(f"{title}, {budget(next(iter(findings.values())).summary)}")
            axes[1, column].set_xlabel("steps of the attack")
        axes[0, 0].set_ylim(bottom=0)
        axes[1, 0].set_ylim(0, 1)
        plots.percent(axes[1, 0])
        axes[0, 0].set_ylabel("cross-entropy (nats)")
        axes[1, 0].set_ylabel("still right")
        plots.legend(axes[0, 0], loc="upper left")
    return figure


def _unit(summary: Mapping[str, Any], image: np.ndarray) -> float:
    """The change of a pixel that is drawn black or white: epsilon, or three times its root mean square share in L2."""
    if summary["norm"] == "linf":
        return summary["epsilon"]
    return 3.0 * summary["epsilon"] / np.sqrt(image.size)


def caption(color: str = plots.INK, *, bold: bool = False) -> dict[str, Any]:
    """How the line above a small image is set."""
    return {"fontsize": 8, "color": color, "loc": "center", "pad": 3, "fontweight": "bold" if bold else "normal"}


def side(axis: Any, text: str, color: str) -> None:
    """Names a row of small images at its left."""
    axis.set_ylabel(text, color=color, rotation=0, ha="right", va="center", fontsize=9)


def short(name: str) -> str:
    """A class name that fits above a small image."""
    return name if len(name) <= 14 else name[:13] + "…"
