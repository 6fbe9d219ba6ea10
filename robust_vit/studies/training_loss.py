"""The training loss as studies of its curvature differentiate it: the mean over a mini-batch, in evaluation mode."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import losses


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
