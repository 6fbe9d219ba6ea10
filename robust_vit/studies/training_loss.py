"""The training loss as studies of its curvature see it: the mean over a mini-batch, in evaluation mode, and what it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import classifier as classifiers
from robust_vit import errors, losses, mesh, programs
from robust_vit.objectives import mixing
from robust_vit.studies import forward, study

EARLY = "early/"
"""Before the names of the records of the early phase."""

_MIXING = 0x6D697865  # "mixe": the same mixtures for every study of the same mini-batches.
_mix = jax.jit(mixing.mix, static_argnames=("mixup", "cutmix", "switch"))


@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """Mean cross-entropy of a mini-batch in nats, in evaluation mode; equal for equal settings, so compiled once.

    Attributes:
      smoothing: label smoothing of the training objective.
      normalised: logits are centred and divided by their norm first, example by example.
    """

    smoothing: float = 0.0
    normalised: bool = False

    def __call__(self, params: Any, batch: Mapping[str, jax.Array], classifier: Any) -> jax.Array:
        """The loss of `classifier` with other parameters; of mixtures (`mini_batch`) to their two labels, by their shares."""
        logits = classifier.with_params(params)(batch["image"])
        if self.normalised:
            logits = logits - jnp.mean(logits, axis=-1, keepdims=True)
            logits = logits / jnp.maximum(jnp.linalg.norm(logits, axis=-1, keepdims=True), 1e-10)
        each = losses.cross_entropy(logits, batch["label"], smoothing=self.smoothing)
        if "partner" in batch:
            second = losses.cross_entropy(logits, batch["partner"], smoothing=self.smoothing)
            each = batch["share"] * each + (1.0 - batch["share"]) * second
        return jnp.mean(each)


class TrainingLossStudy(study.Study):
    """What studies of the training loss share; `microbatch` and `label_smoothing` are among the settings of each.

    Attributes:
      counts: settings that are whole numbers, with the least that each may be.
    """

    automatic: ClassVar[str] = "microbatch"
    counts: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self):
        super().__post_init__()
        for name, least in self.counts.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                # The mini-batch is what is measured, so memory cannot choose it: it chooses the part differentiated at a time.
                hint = ' (microbatch="auto" is what saves memory here)' if value == programs.AUTO else ""
                raise errors.UserError(f"{name} is {value!r}: expected a whole number from {least}{hint}.")

    def applicable(self, subject: study.Subject) -> str | None:
        """Needs parameters and a training stream."""
        if not jax.tree.leaves(subject.classifier.params):
            return "the model was wrapped without its variables, so its training loss has no parameters to move in"
        if subject.train is None:
            return "there are no training images: what is asked is of the training loss"
        return None

    def most(self, subject: study.Subject) -> int:
        """The mini-batch."""
        del subject
        return self.batch

    def looks_back(self, subject: study.Subject) -> tuple[int, ...]:
        """The early step, where it is asked for and there is one."""
        return tuple(step for step in self._phases(subject) if step is not None)

    def mixes(self, subject: study.Subject) -> Mapping[str, float]:
        """As the training of the subject does, where `mixed` is a setting and on."""
        return subject.mixing if getattr(self, "mixed", False) else {}

    def _phases(self, subject: study.Subject) -> tuple[int | None, ...]:
        """What is measured: the judged model (None), and before it the early step, where it is asked for and there is one."""
        step = subject.early() if getattr(self, "early", False) else None
        return (None,) if step is None else (step, None)

    def _loss(self, subject: study.Subject) -> MeanLoss:
        return MeanLoss(float(subject.label_smoothing if self.label_smoothing is None else self.label_smoothing))

    def _decay(self, subject: study.Subject) -> float:
        """The coefficient of the L2 term: as given, or the subject's."""
        return float(subject.weight_decay if self.weight_decay is None else self.weight_decay)

    def _mini_batch(self, subject: study.Subject, index: int, count: int) -> dict[str, np.ndarray]:
        return mini_batch(subject, index, count, mixing=self.mixes(subject))

    def _batch_shapes(self, subject: study.Subject, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what `inputs` makes of a mini-batch, for planning."""
        shape = getattr(subject.train, "image_shape", None) or forward.images(subject, 1).shape[1:]
        found = {"image": subject.shape((count, *shape), jnp.float32), "label": subject.shape((count,), jnp.int32)}
        if self.mixes(subject):
            found |= {"partner": found["label"], "share": subject.shape((count,), jnp.float32)}
        return found

    def _with_early(
        self, summary: dict[str, Any], records: Mapping[str, np.ndarray], summarise: Callable[[str], dict[str, Any]]
    ) -> dict[str, Any]:
        """The summary with that of the early phase inside of it, or with the reason why there is none.

        Args:
          summary: of the end of training.
          records: of the study.
          summarise: the summary of the phase whose records have this prefix.
        """
        if f"{EARLY}step" in records:
            early = summarise(EARLY)
            summary["caveats"] += [f"In the early phase: {caveat}" for caveat in early.pop("caveats")]
            summary["early"] = {"step": int(records[f"{EARLY}step"][0]), **early}
        elif self.early:
            summary["caveats"].append(
                "The run kept no checkpoint after its warm-up and before this one (checkpoint.milestones), so that only this one "
                "was measured."
            )
        return summary


@functools.partial(jax.jit, static_argnums=0)
def value(loss: MeanLoss, classifier: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean loss of a batch, compiled once for equal losses. One forward pass."""
    return loss(classifier.params, batch, classifier)


def mini_batch(
    subject: study.Subject, index: int, count: int, *, mixing: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """Mini-batch `index` of `count` images of the training stream: "image", "label", "row", whatever the stream's own batch is.

    Mixed, each image is one of it and its neighbour, and "partner" is the label of that neighbour, "share" the part of the first
    label: one draw a mini-batch, of (seed, index) alone.

    Args:
      subject: whose stream and seed.
      index: of the mini-batch.
      count: images.
      mixing: as `Subject.mixing`; empty or None for none.
    """
    batch = forward.training_examples(subject.train, index * count, count)
    if not mixing:
        return batch
    found = mesh.fetch(_mix(draw(subject, _MIXING, index), batch["image"], batch["label"], **mixing))
    share = np.full(count, found.weight, np.float32)
    return {**batch, "image": found.images, "partner": found.partners, "share": share}


def inputs(subject: study.Subject, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """What `MeanLoss` reads of a mini-batch, on the subject's devices."""
    return subject.put({name: batch[name] for name in ("image", "label", "partner", "share") if name in batch})


def draw(subject: study.Subject, purpose: int, index: int) -> jax.Array:
    """The key of a mini-batch, probe or plane: of (seed, purpose, index) alone."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(subject.seed), purpose), index)


def model(subject: study.Subject, step: int | None) -> Any:
    """The float32 twin of the model at a phase: half precision would make every small eigenvalue noise."""
    return classifiers.in_float32(subject.classifier if step is None else subject.past(step))


def mixed(findings: Mapping[str, study.Finding]) -> str:
    """What a caption says of the runs whose mini-batches were mixed; empty where there is none."""
    names = [run for run, finding in findings.items() if "share" in finding.records]
    return f" Images and labels are mixed as in training ({', '.join(names)})." if names else ""


def paired(first: study.Finding, second: study.Finding) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions in both findings' records of the mini-batches that both have; None: fewer than two, or of other images."""
    left, right = study.pair(first, second)
    if len(left) < 2:
        return None
    for name in ("rows", "share"):
        if (name in first.records) != (name in second.records):
            return None
        if name in first.records and not np.array_equal(first.records[name][left], second.records[name][right]):
            return None
    return left, right
