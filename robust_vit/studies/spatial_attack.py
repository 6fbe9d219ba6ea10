"""Spatial robustness: does the model still see the same thing when the image is turned and shifted a little?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, programs, tables
from robust_vit.attacks import spatial
from robust_vit.metrics import classification, statistics
from robust_vit.studies import forward, spatial_figures, study

WAYS = {"grid": "worst of grid", "random": "worst of random"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialAttack(study.Study):
    """Accuracy under the worst turn and shift of each image, from a grid and from a few random draws.

    The model is asked, in float32, about every transform of the grid on every image, with no early exit. So the records hold the
    worst of every smaller grid as well, and robust accuracy against the limits of turn and shift is read off them. The paper's
    protocol for CIFAR-10 is the default: 3 of 32 pixels, 30 degrees, a grid of 5 x 5 x 31, ten random draws, zeros beyond
    the image; for ImageNet it takes 24 of 224 pixels (`shift=24/224`).

    Departures: an image that is misclassified as it is counts as broken by the random draws too (robust accuracy, not success
    rate); one bilinear interpolation does both turn and shift; among transforms that break an image the worst is the one of the
    highest loss, as in the paper.

    Attributes:
      shift: largest shift, in fractions of the image's width and height.
      degrees: largest turn, to either side.
      grid: shifts to the right, shifts down and turns.
      tries: random draws an image.
      padding: what comes in from beyond the image: `zeros`, `edge` or `reflect`.
      together: transforms of a batch that the model sees at once.
      examples: how many test images, the first in the order of the data set, or None for all.
      batch: images a compiled step, each `together` times; one batch is one chunk; or "auto", as many as the device has use
        and memory for.
      exhibits: how many of the first images to keep for the figure, as they are and at their worst; they are not selected.
    """

    name: ClassVar[str] = "spatial_attack"
    title: ClassVar[str] = "Turns and shifts"
    question: ClassVar[str] = "Does the model still see the same thing when the image is turned and shifted a little?"
    paper: ClassVar[str] = "Engstrom et al. 2019, Exploring the Landscape of Spatial Robustness, arXiv 1712.02779"
    captions: ClassVar[Mapping[str, str]] = {
        "spatial_limits": (
            "Share of the images that stay right under every turn and shift of the grid up to the limits, misclassified images "
            "counted as broken; the band is the 95 % Clopper-Pearson interval over images"
        ),
        "spatial_examples": (
            "The first test images, not selected: as they are, and under the turn and shift of the grid that is worst for each "
            "run. Above each image stands what the model takes it for"
        ),
    }

    shift: float = 3 / 32
    degrees: float = 30.0
    grid: tuple[int, int, int] = (5, 5, 31)
    tries: int = 10
    padding: str = "zeros"
    together: int = 5
    examples: int | None = 256
    batch: int | str = 64
    exhibits: int = 6

    def __post_init__(self):
        super().__post_init__()
        if self.exhibits < 0:
            raise errors.UserError(f"exhibits is {self.exhibits}: expected a whole number from 0.")
        self._attacks()

    def _attacks(self) -> dict[str, spatial.RotoTranslation]:
        options = {name: getattr(self, name) for name in ("shift", "degrees", "padding", "together")}
        return {
            "grid": attacks.build("roto_translation", **options, grid=self.grid),
            "random": attacks.build("roto_translation", **options, tries=self.tries),
        }

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def chunks(self, subject: study.Subject) -> int:
        """One a batch."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """One forward pass an image, and one a transform, rounded up to whole steps."""
        transforms = sum(attack.evaluations * self.together for attack in self._attacks().values())
        return self.chunks(subject) * self.batch * (1 + transforms), 0

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The forward pass, and a step of each landscape."""
        chunks = self.chunks(subject)
        images = forward.images(subject, self.batch)
        keys = jax.eval_shape(lambda: attacks.example_keys(0, np.arange(self.batch)))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=images.sharding)
        labels = subject.shape((self.batch,), np.int32)
        found = [forward.program(subject, self.batch, times=chunks)]
        for name, attack in self._attacks().items():
            arguments = (attack, subject.classifier, keys, images, labels, np.int32(0))
            found.append(programs.Program(name, spatial.looking, arguments, times=chunks * attack.evaluations))
        return found

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """For each image whether the model is right under each transform, and the worst one with its loss and prediction."""
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        labels = real["label"].astype(np.int32)
        records = {
            "row": real["row"].astype(np.int32),
            "label": labels,
            "prediction": logits.argmax(axis=1).astype(np.int32),
            "confidence": classification.confidence(logits).astype(np.float32),
            "correct": logits.argmax(axis=1) == labels,
        }
        images, given, keys = forward.examples(subject, batch)
        shown = min(self.exhibits, int(mask.sum())) if index == 0 else 0
        for name, attack in self._attacks().items():
            seen = spatial.landscape(attack, subject.classifier, keys, images, given)
            seen = spatial.Landscape(*(column[:, mask] for column in seen))
            # Whatever rounding does between two passes over the image as it is: no worst case is above the clean accuracy.
            right = ~seen.reached & records["correct"]
            rows = np.arange(len(labels))
            worst = np.where(~right | right.all(axis=0), seen.loss, -np.inf).argmax(axis=0)
            records[f"right/{name}"] = right.T
            records[f"worst/{name}"] = seen.parameters[worst, rows].astype(np.float32)
            records[f"loss/{name}"] = seen.loss[worst, rows].astype(np.float32)
            records[f"prediction/{name}"] = seen.prediction[worst, rows].astype(np.int32)
            if name == "grid" and index == 0:
                records["exhibit/parameters"] = seen.parameters[:, 0].astype(np.float32)
                records["exhibit/image"] = np.asarray(real["image"][:shown], np.float32)
                turned = attack.transform(records["exhibit/image"], records["worst/grid"][:shown])
                records["exhibit/worst"] = np.asarray(turned, np.float32)
        if index == 0:
            records["exhibit/size"] = np.asarray(real["image"].shape[1:3])
            records["exhibit/class_names"] = forward.class_names(subject)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Accuracies clean, at the worst of grid and draws, on average over draws, and by the limits of the grid."""
        correct = records["correct"]
        count = len(correct)
        drawn = records["right/random"][:, 1:]  # Without the image as it is.
        names, labels = records["exhibit/class_names"], records["label"]
        caveats = []
        if len(np.unique(labels)) < len(names):
            caveats.append(f"The {count} images show {len(np.unique(labels))} of {len(names)} classes.")
        caveats.append(
            "Between the points of the grid and beyond its limits the model may fail too: these accuracies are upper bounds."
        )
        return {
            "examples": count,
            "clean": _share(correct),
            **{name: _share(records[f"right/{name}"].all(axis=1)) for name in WAYS},
            "average": dataclasses.asdict(statistics.mean(drawn.mean(axis=1))),
            "limits": _limits(records),
            "worst_turn": float(np.median(np.abs(records["worst/grid"][:, 2]))),
            "worst_shift": float(np.median(np.abs(records["worst/grid"][:, :2]).max(axis=1))),
            "size": [int(side) for side in records["exhibit/size"]],
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Robust accuracy against the limits, and the first images at their worst."""
        if not findings:
            return {}
        figures = {"spatial_limits": spatial_figures.limits(findings)}
        if self.exhibits:
            figures["spatial_examples"] = spatial_figures.examples(findings)
        return figures

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Accuracy at the worst of the grid."""
        return {f"accuracy, {self._words(finding)}": study.number(finding.summary["grid"], ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run."""
        rows = []
        for run, finding in findings.items():
            summary = finding.summary
            cells = [study.number(summary[key], ".1%") for key in ("clean", "average", "random", "grid")]
            turn = tables.Number(summary["worst_turn"], None, None, "", ".3g")
            pixels = tables.Number(summary["worst_shift"] * summary["size"][1], None, None, "", ".2g")
            rows.append((run, *cells, turn, pixels, summary["examples"]))
        across, down, turns = self.grid
        return {
            "spatial_attack": tables.Table(
                "Accuracy under turns and shifts",
                (
                    "run",
                    "clean",
                    "average over random",
                    f"worst of {self.tries} random",
                    f"worst of grid of {across * down * turns}",
                    "worst turn (degrees, median)",
                    "worst shift (pixels, median)",
                    "images",
                ),
                rows,
                f"Turns up to {self.degrees:g} degrees and shifts up to {self.shift:.3g} of the image's size to each side; "
                f"{self.padding} beyond the image. Misclassified images count as broken. 95 % intervals over images: "
                "Clopper-Pearson, bootstrap for the average.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Accuracy at the worst of grid and draws, on the images that both were asked about."""
        left, right = study.pair(first, second)
        keys = ("shift", "degrees", "grid", "tries", "padding")
        if not len(left) or any(_plain(first.settings[key]) != _plain(second.settings[key]) for key in keys):
            return []
        found = []
        for name, words in WAYS.items():
            pair = [
                finding.records[f"right/{name}"].all(axis=1)[rows] for finding, rows in ((first, left), (second, right))
            ]
            difference = statistics.paired_difference(*(bits.astype(float) for bits in pair))
            found.append(study.comparison(f"accuracy, {words}", difference, statistics.mcnemar(*pair), "+.2%"))
        return found

    def card(self, finding: study.Finding) -> dict[str, Any]:
        """The limits and the subset besides."""
        return {
            **super().card(finding),
            "limits": {"shift": self.shift, "degrees": self.degrees},
            "subset": "the first images in the order of the data set, misclassified ones included",
        }

    def _words(self, finding: study.Finding) -> str:
        return f"±{self.degrees:g}°, ±{self.shift * finding.summary['size'][1]:.3g} px"


def _limits(records: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each limit of the shift the accuracy at each limit of the turn, within the grid."""
    parameters = np.abs(records["exhibit/parameters"])
    shifts, turns = parameters[:, :2].max(axis=1), parameters[:, 2]
    right = records["right/grid"]
    return [
        {
            "shift": float(shift),
            "degrees": np.unique(turns).tolist(),
            "accuracy": [
                _share(right[:, (shifts <= shift) & (turns <= turn)].all(axis=1)) for turn in np.unique(turns)
            ],
        }
        for shift in np.unique(shifts)
    ]


def _share(bits: np.ndarray) -> dict[str, Any]:
    return dataclasses.asdict(statistics.proportion(bits.sum(), len(bits)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
