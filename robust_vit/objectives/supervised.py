"""Softmax cross-entropy with label smoothing."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from robust_vit import classifier, errors, losses

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Mean cross-entropy of a model in training mode.

    Attributes:
      module: the Linen module.
      spec: what it expects of an image.
      label_smoothing: share of the target spread over all classes, in [0, 1).
    """

    module: Any
    spec: classifier.ImageSpec
    label_smoothing: float = 0.0
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise errors.UserError(f"objective.label_smoothing={self.label_smoothing}: expected a share in [0, 1).")

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        """The loss in nats, the new batch statistics, and `loss` and `accuracy` of the batch.

        Args:
          params: trainable parameters.
          model_state: other collections.
          batch: `image` `[batch, height, width, channels]` canonical pixels, `label` `[batch]`.
          key: for dropout and stochastic depth.
        """
        (logits, _), new_state = self.module.apply(
            {"params": params, **model_state},
            self.spec.normalize(batch["image"]),
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        loss = jnp.mean(losses.cross_entropy(logits, batch["label"], smoothing=self.label_smoothing))
        accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32))
        return loss, (dict(new_state), {"loss": loss, "accuracy": accuracy})
