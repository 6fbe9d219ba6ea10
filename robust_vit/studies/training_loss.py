"""The training loss as studies of its curvature see it: the mean over a mini-batch, in evaluation mode, and what it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import classifier as classifiers
from robust_vit import losses
from robust_vit.studies import forward, study


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
        """The loss of `classifier` with other parameters."""
        logits = classifier.with_params(params)(batch["image"])
        if self.normalised:
            logits = logits - jnp.mean(logits, axis=-1, keepdims=True)
            logits = logits / jnp.maximum(jnp.linalg.norm(logits, axis=-1, keepdims=True), 1e-10)
        return jnp.mean(losses.cross_entropy(logits, batch["label"], smoothing=self.smoothing))


@functools.partial(jax.jit, static_argnums=0)
def value(loss: MeanLoss, classifier: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean loss of a batch, compiled once for equal losses. One forward pass."""
    return loss(classifier.params, batch, classifier)


def unavailable(subject: study.Subject) -> str | None:
    """Why the subject has no training loss that its parameters could be moved in, in a sentence; None where it has."""
    if not jax.tree.leaves(subject.classifier.params):
        return "the model was wrapped without its variables, so its training loss has no parameters to move in"
    if subject.train is None:
        return "there are no training images: what is asked is of the training loss"
    return None


def batch_shapes(subject: study.Subject, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a mini-batch of the training stream, for planning."""
    shape = getattr(subject.train, "image_shape", None) or forward.images(subject, 1).shape[1:]
    return {"image": subject.shape((count, *shape), jnp.float32), "label": subject.shape((count,), jnp.int32)}


def smoothing(subject: study.Subject, given: float | None) -> float:
    """The label smoothing of the loss: as given, or the subject's."""
    return float(subject.label_smoothing if given is None else given)


def decay(subject: study.Subject, given: float | None) -> float:
    """The coefficient of the L2 term: as given, or the subject's."""
    return float(subject.weight_decay if given is None else given)


def phases(subject: study.Subject, early: bool) -> tuple[int | None, ...]:
    """What is measured: the judged model (None), and before it the early step, where it is asked for and there is one."""
    step = subject.early() if early else None
    return (None,) if step is None else (step, None)


def model(subject: study.Subject, step: int | None) -> Any:
    """The float32 twin of the model at a phase: half precision would make every small eigenvalue noise."""
    return classifiers.in_float32(subject.classifier if step is None else subject.past(step))
