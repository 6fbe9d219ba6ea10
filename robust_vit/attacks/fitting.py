"""What is learned from a data set reads its batches here: checked, padded to one size, gone through as often as needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robust_vit import errors
from robust_vit.attacks import evaluation, inputs, skeleton


class Batch(NamedTuple):
    """One batch for a step.

    Attributes:
      images: canonical pixels in [0, 1].
      labels: true classes, or the target where there is one.
      weights: of each image in the mean; padding, and what is of the target's class already, has none.
    """

    images: Float[Array, "batch height width channels"]
    labels: Int[Array, " batch"]
    weights: Float[Array, " batch"]


class Batches:
    """Batches of `image`, `label` and perhaps `mask`, of which the first is looked at before anything is computed.

    Attributes:
      image_shape: height, width and channels.
      classes: how many logits the models give.
    """

    def __init__(self, batches: Iterable[Mapping[str, np.ndarray]], models: tuple[Any, ...]):
        if isinstance(batches, Mapping):
            batches = [batches]
        if isinstance(batches, Iterator):
            raise errors.UserError("the batches are an iterator, which ends after one pass: give a list of them.")
        if not models:
            raise errors.UserError("there is no model to learn from: give one, or a tuple of them.")
        self._batches = batches
        first = next(iter(batches), None)
        if first is None:
            raise errors.UserError("there are no batches to learn from.")
        shape = first["image"].shape
        self._size, self.image_shape = shape[0], tuple(shape[1:])
        images = _check(models[0], first)
        counts = {evaluation.count_classes(model, shape) for model in models}
        if len(counts) > 1:
            raise errors.UserError(f"the models give {sorted(counts)} logits: an ensemble needs the same classes.")
        for model in models:
            inputs.check_once(model, images)
        self.classes, self._model = counts.pop(), models[0]

    def goal(self, target: int | None) -> skeleton.Goal:
        """Untargeted without a target.

        Raises:
          errors.UserError: a target that is no class.
        """
        if target is None:
            return skeleton.UNTARGETED
        if not 0 <= target < self.classes:
            raise errors.UserError(f"target is {target}: expected a class, 0 to {self.classes - 1}.")
        return skeleton.TARGETED

    def take(self, steps: int, target: int | None = None) -> Iterator[tuple[int, Batch]]:
        """As many batches as there are steps, numbered, from the beginning again after the last one.

        Raises:
          errors.UserError: pixels or labels of a batch that are out of range, when it is met first.
        """
        step = 0
        while step < steps:
            before = step
            for batch in self._batches:
                if step == steps:
                    return
                if batch["image"].shape[0] <= self._size:
                    if not before:
                        _check(self._model, batch)
                    yield step, self._prepared(batch, target)
                    step += 1
            if step == before:
                raise errors.UserError("no batch is as large as the first one or smaller: they came in another order.")

    def _prepared(self, batch: Mapping[str, np.ndarray], target: int | None) -> Batch:
        # In JAX's own functions: the arrays may be split over devices of several processes.
        images, labels = jnp.asarray(batch["image"], jnp.float32), jnp.asarray(batch["label"], jnp.int32)
        weights = jnp.ones(labels.shape)
        if "mask" in batch:
            # Padding may be anything, even not a number, which a weight of zero would not take away.
            kept = jnp.asarray(batch["mask"], bool)
            weights, images = kept.astype(jnp.float32), jnp.where(kept[:, None, None, None], images, 0.0)
        if target is not None:
            weights, labels = weights * (labels != target), jnp.full(labels.shape, target, jnp.int32)
        missing = self._size - images.shape[0]
        if missing:
            images, labels, weights = (
                jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1))) for array in (images, labels, weights)
            )
        return Batch(images, labels, weights / jnp.maximum(weights.sum(), 1.0))


def _check(model: Any, batch: Mapping[str, np.ndarray]) -> Float[Array, "batch height width channels"]:
    """Refuses pixels and labels out of range, and returns the images; padding, which may be anything, is black and of class 0."""
    images, labels = batch["image"], batch["label"]
    if "mask" in batch and images.ndim == 4 and labels.shape == images.shape[:1]:
        kept = jnp.asarray(batch["mask"], bool)
        images, labels = jnp.where(kept[:, None, None, None], images, 0), jnp.where(kept, labels, 0)
    inputs.check_values(model, images, labels)
    return images
