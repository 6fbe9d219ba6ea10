"""Features of images, for what reads a model below its head: one shape of pass, errors that name what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robust_vit import errors
from robust_vit.attacks import evaluation

LOGITS = "logits"  # What every model has.


class Layer(flax.struct.PyTreeNode):
    """A model up to one of its named features.

    Attributes:
      model: with `features(images) -> (logits, features)`; for the logits, any model.
      name: of the features, or `logits`; static.
    """

    model: Any
    name: str = flax.struct.field(pytree_node=False, default="pre_logits")

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch width"]:
        """The features, one row an image, in float32 or wider. One forward pass."""
        found = self.model(images) if self.name == LOGITS else self.model.features(images)[1][self.name]
        return found.reshape(found.shape[0], -1).astype(jnp.promote_types(found.dtype, jnp.float32))

    def width(self, shape: tuple[int, ...]) -> int:
        """How many numbers an image has here, for images of this shape; computes nothing.

        Raises:
          errors.UserError: the model has no features, or none of this name.
        """
        remedy = "give a Classifier, or a pytree with features(images) -> (logits, {'pre_logits': ...})"
        if self.name == LOGITS:
            return evaluation.count_classes(self.model, shape)
        if not hasattr(self.model, "features"):
            raise errors.UserError(f"the model is a {type(self.model).__name__} without features: {remedy}.")
        known = names(self.model, shape)
        if not known:
            raise errors.UserError(f"the model names no features, and {self.name!r} is asked for: {remedy}.")
        if self.name not in known:
            raise errors.unknown("layer", self.name, known)
        return int(np.prod(known[self.name].shape[1:]))


def names(model: Any, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """The features that a model names, for images of this shape; none of a function alone. Computes nothing."""
    if not hasattr(model, "features"):
        return {}
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda model, x: model.features(x)[1], model, images)


def extract(
    layer: Layer, images: Float[np.ndarray, "images height width channels"], *, batch: int = 128
) -> Float[np.ndarray, "images width"]:
    """Features of images in float64, in passes of one shape. One forward pass an image, rounded up to whole batches."""
    images = np.asarray(images, np.float32)
    layer.width(images.shape)
    return np.asarray(in_batches(read, layer, images, batch=batch), np.float64)


def in_batches(function: Callable, model: Any, images: np.ndarray, *, batch: int) -> np.ndarray:
    """`function(model, images)` for any number of images, in calls of one shape; the last is filled up with repetitions."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        parts.append(np.asarray(function(model, np.resize(part, (batch, *part.shape[1:]))))[: len(part)])
    return np.concatenate(parts)


@jax.jit
def read(layer: Layer, images: jax.Array) -> jax.Array:
    """The layer's features of a batch, compiled."""
    return layer(images)
