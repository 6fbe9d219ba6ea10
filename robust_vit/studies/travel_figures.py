"""The figures of travel to the decision boundary: length against confidence, and the images that stand there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker

from robust_vit import plots
from robust_vit.studies import attack_figures, study

_RUNS_SHOWN = 4


def psnr(change: Float[np.ndarray, " examples"]) -> Float[np.ndarray, " examples"]:
    """Peak signal-to-noise ratio in dB of a root mean square change of pixels in [0, 1]."""
    return -20.0 * np.log10(np.maximum(change, 1e-12))


def confidence(
    findings: Mapping[str, study.Finding], starts: Mapping[str, str], limit: float
) -> matplotlib_figure.Figure:
    """Length of travel against the confidence of the unmoved image: one panel a start, one colour a run."""
    with plots.style():
        figure, axes = plots.figure(1, len(starts), width=4.4 * len(starts), height=3.9, share_x=True, share_y=True)
        for column, (name, words) in enumerate(starts.items()):
            axis = axes[0, column]
            for index, (run, finding) in enumerate(findings.items()):
                records = finding.records
                chosen = records["correct"] & (records["epsilon/start"] > 0)
                if name == "jump":
                    chosen = chosen & ~records["flipped"]
                lengths, crossed = records[f"epsilon/{name}"][chosen], records[f"crossed/{name}"][chosen]
                places = np.clip(records["confidence"][chosen], *plots.CONFIDENCES)
                style = {"color": plots.color(index), "linestyle": "none", "alpha": 0.35, "markeredgewidth": 0}
                axis.plot(places[crossed], lengths[crossed], marker=plots.marker(index), markersize=3.5, **style)
                axis.plot(places[~crossed], lengths[~crossed], marker=6, markersize=6, **style)
                bins = finding.summary["starts"][name]["bins"]
                axis.plot(
                    np.clip([entry["confidence"] for entry in bins], *plots.CONFIDENCES),
                    [entry["mean"] for entry in bins],
                    color=plots.color(index),
                    marker=plots.marker(index),
                    markersize=5,
                    label=run,
                    zorder=3,
                )
            plots.logarithmic(axis)
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_title(words)
            axis.set_xlabel("confidence of the unmoved image")
            plots.confidence(axis)
        axes[0, 0].set_ylim(top=min(1.3 * axes[0, 0].get_ylim()[1], 1.3 * limit))
        axes[0, 0].set_ylabel("ε to the boundary (RMS change of a pixel)")
        plots.legend(axes[0, 0], loc="best")
    return figure


def boundary(findings: Mapping[str, study.Finding], jump: float) -> matplotlib_figure.Figure:
    """The first images, jumped, and at the boundary of each run before and after the jump, with ε and PSNR."""
    shown = dict(list(findings.items())[:_RUNS_SHOWN])
    first = next(iter(shown.values())).records
    columns, rows = len(first["exhibit/start"]), 2 + 2 * len(shown)
    names = [str(name) for name in first["exhibit/class_names"]]
    with plots.style():
        figure, axes = plots.figure(rows, columns, width=max(1.25 * columns + 1.6, 4.2), height=1.6 * rows)
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
        for column in range(columns):
            plots.images(axes[0, column], first["exhibit/start"][column])
            label = names[first["label"][column]]
            axes[0, column].set_title(attack_figures.short(label), **attack_figures.caption())
            plots.images(axes[1, column], first["exhibit/jump"][column])
            change = np.sqrt(np.mean((first["exhibit/jump"][column] - first["exhibit/start"][column]) ** 2))
            axes[1, column].set_title(f"{psnr(change):.1f} dB", **attack_figures.caption())
        attack_figures.side(axes[0, 0], "image", plots.INK)
        attack_figures.side(axes[1, 0], f"jumped\nby {jump:g}", plots.INK)
        for index, (run, finding) in enumerate(shown.items()):
            records = finding.records
            for offset, (name, words) in enumerate((("start", "at the\nboundary"), ("jump", "after\nthe jump"))):
                line = axes[2 + 2 * index + offset]
                for column in range(min(columns, len(records[f"exhibit/end/{name}"]))):
                    plots.images(line[column], records[f"exhibit/end/{name}"][column])
                    text = _text(records, name, column)
                    line[column].set_title(text, **attack_figures.caption(plots.color(index)))
                attack_figures.side(line[0], f"{run}\n{words}", plots.color(index))
    return figure


def _text(records: Mapping[str, np.ndarray], name: str, column: int) -> str:
    if not records["correct"][column]:
        return "wrong as it is"
    if name == "jump" and records["flipped"][column]:
        return "flipped by\nthe jump"
    length = records[f"epsilon/{name}"][column]
    sign = "=" if records[f"crossed/{name}"][column] else ">"
    return f"ε {sign} {length:.3g}\n{psnr(records[f'change/{name}'][column]):.1f} dB"
