"""The figures of Hessian spectra: pooled eigenvalues, overlaps of eigenspaces, blocks of the parameters."""

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

from robust_vit import plots
from robust_vit.studies import spectrum_numbers, study, training_loss

_EARLY = training_loss.EARLY


def ridges(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """The density of the pooled eigenvalues, one ridge a run, with a stroke for each; the early phase dotted."""
    pooled = {run: _phases(finding.records) for run, finding in findings.items()}
    everything = np.concatenate([values for phases in pooled.values() for values in phases.values()])
    sizes = np.abs(everything[everything != 0.0])
    largest = sizes.max() if len(sizes) else 1.0
    # Runs differ by orders of magnitude: linear near zero, logarithmic beyond, so that signs and tails both show.
    smallest = max(np.quantile(sizes, 0.05) if len(sizes) else 1.0, largest * 1e-4)
    width = 10.0 ** math.floor(math.log10(smallest))
    low, high = np.arcsinh(everything.min() / width), np.arcsinh(everything.max() / width)
    pad = 0.12 * max(high - low, 0.5)
    grid = np.linspace(min(low, 0.0) - pad, high + pad, 400)
    with plots.style():
        both = any(len(phases) > 1 for phases in pooled.values())
        figure, axes = plots.figure(len(pooled), 1, height=1.0 + (1.5 if both else 1.15) * len(pooled), share_x=True)
        for index, (run, phases) in enumerate(pooled.items()):
            axis = axes[index, 0]
            curves = {phase: _density(np.arcsinh(values / width), grid) for phase, values in phases.items()}
            height = max((curve.max() for curve in curves.values() if curve is not None), default=1.0)
            for row, (phase, values) in enumerate(phases.items()):
                _ridge(axis, np.sinh(grid) * width, curves[phase], phase, plots.color(index))
                style = {"color": plots.color(index), "alpha": 0.8 if phase == "end" else 0.45, "markersize": 7}
                axis.plot(values, np.full(len(values), -(0.1 + 0.16 * row) * height), "|", **style)
            axis.set_ylim(-(0.06 + 0.16 * len(phases)) * height, 1.12 * height)
            axis.axvline(0.0, color=plots.INK, linewidth=1.0, linestyle=(0, (4, 3)))
            axis.set_xscale("asinh", linear_width=width)
            decades = width * 10.0 ** np.arange(math.ceil(math.log10(largest / width)) + 1)
            axis.xaxis.set_major_locator(ticker.FixedLocator([*-decades[::-1], 0.0, *decades]))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
            axis.set_xlim(np.sinh(grid[0]) * width, np.sinh(grid[-1]) * width)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            axis.set_title(run, fontsize=10, pad=4)
            words = [_words(findings[run].summary, phase, named=len(phases) > 1) for phase in reversed(phases)]
            axis.set_title("\n".join(words), loc="right", fontsize=9, fontweight="normal", pad=4)
        axes[-1, 0].set_xlabel(f"Hessian eigenvalue of a mini-batch, in nats (top {_top(findings)} by magnitude)")
    return figure


def overlaps(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """Overlaps of top eigenspaces of each run: between mini-batches in each phase, and between the phases."""
    kinds = {
        f"{_EARLY}overlap": "two mini-batches,\nearly phase",
        "overlap": "two mini-batches,\nend of training",
        f"{_EARLY}overlap_with_end": "early phase and end,\none mini-batch",
    }
    shown = [kind for kind in kinds if any(kind in finding.records for finding in findings.values())]
    with plots.style():
        figure, axes = plots.figure(1, 1, width=2.2 + 1.6 * len(shown), height=3.6)
        axis = axes[0, 0]
        for index, (run, finding) in enumerate(findings.items()):
            offset = (index - (len(findings) - 1) / 2) * min(0.24, 0.7 / len(findings))
            label = run
            for place, kind in enumerate(shown):
                if kind not in finding.records:
                    continue
                values = finding.records[kind]
                values = values[np.isfinite(values)]
                style = {"color": plots.color(index), "marker": plots.marker(index), "linestyle": "none"}
                axis.plot(
                    np.full(len(values), place + offset), values, alpha=0.35, markersize=4, markeredgewidth=0, **style
                )
                entry = _overlap_entry(finding.summary, kind)
                if entry is not None:
                    bar = [[entry["value"] - entry["low"]], [entry["high"] - entry["value"]]]
                    place_of_mean = place + offset + min(0.08, 0.3 / len(findings))
                    axis.errorbar([place_of_mean], [entry["value"]], bar, label=label, capsize=3, **style)
                    label = None
        axis.set_xticks(range(len(shown)), [kinds[kind] for kind in shown])
        axis.set_xlim(-0.5, len(shown) - 0.5)
        axis.set_ylim(-0.02, 1.02)
        axis.set_ylabel(f"overlap of the top {_top(findings)} eigenvectors")
        axis.grid(False, axis="x")
        plots.legend(axis, loc="best")
    return figure


def blocks(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    """The top eigenvalues of each block of the parameters, from the stem to the head: one panel a run."""
    most = max(len(finding.summary["blocks"]) for finding in findings.values())
    with plots.style():
        figure, axes = plots.figure(
            1, len(findings), width=min(3.4 * len(findings) + 0.6, 11.0), height=1.3 + 0.24 * most, share_x=True
        )
        for index, (run, finding) in enumerate(findings.items()):
            axis = axes[0, index]
            prefixes = {"end": ""} | ({"early": _EARLY} if "early" in finding.summary else {})
            for phase, prefix in prefixes.items():
                # The summary went through JSON, which knows no order; the records do.
                entries = spectrum_numbers.blocks(finding.records, prefix)
                shift = 0.0 if len(prefixes) == 1 else -0.18 if prefix else 0.18
                for place, entry in enumerate(entries.values()):
                    label = phase if place == 0 and len(prefixes) > 1 else None
                    _block(axis, place + shift, entry, index, early=bool(prefix), label=label)
            axis.set_yticks(range(len(entries)), entries)
            axis.set_ylim(len(entries) - 0.5, -0.5)
            plots.logarithmic(axis, "x")
            axis.set_title(run)
            axis.set_xlabel("|λ| in the block (nats)")
            plots.legend(axis, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    return figure


def _block(
    axis: matplotlib_axes.Axes, height: float, entry: Mapping[str, Any], index: int, *, early: bool, label: str | None
) -> None:
    """The largest magnitude with its interval, and the next ones smaller; hollow where they are mostly negative."""
    color, opacity = plots.color(index), 0.5 if early else 1.0
    for rank, (size, negative) in enumerate(zip(entry["magnitudes"], entry["negatives"], strict=True)):
        largest = rank == 0
        if largest:
            axis.plot([size["low"], size["high"]], [height] * 2, color=color, linewidth=1.2, alpha=opacity)
        axis.plot(
            [size["value"]],
            [height],
            color=color,
            marker=plots.marker(index),
            markersize=(3.5 if early else 5.5) if largest else 2.2,
            markerfacecolor="none" if negative > 0.5 else color,
            markeredgewidth=1.0 if largest else 0.6,
            alpha=1.0 if largest else 0.7,
            linestyle="none",
            label=label if largest else None,
        )


def _phases(records: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, " values"]]:
    found = {"end": np.sort(records["eigenvalues"].ravel())}
    if f"{_EARLY}eigenvalues" in records:
        found["early"] = np.sort(records[f"{_EARLY}eigenvalues"].ravel())
    return found


def _ridge(axis: matplotlib_axes.Axes, at: np.ndarray, curve: np.ndarray | None, phase: str, color: str) -> None:
    if curve is None:
        return
    if phase == "end":
        axis.fill_between(at, curve, color=color, alpha=0.25, linewidth=0)
        axis.plot(at, curve, color=color)
    else:
        axis.plot(at, curve, color=color, linestyle=(0, (1, 1.2)), linewidth=1.6)


def _words(summary: Mapping[str, Any], phase: str, *, named: bool) -> str:
    part = summary if phase == "end" else summary["early"]
    name = f"early (step {part['step']:,}): " if phase == "early" else "end: " if named else ""
    return f"{name}negative {part['nep']['value']:.0%}, mean positive {part['ape']['value']:.3g}"


def _overlap_entry(summary: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    part = summary["early"] if kind.startswith(_EARLY) else summary
    return part.get(kind.removeprefix(_EARLY))


def _density(points: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Kernel density reflected at zero, so that smoothing moves no mass across the sign; None of points that are all one."""
    if np.ptp(points) <= 1e-6:
        return None
    # Of magnitudes: two signs far from zero are no reason to blur either.
    width = max(0.35 * np.abs(points).std(), 0.05)
    kernels = scipy.stats.norm.pdf((grid[:, None] - points) / width) + scipy.stats.norm.pdf(
        (grid[:, None] + points) / width
    )
    return np.where((grid[:, None] >= 0) == (points >= 0), kernels, 0.0).mean(axis=1) / width


def _top(findings: Mapping[str, study.Finding]) -> int:
    return max(finding.records["eigenvalues"].shape[1] for finding in findings.values())
