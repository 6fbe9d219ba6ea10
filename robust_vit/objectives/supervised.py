"""Softmax cross-entropy with label smoothing, mixup and cutmix."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from robust_vit import classifier, errors, losses
from robust_vit.objectives import mixing

PyTree = Any
_MIXING = 1  # Folded into the step's key, which dropout uses as it is.


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Mean cross-entropy of a model in training mode.

    Attributes:
      module: the Linen module.
      spec: what it expects of an image.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      mixup: parameter of mixup's beta distribution; 0 is off. See `mixing.mix`; a part of an accumulated batch, and each
        replica, has its own draw.
      cutmix: the same of cutmix.
      mix_switch: probability of cutmix where both are on.
    """

    module: Any
    spec: classifier.ImageSpec
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_switch: float = 0.5
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise errors.UserError(f"objective.label_smoothing={self.label_smoothing}: expected a share in [0, 1).")
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise errors.UserError(
                    f"objective.{name}={getattr(self, name)}: expected a positive number (0.2 to 1 are common), or 0 for off."
                )
        if not 0.0 <= self.mix_switch <= 1.0:
            raise errors.UserError(f"objective.mix_switch={self.mix_switch}: expected a probability in [0, 1].")

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        """The loss in nats, the new batch statistics, and `loss` and `accuracy` of the batch; of mixtures,
        weighted means over their two labels.

        Args:
          params: trainable parameters.
          model_state: other collections.
          batch: `image` `[batch, height, width, channels]` canonical pixels, `label` `[batch]`.
          key: for dropout, stochastic depth and mixing.
        """
        images, labels = batch["image"], batch["label"]
        if self.mixup or self.cutmix:
            mixed = mixing.mix(
                jax.random.fold_in(key, _MIXING),
                images,
                labels,
                mixup=self.mixup,
                cutmix=self.cutmix,
                switch=self.mix_switch,
            )
            images = mixed.images
        (logits, _), new_state = self.module.apply(
            {"params": params, **model_state},
            self.spec.normalize(images),
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        loss, accuracy = self._measured(logits, labels)
        if self.mixup or self.cutmix:
            weight = mixed.weight
            second = self._measured(logits, mixed.partners)
            loss, accuracy = (
                weight * one + (1.0 - weight) * two for one, two in zip((loss, accuracy), second, strict=True)
            )
        return loss, (dict(new_state), {"loss": loss, "accuracy": accuracy})

    def _measured(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = jnp.mean(losses.cross_entropy(logits, labels, smoothing=self.label_smoothing))
        return loss, jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
