"""Accuracy: how often, and how surely, is the model right on images that it has not seen?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import plots, programs, tables
from robust_vit.metrics import classification, statistics
from robust_vit.studies import forward, study

_CLASSES_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy(study.Study):
    """Top-1 and top-5 accuracy, negative log-likelihood and Brier score on the test images.

    Reads every test image once. Top-k among equal logits takes the lower index first, as argmax does. Intervals are over
    images: Clopper-Pearson for accuracies, percentile bootstrap for means. Two runs are compared on the same rows: exact
    McNemar for accuracy, sign-flip permutation for the others.

    Attributes:
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
      examples: how many test images, or None for all; the first so many in the order of the data set.
    """

    name: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "Accuracy"
    question: ClassVar[str] = "How often is the model right on images that it has never seen?"
    paper: ClassVar[str] = "Brier 1950; Clopper & Pearson 1934; McNemar 1947"
    captions: ClassVar[Mapping[str, str]] = {
        "accuracy": "Top-1 accuracy on the test images, with 95 % Clopper-Pearson intervals over images",
        "accuracy_by_class": "Accuracy on the images of each class, with 95 % Clopper-Pearson intervals over images",
    }

    batch: int | str = 256
    examples: int | None = None

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """One forward pass an image, padding included."""
        return len(self._stream(subject)) * self.batch, 0

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The forward pass."""
        return [forward.program(subject, self.batch, times=self.chunks(subject))]

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """Label, prediction, confidence, rank of the true class, loss, Brier score and margin of each image."""
        logits, real = forward.logits(subject, self._stream(subject).batch(index))
        labels = real["label"].astype(np.int32)
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits).astype(np.float32),
            "rank": classification.rank(logits, labels),
            "nll": classification.negative_log_likelihood(logits, labels).astype(np.float32),
            "brier": classification.brier(logits, labels).astype(np.float32),
            "margin": classification.margin(logits, labels).astype(np.float32),
        }
        if index == 0:
            records["exhibit/class_names"] = forward.class_names(subject)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Accuracies, losses and accuracy by class, each with its interval."""
        rank, labels = records["rank"], records["label"]
        names = [str(name) for name in records["exhibit/class_names"]]
        by_class = {
            name: _plain(statistics.proportion(np.sum(rank[labels == index] < 1), np.sum(labels == index)))
            for index, name in enumerate(names)
            if np.any(labels == index)
        }
        caveats = []
        if len(by_class) < len(names):
            caveats.append(
                f"The {len(labels)} images show {len(by_class)} of {len(names)} classes; the accuracy is over those."
            )
        summary = {
            "examples": len(labels),
            "top1": _plain(statistics.proportion(np.sum(rank < 1), len(rank))),
            "nll": _plain(statistics.mean(records["nll"])),
            "brier": _plain(statistics.mean(records["brier"])),
            "by_class": by_class,
            "caveats": caveats,
        }
        if len(names) > 5:
            summary["top5"] = _plain(statistics.proportion(np.sum(rank < 5), len(rank)))
        return summary

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Accuracy of each run, and by class where there are few enough to read."""
        if not findings:
            return {}
        figures = {"accuracy": _overall(findings)}
        names = [str(name) for name in next(iter(findings.values())).records["exhibit/class_names"]]
        if 1 < len(names) <= _CLASSES_SHOWN:
            figures["accuracy_by_class"] = _by_class(findings, names)
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Top-1 accuracy."""
        return {"accuracy": study.number(finding.summary["top1"], ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run."""
        rows = []
        for run, finding in findings.items():
            summary = finding.summary
            top5 = study.number(summary["top5"], ".2%") if "top5" in summary else None
            rows.append(
                (
                    run,
                    study.number(summary["top1"], ".2%"),
                    top5,
                    study.number(summary["nll"], ".3f"),
                    study.number(summary["brier"], ".3f"),
                    summary["examples"],
                )
            )
        return {
            "accuracy": tables.Table(
                "Accuracy on the test images",
                ("run", "top-1", "top-5", "NLL (nats)", "Brier score", "images"),
                rows,
                "95 % intervals over images: Clopper-Pearson for accuracies, bootstrap for the others. They do not hold "
                "the spread over training seeds.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Differences of accuracy, loss and Brier score on the rows that both read."""
        left, right = study.pair(first, second)
        if not len(left):
            return []
        right_first, right_second = first.records["rank"][left] < 1, second.records["rank"][right] < 1
        difference = statistics.paired_difference(right_first.astype(float), right_second.astype(float))
        test = statistics.mcnemar(right_first, right_second)
        found = [study.comparison("top-1 accuracy", difference, test, "+.2%")]
        for key, quantity in (("nll", "NLL (nats)"), ("brier", "Brier score")):
            pair = first.records[key][left], second.records[key][right]
            found.append(
                study.comparison(quantity, statistics.paired_difference(*pair), statistics.sign_flip(*pair), "+.3f")
            )
        return found


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    return dataclasses.asdict(interval)


def _overall(findings: Mapping[str, study.Finding]) -> matplotlib_figure.Figure:
    with plots.style():
        figure, axes = plots.figure(height=1.1 + 0.42 * len(findings))
        axis = axes[0, 0]
        for index, (run, finding) in enumerate(findings.items()):
            top1 = finding.summary["top1"]
            axis.errorbar(
                top1["value"],
                index,
                xerr=[[top1["value"] - top1["low"]], [top1["high"] - top1["value"]]],
                fmt=plots.marker(index),
                color=plots.color(index),
                markersize=7,
                elinewidth=2.5,
                label=run,
            )
            axis.annotate(
                f"{top1['value']:.1%}",
                (top1["value"], index),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axis.set_yticks(range(len(findings)), list(findings))
        axis.set_ylim(len(findings) - 0.4, -0.7)
        axis.margins(x=0.15)
        plots.percent(axis, "x")
        axis.set_xlabel("top-1 accuracy, 95 % interval over images")
        axis.grid(False, axis="y")
    return figure


def _by_class(findings: Mapping[str, study.Finding], names: list[str]) -> matplotlib_figure.Figure:
    with plots.style():
        figure, axes = plots.figure(height=1.3 + 0.34 * len(names))
        axis = axes[0, 0]
        shift = 0.5 / max(len(findings), 1)
        for index, (run, finding) in enumerate(findings.items()):
            shown = [
                (position, finding.summary["by_class"][name])
                for position, name in enumerate(names)
                if name in finding.summary["by_class"]
            ]
            value = np.asarray([entry["value"] for _, entry in shown])
            spread = [value - [entry["low"] for _, entry in shown], [entry["high"] for _, entry in shown] - value]
            axis.errorbar(
                value,
                [position + (index - 0.5 * (len(findings) - 1)) * shift for position, _ in shown],
                xerr=spread,
                fmt=plots.marker(index),
                color=plots.color(index),
                elinewidth=1.4,
                label=run,
            )
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        plots.percent(axis, "x")
        axis.set_xlabel("accuracy on the images of a class, 95 % interval over images")
        axis.grid(False, axis="y")
        if len(findings) > 1:
            plots.legend(axis, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
    return figure
