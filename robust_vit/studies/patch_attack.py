"""Adversarial patches: how much of an image must be covered before the model fails, whatever the image shows?"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure as matplotlib_figure

from robust_vit import attacks, errors, mesh, programs, tables
from robust_vit.attacks import arguments, fitting, patch, skeleton
from robust_vit.metrics import statistics
from robust_vit.studies import forward, patch_figures, study

_PURPOSE = 0x70617463  # "patc": keeps the draws of learning apart from those of laying.
COVERS = ("patch", "noise")
_learned: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchAttack(study.Study):
    """Accuracy under one patch, learned from training images and laid on test images, against the area that it covers.

    The protocol of Naseer et al. 2021 (arXiv 2105.10497, figure 4: 5, 15 and 25 % of the area, no target) with the patch of
    Brown et al. 2017 (arXiv 1712.09665), which has no reference code for ViTs. The patch is learned on training images at
    areas between the smallest and the largest one, and laid once on each test image at each area, wholly inside, at a place and
    an angle drawn from the image's key. A patch of uniform noise, laid at the same places, tells what covering alone does.
    Departures: one patch and not the mean of five; images need not be classified correctly to be learned from.

    Attributes:
      target: the class to reach, or None to leave the true one.
      shape: `circle` or `square`.
      areas: shares of the image that are covered, in rising order.
      rotation: largest angle to either side, in degrees.
      steps: of learning, one batch each.
      learning_rate: of learning, in pixel units.
      learned_images: how many training images to learn from, gone through again as often as the steps ask.
      examples: how many test images, the first in the order of the data set, or None for all.
      batch: images a compiled step, of learning too; one batch of test images is one chunk; or "auto".
      exhibits: how many of the first test images to keep with the patch for the figure; they are not selected.
    """

    name: ClassVar[str] = "patch_attack"
    title: ClassVar[str] = "Adversarial patches"
    question: ClassVar[str] = (
        "How much of an image must one printed patch cover before the model fails, whatever the image shows?"
    )
    paper: ClassVar[str] = "Brown et al. 2017, arXiv 1712.09665; Naseer et al. 2021, arXiv 2105.10497"
    captions: ClassVar[Mapping[str, str]] = {
        "patch_attack": (
            "Accuracy on the test images against the share of the image that is covered: by the learned patch, and dashed by "
            "noise of the same shape; bands are 95 % Clopper-Pearson intervals over images"
        ),
        "patches": (
            "Each run's patch, and the first test images, not selected, with it at the largest area. Above each image stands "
            "what the model takes it for"
        ),
    }

    target: int | None = None
    shape: str = "circle"
    areas: tuple[float, ...] = (0.05, 0.15, 0.25)
    rotation: float = 22.5
    steps: int = 500
    learning_rate: float = 0.05
    learned_images: int = 1024
    examples: int | None = 1000
    batch: int | str = 64
    exhibits: int = 5

    def __post_init__(self):
        super().__post_init__()
        if not self.areas or list(self.areas) != sorted(set(self.areas)):
            raise errors.UserError(f"areas is {self.areas}: give shares of the image in rising order.")
        arguments.counts(learned_images=self.learned_images)
        patch.check(
            shape=self.shape,
            areas=(self.areas[0], self.areas[-1]),
            rotation=self.rotation,
            steps=self.steps,
            learning_rate=self.learning_rate,
        )

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs images to learn from, and a model that can be differentiated."""
        if subject.train is None and subject.validation is None:
            return "there are no training or validation images to learn the patch from"
        if self.target is not None and not 0 <= self.target < subject.num_classes:
            return f"target {self.target} is none of the {subject.num_classes} classes"
        return forward.not_differentiable(subject)

    def _stream(self, subject: study.Subject) -> Any:
        return subject.test.with_batch(self.batch, limit=self.examples)

    def chunks(self, subject: study.Subject) -> int:
        """One a batch of test images."""
        return len(self._stream(subject))

    def passes(self, subject: study.Subject) -> tuple[int, int]:
        """Learning, and for each test image one pass clean and two an area."""
        images = len(self._stream(subject)) * self.batch
        return self.steps * self.batch + images * (1 + 2 * len(self.areas)), self.steps * self.batch

    def programs(self, subject: study.Subject) -> list[programs.Program]:
        """The clean forward pass, a step of learning, and the forward pass with a patch."""
        chunks, images = self.chunks(subject), forward.images(subject, self.batch)
        grey, moments = patch.blank(images.shape[1:], shape=self.shape, area=self.areas[-1], rotation=self.rotation)
        labels = subject.shape((self.batch,), jnp.int32)
        batch = fitting.Batch(images, labels, jax.ShapeDtypeStruct((self.batch,), jnp.float32))
        key, keys = jax.random.key(0), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))
        numbers = patch.options(areas=(self.areas[0], self.areas[-1]), learning_rate=self.learning_rate, transform=None)
        goal = skeleton.UNTARGETED if self.target is None else skeleton.TARGETED
        learn = (grey, moments, (subject.classifier,), key, batch, numbers)
        laid = (subject.classifier, grey, keys, images, np.float32(self.areas[0]))
        return [
            forward.program(subject, self.batch, times=chunks),
            programs.Program("learn the patch", patch.learn, learn, times=self.steps, static=(goal,)),
            programs.Program("with a patch", patch.predict, laid, times=2 * len(self.areas) * chunks),
        ]

    def learn(self, subject: study.Subject) -> patch.Patch:
        """The patch: the same for the same subject and settings. Learned once in a process."""
        known = _learned.setdefault(subject, {})
        settings = (self.target, self.shape, self.areas[0], self.areas[-1], self.rotation, self.steps)
        settings = (*settings, self.learning_rate, self.learned_images, self.batch)
        if settings not in known:
            key = jax.random.fold_in(jax.random.key(subject.seed), _PURPOSE)
            known[settings] = attacks.fit_patch(
                subject.classifier,
                self._material(subject),
                key,
                target=self.target,
                shape=self.shape,
                areas=(self.areas[0], self.areas[-1]),
                rotation=self.rotation,
                steps=self.steps,
                learning_rate=self.learning_rate,
            )
        return known[settings]

    def _material(self, subject: study.Subject) -> _Placed:
        """Batches to learn from: of the training stream, else of the validation images."""
        count = -(-self.learned_images // self.batch)
        if subject.train is not None:
            found = (forward.training_examples(subject.train, i * self.batch, self.batch) for i in range(count))
        else:
            stream = subject.validation.with_batch(self.batch, limit=self.learned_images)
            found = (stream.batch(i) for i in range(len(stream)))
        names = ("image", "label", "mask")
        return _Placed(subject, [{name: batch[name] for name in names if name in batch} for batch in found])

    def chunk(self, subject: study.Subject, index: int) -> dict[str, np.ndarray]:
        """The class that each image is taken for clean, and at each area under the learned patch and under noise."""
        learned = self.learn(subject)
        batch = self._stream(subject).batch(index)
        mask = np.asarray(batch["mask"], bool)
        logits, real = forward.logits(subject, batch)
        records = {
            "row": real["row"].astype(np.int32),
            "label": real["label"].astype(np.int32),
            "prediction": logits.argmax(axis=1).astype(np.int32),
        }
        records["correct"] = records["prediction"] == records["label"]
        images, _, keys = forward.examples(subject, batch)
        noise_key = jax.random.fold_in(jax.random.key(subject.seed), _PURPOSE + 1)
        noise = learned.replace(texture=jax.random.uniform(noise_key, learned.texture.shape))
        for name, laid in zip(COVERS, (learned, noise), strict=True):
            # The area is a leaf: one compilation serves all areas and both patches.
            found = [patch.predict(subject.classifier, laid, keys, images, np.float32(area)) for area in self.areas]
            records[f"prediction/{name}"] = np.stack([mesh.fetch(one)[mask] for one in found], axis=1).astype(np.int32)
        if index == 0:
            shown = min(self.exhibits, int(mask.sum()))
            largest = learned.apply(keys, images, np.float32(self.areas[-1]))
            records["exhibit/areas"] = np.asarray(self.areas)
            records["exhibit/target"] = np.asarray([-1 if self.target is None else self.target])
            records["exhibit/texture"] = np.asarray(mesh.fetch(learned.texture))
            records["exhibit/patched"] = np.asarray(mesh.fetch(largest)[mask][:shown], np.float32)
            records["exhibit/class_names"] = forward.class_names(subject)
        return records

    def summarise(self, records: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Accuracy at each area under patch and noise, the share of right images that turn wrong, the target's share."""
        labels, correct = records["label"], records["correct"]
        target = int(records["exhibit/target"][0])
        areas = [float(area) for area in records["exhibit/areas"]]
        found: dict[str, list[dict[str, Any]]] = {}
        for name in COVERS:
            found[name] = []
            for column, area in enumerate(areas):
                predicted = records[f"prediction/{name}"][:, column]
                point = {"area": area, "accuracy": _share(predicted == labels)}
                point["success"] = _share(predicted != labels, correct)
                if target >= 0:
                    point["on_target"] = _share(predicted == target, labels != target)
                found[name].append(point)
        caveats = ["Another patch may do more: these accuracies are upper bounds of the robust accuracy."]
        if _right(records, "patch") > _right(records, "noise"):
            caveats.insert(
                0,
                "Noise breaks more images than the learned patch: it was learned for too few steps, or the gradient is masked.",
            )
        return {
            "examples": len(labels),
            "target": str(records["exhibit/class_names"][target]) if target >= 0 else None,
            "clean": _share(correct),
            "areas": areas,
            "curves": found,
            "caveats": caveats,
        }

    def figures(self, findings: Mapping[str, study.Finding]) -> dict[str, matplotlib_figure.Figure]:
        """Accuracy against area, and the patches with the first images."""
        if not findings:
            return {}
        return {"patch_attack": patch_figures.curves(findings), "patches": patch_figures.patches(findings)}

    def headline(self, finding: study.Finding) -> dict[str, tables.Number]:
        """Accuracy under the patch at the largest area."""
        point = finding.summary["curves"]["patch"][-1]
        return {f"accuracy, patch on {point['area']:.0%}": study.number(point["accuracy"], ".1%")}

    def tables(self, findings: Mapping[str, study.Finding]) -> dict[str, tables.Table]:
        """One row a run, patch and noise; one column an area."""
        areas = sorted({area for finding in findings.values() for area in finding.summary["areas"]})
        rows = []
        for run, finding in findings.items():
            for name in COVERS:
                points = finding.summary["curves"][name]
                by_area = {point["area"]: point for point in points}
                cells = [study.number(by_area.get(area, {}).get("accuracy"), ".1%") for area in areas]
                hit = study.number(points[-1].get("on_target"), ".1%")
                rows.append((run, name, study.number(finding.summary["clean"], ".1%"), *cells, hit))
        columns = ("run", "covered by", "clean", *(f"{area:.0%} covered" for area in areas), "target reached, largest")
        return {
            "patch_attack": tables.Table(
                "Accuracy under an adversarial patch",
                columns,
                rows,
                f"A {self.shape} learned for {self.steps} steps on training images; laid once on each test image, inside it, "
                f"turned by up to {self.rotation:g} degrees; noise at the same places. 95 % Clopper-Pearson intervals over "
                "images.",
            )
        }

    def compare(self, first: study.Finding, second: study.Finding) -> list[study.Comparison]:
        """Accuracy under the patch at the largest area, on the images that both were tried on."""
        left, right = study.pair(first, second)
        if not len(left) or first.summary["areas"] != second.summary["areas"]:
            return []
        bits = [
            finding.records["prediction/patch"][rows, -1] == finding.records["label"][rows]
            for finding, rows in ((first, left), (second, right))
        ]
        difference = statistics.paired_difference(*(one.astype(float) for one in bits))
        quantity = f"accuracy, patch on {first.summary['areas'][-1]:.0%}"
        return [study.comparison(quantity, difference, statistics.mcnemar(*bits), "+.2%")]


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Batches on the host, of which each is on the subject's devices while it is looked at."""

    subject: study.Subject
    batches: list[dict[str, np.ndarray]]

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return map(self.subject.put, self.batches)


def _share(bits: np.ndarray, among: np.ndarray | None = None) -> dict[str, Any] | None:
    chosen = bits if among is None else bits[among]
    return dataclasses.asdict(statistics.proportion(chosen.sum(), len(chosen))) if len(chosen) else None


def _right(records: Mapping[str, np.ndarray], name: str) -> int:
    return int((records[f"prediction/{name}"][:, -1] == records["label"]).sum())
