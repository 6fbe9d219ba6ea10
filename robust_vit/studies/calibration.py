"""Calibration: when the model says 80 %, is it right four times in five?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib import figure as matplotlib_figure
from matplotlib import patches

from robust_vit import plots, programs, tables
from robust_vit.metrics import calibration, classification, statistics
from robust_vit.studies import forward, study

_VERSIONS = {"raw": "confidence", "scaled": "confidence_scaled"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(study.Study):
    """Calibration errors and the reliability diagram, as the model is and after temperature scaling.

    Protocol of Kim et al. 2022 (arXiv 2210.05742, figure 2): ten equal bins (lo, hi] of the largest softmax probability,
    ECE = Σ w |accuracy − confidence|, signed ECE = Σ w (accuracy − confidence), positive where under-confident; bars
    shaded by their share of the images. Park & Kim 2022 (arXiv 2202.06709) give the signed error the opposite sign; both
    are reported by name. Departures: an empty bin has no bar (the original draws its midpoint, with weight 0); beside the
    plug-in error stand a median-unbiased one with an interval, the debiased one of Kumar et al. 2019, a consistency test, the
    adaptive error and the smooth error
    (Błasiok & Nakkiran 2023). The temperature is fitted on validation images alone (Guo et al. 2017).

    Attributes:
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
      examples: how many test images, or None for all.
      validation_examples: how many validation images fit the temperature, or None for all.
      bins: of the plug-in, debiased and adaptive errors.
      draws: of the bootstrap and of the consistency test.
    """

    name: ClassVar[str] = "calibration"
    title: ClassVar[str] = "Calibration"
    question: ClassVar[str] = "When the model says that it is 80 % sure, is it right four times in five?"
    paper: ClassVar[str] = "Kim et al. 2022, arXiv 2210.05742, figure 2; Park & Kim 2022, arXiv 2202.06709"
    captions: ClassVar[Mapping[str, str]] = {
        "reliability": (
            "Accuracy against confidence; on the diagonal a model is as often right as it says. A bar is a bin of confidence, "
            "darker where it holds more images; the line is the same model after temperature scaling"
        ),
    }

    batch: int | str = 256
    examples: int | None = None
    validation_examples: int | None = None
    bins: int = 10
    draws: int = 500

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def chunks(self, subject: study.Subject) -> int:
        """One a batch of test images."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """One forward pass a test and a validation image, padding included."""
        count = len(self._stream(subject))
        if subject.validation is not None:
            count += len(subject.validation.with_batch(self.batch, limit=self.validation_examples))
        return count * self.batch, 0

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The forward pass, over test and validation images."""
        return [forward.program(subject, self.batch, times=self.passes(subject)[0] // self.batch)]

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """Label, prediction, confidence and loss of each image, before and after temperature scaling."""
        logits, real = forward.logits(subject, self._stream(subject).batch(index))
        labels = real["label"].astype(np.int32)
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits),
            "nll": classification.negative_log_likelihood(logits, labels),
        }
        fitted = forward.temperature(subject, batch=self.batch, limit=self.validation_examples)
        if fitted is not None:
            records["confidence_scaled"] = classification.confidence(logits, temperature=fitted.value)
            records["nll_scaled"] = classification.negative_log_likelihood(logits / fitted.value, labels)
            if index == 0:
                records["exhibit/temperature"] = np.asarray(
                    [fitted.value, fitted.before, fitted.after, float(fitted.at_bound)]
                )
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Every error with its interval, the diagrams, and what the temperature did."""
        correct = records["prediction"] == records["label"]
        summary: dict[str, Any] = {"examples": len(correct), "caveats": []}
        for version, key in _VERSIONS.items():
            if key in records:
                nll = records["nll" if version == "raw" else "nll_scaled"]
                summary[version] = self._errors(records[key], correct, nll)
        if "exhibit/temperature" in records:
            value, before, after, at_bound = records["exhibit/temperature"].tolist()
            summary["temperature"] = {"value": value, "validation_nll": {"before": before, "after": after}}
            if at_bound:
                summary["caveats"].append(
                    f"The fitted temperature {value:g} is at the end of the interval searched: the validation images "
                    "do not determine it (all of them right, or chance level)."
                )
        else:
            summary["caveats"].append(
                "There are no validation images, so no temperature was fitted: fitting it on test images would flatter."
            )
        if len(correct) < 50 * self.bins:
            summary["caveats"].append(
                f"{len(correct)} images in {self.bins} bins: a perfectly calibrated model would show a plug-in error of "
                "several points; read the debiased error and the consistency test."
            )
        return summary

    def _errors(self, confidences: np.ndarray, correct: np.ndarray, nll: np.ndarray) -> dict[str, Any]:
        diagram = calibration.reliability(confidences, correct, bins=self.bins)
        interval = calibration.error_interval(confidences, correct, bins=self.bins, draws=self.draws)
        signed = statistics.mean(correct - confidences)
        consistency = calibration.consistency(confidences, correct, bins=self.bins, draws=self.draws)
        return {
            "accuracy": float(correct.mean()),
            "mean_confidence": float(confidences.mean()),
            "ece": calibration.expected_error(confidences, correct, bins=self.bins),
            "ece_debiased": dataclasses.asdict(interval),
            "ece_kumar": calibration.debiased_error(confidences, correct, bins=self.bins),
            "squared_error_debiased": calibration.debiased_squared_error(confidences, correct, bins=self.bins),
            "ece_adaptive": calibration.expected_error(confidences, correct, bins=self.bins, binning="mass"),
            "ece_smooth": calibration.smooth_error(confidences, correct),
            "signed_kim": dataclasses.asdict(signed),
            "signed_park": {
                **dataclasses.asdict(signed),
                "value": -signed.value,
                "low": -signed.high,
                "high": -signed.low,
            },
            "consistency": dataclasses.asdict(consistency),
            "nll": dataclasses.asdict(statistics.mean(nll)),
            "diagram": {
                "edges": diagram.edges.tolist(),
                "counts": diagram.counts.tolist(),
                "accuracy": [None if math.isnan(value) else value for value in diagram.accuracy.tolist()],
                "confidence": [None if math.isnan(value) else value for value in diagram.confidence.tolist()],
            },
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """One reliability diagram a run."""
        if not findings:
            return {}
        columns = min(len(findings), 3)
        rows = -(-len(findings) // columns)
        with plots.style():
            figure, axes = plots.figure(
                rows, columns, width=max(3.3 * columns, 4.2), height=3.55 * rows + 0.2, share_x=True, share_y=True
            )
            for index, (run, finding) in enumerate(findings.items()):
                _diagram(axes.flat[index], run, finding.summary, plots.color(index))
            for axis in axes.flat[len(findings) :]:
                axis.set_visible(False)
            for axis in axes[-1]:
                axis.set_xlabel("confidence")
            for axis in axes[:, 0]:
                axis.set_ylabel("accuracy")
            handles, labels = axes[0, 0].get_legend_handles_labels()
            handles.insert(0, patches.Patch(color=plots.INK, alpha=0.4))
            labels.insert(0, "bin (darker: more images)")
            figure.legend(handles, labels, loc="outside lower center", ncols=3 if columns > 1 else 1)
            # Square axes leave room that the plain constrained layout does not know of: titles were cut off.
            figure.set_layout_engine("compressed")
            figure.get_layout_engine().set(wspace=0.08)
        return {"reliability": figure}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The debiased error of the model as it is."""
        return {"calibration error": study.number(finding.summary["raw"]["ece_debiased"], ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """Two rows a run: as it is, and after temperature scaling."""
        rows = []
        for run, finding in findings.items():
            for version in _VERSIONS:
                if version not in finding.summary:
                    continue
                entry = finding.summary[version]
                temperature = finding.summary["temperature"]["value"] if version == "scaled" else 1.0
                rows.append(
                    (
                        run,
                        tables.Number(temperature, format=".3f"),
                        tables.Number(entry["ece"], format=".2%"),
                        study.number(entry["ece_debiased"], ".2%"),
                        tables.Number(entry["ece_adaptive"], format=".2%"),
                        tables.Number(entry["ece_smooth"], format=".2%"),
                        study.number(entry["signed_kim"], "+.2%"),
                        tables.Number(entry["signed_park"]["value"], format="+.2%"),
                        tables.Number(entry["consistency"]["p_value"], format=".3f"),
                        study.number(entry["nll"], ".3f"),
                    )
                )
        return {
            "calibration": tables.Table(
                "Calibration errors",
                (
                    "run",
                    "temperature",
                    "ECE",
                    "ECE, debiased",
                    "ECE, adaptive",
                    "smooth ECE",
                    "signed, Kim et al. (+ under-confident)",
                    "signed, Park & Kim (+ over-confident)",
                    "p of being calibrated",
                    "NLL (nats)",
                ),
                rows,
                f"{self.bins} bins (lo, hi] of the largest probability; 95 % intervals over images (test inversion for "
                "the debiased ECE, bootstrap for the others). A "
                "temperature other than 1 was fitted on validation images. The p-value is one-sided: how often a "
                "calibrated model with these confidences shows at least this plug-in ECE.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Differences of the debiased and the signed error on the rows that both read."""
        left, right = study.pair(first, second)
        if not len(left):
            return []
        pairs = []
        for finding, rows in ((first, left), (second, right)):
            correct = finding.records["prediction"][rows] == finding.records["label"][rows]
            pairs.append((finding.records["confidence"][rows], correct))

        def debiased(*pair: np.ndarray) -> float:
            return calibration.debiased_error(*pair, bins=self.bins)

        error = statistics.bootstrap(
            lambda a, b, c, d: debiased(c, d) - debiased(a, b), *pairs[0], *pairs[1], draws=self.draws, pivotal=True
        )
        signed = [correct - confidence for confidence, correct in pairs]
        return [
            study.comparison("ECE, debiased", error, statistics.swap(debiased, *pairs, draws=self.draws), "+.2%"),
            study.comparison(
                "signed ECE (Kim et al.)", statistics.paired_difference(*signed), statistics.sign_flip(*signed), "+.2%"
            ),
        ]


def _diagram(axis: Any, run: str, summary: Mapping[str, Any], color: str) -> None:
    raw = summary["raw"]
    edges, counts = np.asarray(raw["diagram"]["edges"]), np.asarray(raw["diagram"]["counts"])
    share = counts / counts.sum()
    axis.plot([0, 1], [0, 1], color=plots.INK, linestyle=(0, (4, 3)), linewidth=1.0, label="calibrated", zorder=1)
    for index in np.flatnonzero(counts):
        low, high = edges[index], edges[index + 1]
        accuracy = raw["diagram"]["accuracy"][index]
        # The square root keeps bins of a few percent visible beside the last one, which often holds most images.
        axis.bar(
            (low + high) / 2, accuracy, (high - low) * 0.92, color=color, alpha=0.12 + 0.78 * math.sqrt(share[index])
        )
        interval = statistics.proportion(round(accuracy * counts[index]), counts[index])
        axis.vlines(
            raw["diagram"]["confidence"][index], interval.low, interval.high, color=color, linewidth=1.2, alpha=0.9
        )
    if "scaled" in summary:
        scaled = summary["scaled"]["diagram"]
        points = [pair for pair in zip(scaled["confidence"], scaled["accuracy"], strict=True) if pair[0] is not None]
        axis.plot(
            *np.asarray(points).T,
            color=plots.INK,
            marker="o",
            markerfacecolor="none",
            markersize=5,
            linewidth=1.0,
            label="temperature-scaled",
        )
    signed = raw["signed_kim"]["value"]
    leaning = "under-confident" if signed > 0 else "over-confident"
    note = f"ECE {raw['ece']:.1%}, {abs(signed):.1%} {leaning}"
    if "scaled" in summary:
        note += f"\nECE {summary['scaled']['ece']:.1%} at temperature {summary['temperature']['value']:.2f}"
    axis.set_title(run, pad=12 + 13 * (1 + note.count("\n")))
    axis.text(0.0, 1.03, note, transform=axis.transAxes, va="bottom", fontsize=9, linespacing=1.4)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_aspect("equal")
    plots.percent(axis, "x")
    plots.percent(axis, "y")
