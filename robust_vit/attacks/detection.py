"""How well a detector tells attacked images: by an attack that does not know of it, and by one that evades it with the model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_vit import classifier, errors, tables
from robust_vit.attacks import (
    apgd,
    arguments,
    detectors,
    evaluation,
    features,
    gradient,
    inputs,
    norms,
    runner,
    threats,
)
from robust_vit.metrics import ranking, statistics


@dataclasses.dataclass(frozen=True)
class DetectorResult:
    """Scores of clean and attacked images, one row an image that the model gets right as it is.

    Attributes:
      row: ids.
      label: true classes.
      clean: score of the clean image.
      plain: score of what the attack on the model alone returned.
      adaptive: score of what the attack on model and detector returned, or of the plain image where that misleads with less.
      misled: `[images, 2]`: the model gives another class than the label to the plain image, to the adaptive one. Areas are over
        these: an image of the true class is no adversarial one, whatever its score.
      threshold: that at most `false_alarms` of the clean images exceed; above it is an alarm.
      false_alarms: that share.
      forward_passes: in both attacks of the image, one of model and detector counted as one.
      backward_passes: likewise.
    """

    row: Int[np.ndarray, " images"]
    label: Int[np.ndarray, " images"]
    clean: Float[np.ndarray, " images"]
    plain: Float[np.ndarray, " images"]
    adaptive: Float[np.ndarray, " images"]
    misled: Bool[np.ndarray, "images 2"]
    threshold: float
    false_alarms: float
    forward_passes: Int[np.ndarray, " images"]
    backward_passes: Int[np.ndarray, " images"]

    def area(self, attack: str) -> statistics.Interval | None:
        """Area under the ROC curve of clean images against misled ones, of the attack `plain` or `adaptive`; None without any."""
        scores, misled = self._attacked(attack)
        return ranking.auroc(self.clean, scores[misled]) if misled.any() else None

    def evaded(self, attack: str) -> statistics.Interval:
        """Share of the images that the attack takes to another class without an alarm."""
        scores, misled = self._attacked(attack)
        return statistics.proportion((misled & (scores <= self.threshold)).sum(), len(misled))

    def records(self) -> dict[str, np.ndarray]:
        """The per-example arrays by name."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}

    def table(self, name: str = "detector") -> tables.Table:
        """One row an attack."""
        rows = []
        for attack in ("plain", "adaptive"):
            misled = self._attacked(attack)[1]
            area, share = self.area(attack), statistics.proportion(misled.sum(), len(misled))
            rows.append(
                (name, attack, _number(share, ".1%"), _number(area, ".3f"), _number(self.evaded(attack), ".1%"))
            )
        return tables.Table(
            "Detection of attacks",
            ("detector", "attack", "misled", "area under the curve", "misled without alarm"),
            rows,
            f"{len(self.row)} images that the model gets right; alarms at {self.false_alarms:.0%} of the clean ones; the area is "
            "of clean against misled images.",
        )

    def _attacked(self, attack: str) -> tuple[np.ndarray, np.ndarray]:
        if attack not in ("plain", "adaptive"):
            raise errors.unknown("attack on a detector", attack, ("plain", "adaptive"))
        return getattr(self, attack), self.misled[:, ("plain", "adaptive").index(attack)]


def evaluate(
    detector: detectors.Detector,
    images: Float[np.ndarray, "images height width channels"],
    labels: Int[np.ndarray, " images"],
    *,
    threat: str | threats.ThreatModel | None = None,
    epsilon: float | None = None,
    norm: str | norms.Norm | None = None,
    steps: int = 100,
    restarts: int = 1,
    false_alarms: float = 0.05,
    weight: float | None = None,
    rows: Int[np.ndarray, " images"] | None = None,
    seed: int = 0,
    slots: int = 64,
) -> DetectorResult:
    """Scores a detector against an attack on its model alone and against one on both (Carlini & Wagner 2017, arXiv 1705.07263).

    Plain is PGD on the margin. Adaptive is Auto-PGD on `detectors.stealth` with the goal `detectors.evade`: another class with
    the least score that it meets, in the same ball. It differentiates the score, through rounding as if it were not there
    (BPDA), and falls back on the plain image where that is the better one. Scores and classes are judged in float32. The
    adaptive area is an upper bound: another attack may lower it.

    Cost, an image: PGD's `steps + 1` passes of the model forward and backward at most, all of Auto-PGD's
    `1 + restarts * (steps + 1)` of model and detector (`Squeezing` has three passes of its own), and a dozen forward ones.

    Args:
      detector: fitted, on other images than these.
      images: clean canonical pixels in [0, 1].
      labels: true classes; what the model gets wrong as it is is left out.
      threat: a threat model or its name, in place of `epsilon` and `norm`.
      epsilon: radius of the ball, in pixel units.
      norm: of the ball; the maximum norm where neither it nor `threat` is given.
      steps: of both attacks.
      restarts: runs of the adaptive attack.
      false_alarms: share of the clean images that may be taken for attacked.
      weight: of the score in the adaptive attack's loss; see `detectors.guard`.
      rows: ids of the images, from which draws are made; positions by default.
      seed: of the draws.
      slots: images attacked at a time.

    Raises:
      errors.UserError: what `attacks.check_inputs` refuses; a model that is wrong on every image.
    """
    radius, ball = arguments.ball(epsilon, norm, threat)
    arguments.positive(epsilon=radius)
    arguments.counts(steps=steps, restarts=restarts, slots=slots)
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    inputs.check_values(detector.model, images, labels)
    judge = classifier.in_float32(detector)
    right = _judged(judge, images, slots)[1] == labels
    if not right.any():
        raise errors.UserError("the model is wrong on every image as it is: check labels, class order, normalisation.")
    examples = {"image": images[right], "label": labels[right].astype(np.int32), "row": rows[right].astype(np.int32)}
    clean = _judged(judge, examples["image"], slots)[0]
    guarded = detectors.guard(detector, clean, false_alarms=false_alarms, weight=weight)
    classes = evaluation.count_classes(detector.model, images.shape)
    options = {"slots": min(slots, len(clean)), "seed": seed, "keep_images": True}
    plain = gradient.pgd(epsilon=radius, norm=ball, steps=steps, loss="margin")
    plain = runner.run(plain, detector.model, examples, **options)
    ascent = {"loss": detectors.stealth, "goal": detectors.evade(classes), "stop_on_success": False}
    adaptive = apgd.apgd(epsilon=radius, norm=ball, steps=steps, restarts=restarts, **ascent)
    adaptive = runner.run(adaptive, guarded, examples, **options)
    scores, predictions = map(np.stack, zip(*(_judged(judge, x.images, slots) for x in (plain, adaptive)), strict=True))
    misled = predictions != plain.label
    fallback = misled[0] & ~(misled[1] & (scores[1] <= scores[0]))
    return DetectorResult(
        row=plain.row,
        label=plain.label,
        clean=clean,
        plain=scores[0],
        adaptive=np.where(fallback, scores[0], scores[1]),
        misled=np.stack([misled[0], misled[1] | fallback], axis=1),
        threshold=float(guarded.threshold),
        false_alarms=float(false_alarms),
        forward_passes=plain.forward_passes + adaptive.forward_passes,
        backward_passes=plain.backward_passes + adaptive.backward_passes,
    )


def _judged(detector: detectors.Detector, images: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and predictions of the model."""
    found = features.in_batches(_judge, detector, images, batch=batch)
    return found[:, 0], found[:, 1].astype(np.int32)


@jax.jit
def _judge(detector: detectors.Detector, images: jax.Array) -> Float[Array, "batch 2"]:
    with jax.default_matmul_precision("highest"):
        scores, logits = detector.scores(images), detector.model(images)
    return jnp.stack([scores, jnp.argmax(logits, axis=-1).astype(scores.dtype)], axis=1)


def _number(interval: statistics.Interval | None, format: str) -> tables.Number | None:
    return (
        None if interval is None else tables.Number(interval.value, interval.low, interval.high, interval.over, format)
    )
