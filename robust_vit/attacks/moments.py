"""Adam's running means of gradients and of their squares, each example at its own step (Kingma & Ba 2015, arXiv 1412.6980)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DECAY, SQUARE_DECAY = 0.9, 0.999


class Moments(flax.struct.PyTreeNode):
    """Running means that start at zero.

    Attributes:
      mean: of the gradients.
      squares: of their squares.
    """

    mean: Float[Array, "batch height width channels"]
    squares: Float[Array, "batch height width channels"]

    def update(self, gradients: Float[Array, "batch height width channels"]) -> Moments:
        """The means with one more term."""
        return Moments(
            mean=DECAY * self.mean + (1.0 - DECAY) * gradients,
            squares=SQUARE_DECAY * self.squares + (1.0 - SQUARE_DECAY) * jnp.square(gradients),
        )

    def direction(self, terms: Int[Array, " batch"], stabiliser: float) -> Float[Array, "batch height width channels"]:
        """Where Adam goes with a learning rate of one: about one in each pixel.

        Args:
          terms: how many gradients an example's means hold, from 1: means that started at zero are too small at first.
          stabiliser: added to the root of the second mean.
        """
        terms = terms.astype(self.mean.dtype)[:, None, None, None]
        mean, squares = self.mean / (1.0 - DECAY**terms), self.squares / (1.0 - SQUARE_DECAY**terms)
        return mean / (jnp.sqrt(squares) + stabiliser)


def zeros(images: jax.Array) -> Moments:
    """Before any gradient; two arrays, so that both may be donated."""
    return Moments(mean=jnp.zeros_like(images), squares=jnp.zeros_like(images))
