"""Travel to the decision boundary: how far along the gradient's direction, and how far after a small random jump?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import scipy.stats
from matplotlib import figure as matplotlib_figure

from robust_vit import errors, mesh, programs, tables
from robust_vit.attacks import travel
from robust_vit.metrics import classification, statistics
from robust_vit.studies import forward, study, travel_figures

_GROUPS = 10  # Of images by their confidence.
STARTS = {"start": "from the image", "jump": "after the jump"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundaryTravel(study.Study):
    """The length ε of travel along the FGSM direction to the decision boundary, before and after a random jump.

    Every image moves along d, the sign of the cross-entropy's gradient scaled to ‖d‖₂ = √D, so that ε is the root mean square
    change of a pixel. ε is the first crossing that a scan by `stride` shows, halved 24 times into its bracket; moved images are
    put back into [0, 1] where `clip` says so. Then the image jumps to x + jump · r with r random and ‖r‖₂ = √D, clipped in the
    same way, and travels again from there along the FGSM direction of its new place. Kim et al. expect of Transformers that the
    jump leaves a curved region and the boundary is near at once, and of convolutional networks that nothing changes.

    Departures: an image that is misclassified has no way to go and is left out; one that the jump itself flips is left out of
    what follows the jump, and the share of these is reported. An image that meets no boundary up to `limit` is neither dropped
    nor coded as -1: it is censored there. All images are censored at the same length, so that the Kaplan-Meier median is the
    plain median with ε at least `limit` for these; means are of min(ε, limit) and are called so. The mean against confidence is
    over tenths of the images rather than tenths of the scale, most of which hold no image of a model that is nearly always
    sure. The model is asked in float32. One jump an image.

    Attributes:
      stride: of the scan.
      limit: end of the scan.
      jump: length of the random jump.
      clip: put moved images back into [0, 1].
      examples: how many test images, the first in the order of the data set, or None for all.
      batch: images a compiled step; one batch is one chunk; or "auto", as many as the device has use and memory for.
      exhibits: how many of the first images to keep for the figure; they are not selected.
    """

    name: ClassVar[str] = "boundary_travel"
    title: ClassVar[str] = "Travel to the decision boundary"
    question: ClassVar[str] = (
        "How far must an image go before the model sees something else, and is a random jump a short cut?"
    )
    paper: ClassVar[str] = "Kim et al. 2022, Curved Representation Space of Vision Transformers, arXiv 2210.05742"
    captions: ClassVar[Mapping[str, str]] = {
        "travel_against_confidence": (
            "Each dot is an image that the model gets right: the length ε of its travel along the FGSM direction against the "
            "confidence of the unmoved image, before and after a random jump. Lines are means of min(ε, limit) over tenths of "
            "the images by confidence; triangles at the top met no boundary"
        ),
        "images_at_the_boundary": (
            "The first test images, not selected: as they are, where they meet the boundary, after the random jump, and where "
            "they meet it from there. ε is the length of the travel, PSNR compares with the unmoved image"
        ),
    }

    stride: float = 1e-3
    limit: float = 1.0
    jump: float = 0.05
    clip: bool = True
    examples: int | None = 128
    batch: int | str = 64
    exhibits: int = 6

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.stride <= self.limit or self.jump < 0:
            raise errors.UserError(
                f"stride is {self.stride}, limit {self.limit} and jump {self.jump}: expected 0 < stride <= limit and jump from 0."
            )

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs a model that can be differentiated."""
        return forward.not_differentiable(subject)

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """The most that the study can take, where no image meets a boundary; most take a few per cent of it."""
        images = self.chunks(subject) * self.batch
        return images * (1 + 2 * (1 + travel.most_passes(self.stride, self.limit))), images * 2

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """Forward pass, gradient and scan, the last as often as it runs where no image meets a boundary."""
        chunks = self.chunks(subject)
        images = forward.images(subject, self.batch)
        options = {"stride": self.stride, "limit": self.limit, "clip": self.clip}
        found = travel.programs(subject.classifier, images, **options)
        twice = [dataclasses.replace(program, times=2 * chunks * program.times) for program in found]
        return [forward.program(subject, self.batch, times=chunks), *twice]

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image its confidence, the length of its travel and the PSNR at the end, from the image and after the jump."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        labels = real["label"].astype(np.int32)
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits),
            "correct": logits.argmax(axis=1) == labels,
        }
        images, given, keys = forward.examples(subject, batch)
        jumped = travel.move(
            images, travel.random_directions(keys, images), np.full(len(mask), self.jump), clip=self.clip
        )
        shown = min(self.exhibits, int(mask.sum())) if index == 0 else 0
        for name, places in (("start", images), ("jump", jumped)):
            directions, vanished = travel.gradient_directions(subject.classifier, keys, places, given)
            options = {"stride": self.stride, "limit": self.limit, "clip": self.clip, "mesh": subject.mesh}
            found = travel.search(subject.classifier, keys, places, directions, given, **options)
            ends = mesh.fetch(travel.move(places, directions, found.epsilon.astype(np.float32), clip=self.clip))
            change = ends[mask].astype(np.float64) - np.asarray(real["image"], np.float64)
            records[f"epsilon/{name}"] = found.epsilon[mask]
            records[f"crossed/{name}"] = found.crossed[mask]
            records[f"change/{name}"] = np.sqrt(np.mean(change**2, axis=(1, 2, 3)))
            records[f"vanished/{name}"] = mesh.fetch(vanished)[mask]
            records[f"forward_passes/{name}"] = found.forward_passes[mask].astype(np.int32)
            records[f"exhibit/executed/{name}"] = np.asarray([found.executed])
            if index == 0:
                records[f"exhibit/{name}"] = mesh.fetch(places)[:shown]
                records[f"exhibit/end/{name}"] = ends[:shown]
        # What the jump flips has nowhere to go from there: `search` looks first and finds another class at zero.
        records["flipped"] = records["correct"] & records["crossed/jump"] & (records["epsilon/jump"] == 0)
        if index == 0:
            records["exhibit/class_names"] = forward.class_names(subject)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Median and mean length with censoring, before and after the jump, by confidence, and the ratio that the jump makes."""
        correct, flipped = records["correct"], records["flipped"]
        starts = {name: self._lengths(records, name) for name in STARTS}
        summary: dict[str, Any] = {
            "examples": len(correct),
            "correct": int(correct.sum()),
            "flipped": _plain(statistics.proportion(flipped.sum(), correct.sum())) if correct.any() else None,
            "starts": starts,
            "ratio": self._ratio(records),
            "passes": {
                "forward_passes": int(sum(records[f"exhibit/executed/{name}"].sum() for name in STARTS)),
                "useful": int(sum(records[f"forward_passes/{name}"].sum(dtype=np.int64) for name in STARTS)),
            },
        }
        caveats = []
        if summary["flipped"] is not None and flipped.any():
            caveats.append(
                f"The jump alone flips {flipped.sum()} of {correct.sum()} images ({summary['flipped']['value']:.1%}): these are "
                "left out of what follows it, which keeps the images that stand it."
            )
        for name, entry in starts.items():
            if entry["censored"] is not None and entry["censored"]["value"] > 0.5:
                caveats.append(
                    f"More than half of the images meet no boundary {STARTS[name]} up to ε = {self.limit:g}."
                )
            if entry["censored"] is not None and entry["censored"]["value"] > 0:
                caveats.append(
                    f"{entry['censored']['value']:.1%} of the travels {STARTS[name]} meet no boundary up to ε = {self.limit:g}: "
                    "they are counted as that long, and the mean is a lower bound."
                )
            gone = records[f"vanished/{name}"][_eligible(records, name)]
            if gone.any():
                caveats.append(
                    f"{gone.mean():.1%} of the gradients {STARTS[name]} are zero or not finite: no direction to go."
                )
        return {**summary, "caveats": caveats}

    def _lengths(self, records: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
        chosen = _eligible(records, name)
        lengths, crossed = records[f"epsilon/{name}"][chosen], records[f"crossed/{name}"][chosen]
        if not len(lengths):
            return {"examples": 0, **dict.fromkeys(("median", "mean", "censored", "psnr", "correlation")), "bins": []}
        confidence = records["confidence"][chosen].astype(np.float64)
        psnr = travel_figures.psnr(records[f"change/{name}"][chosen][crossed])
        groups = np.array_split(np.argsort(confidence, kind="stable"), min(_GROUPS, len(lengths)))
        return {
            "examples": len(lengths),
            "median": _plain(statistics.bootstrap(np.median, lengths)),
            "mean": _plain(statistics.mean(lengths)),
            "censored": _plain(statistics.proportion((~crossed).sum(), len(lengths))),
            "psnr": _plain(statistics.bootstrap(np.median, psnr)) if len(psnr) else None,
            "correlation": _plain(statistics.bootstrap(_correlation, confidence, lengths, draws=500)),
            "bins": [
                {
                    "confidence": float(np.median(confidence[rows])),
                    "mean": float(lengths[rows].mean()),
                    "examples": len(rows),
                }
                for rows in groups
            ],
        }

    def _ratio(self, records: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
        """Median length after the jump over the median before, of the images that have both."""
        chosen = _eligible(records, "jump")
        if not chosen.any():
            return None
        lengths = [records[f"epsilon/{name}"][chosen] for name in STARTS]
        return _plain(statistics.bootstrap(lambda start, jump: np.median(jump) / np.median(start), *lengths))

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Length against confidence, and the first images with their ends."""
        if not findings:
            return {}
        figures = {"travel_against_confidence": travel_figures.confidence(findings, STARTS, self.limit)}
        if self.exhibits:
            figures["images_at_the_boundary"] = travel_figures.boundary(findings, self.jump)
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """The median lengths before and after the jump."""
        starts = finding.summary["starts"]
        return {f"ε to the boundary, {STARTS[name]}": study.number(starts[name]["median"], ".4f") for name in STARTS}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """Two rows a run: from the image and after the jump."""
        rows = []
        for run, finding in findings.items():
            summary = finding.summary
            for name, words in STARTS.items():
                entry = summary["starts"][name]
                cells = (
                    study.number(entry["median"], ".4f"),
                    study.number(entry["mean"], ".4f"),
                    study.number(entry["psnr"], ".1f"),
                    study.number(entry["censored"], ".1%"),
                    study.number(entry["correlation"], ".2f"),
                    study.number(summary["ratio"], ".2f") if name == "jump" else None,
                )
                rows.append((run, words, entry["examples"], *cells))
        return {
            "boundary_travel": tables.Table(
                "Length of travel to the decision boundary",
                (
                    "run",
                    "travel",
                    "images",
                    "median ε",
                    f"mean of min(ε, {self.limit:g})",
                    "PSNR there (dB, median)",
                    "no boundary",
                    "rank correlation with confidence",
                    "median after / before",
                ),
                rows,
                f"ε is the root mean square change of a pixel in [0, 1] along the FGSM direction; the jump is of {self.jump:g}. "
                "Images that are misclassified, or flipped by the jump, are left out. The ratio is over the images that have "
                "both travels. 95 % intervals over images: bootstrap; Clopper-Pearson for shares.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Mean of min(ε, limit) before and after the jump, on the images that both models get right."""
        left, right = study.pair(first, second)
        found = []
        for name, words in STARTS.items():
            if not len(left):
                continue
            both = _eligible(first.records, name)[left] & _eligible(second.records, name)[right]
            if both.any():
                pair = first.records[f"epsilon/{name}"][left][both], second.records[f"epsilon/{name}"][right][both]
                difference, test = statistics.paired_difference(*pair), statistics.sign_flip(*pair)
                found.append(study.comparison(f"mean ε to the boundary, {words}", difference, test, "+.4f"))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The counts of images and passes besides."""
        summary = finding.summary
        kept = {key: summary[key] for key in ("correct", "flipped", "passes")}
        return {
            **super().card(finding),
            **kept,
            "subset": "the first images in the order of the data set, those it gets right",
        }


def _eligible(records: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return records["correct"] & (records["epsilon/start"] > 0) & (~records["flipped"] if name == "jump" else True)


def _correlation(confidence: np.ndarray, lengths: np.ndarray) -> float:
    """Spearman's, zero where one of the two does not vary."""
    if np.ptp(confidence) == 0 or np.ptp(lengths) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(confidence, lengths).statistic)


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    return dataclasses.asdict(interval)
