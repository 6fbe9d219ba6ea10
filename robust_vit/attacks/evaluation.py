"""How an attack asks a model: logits, gradients in the pixels, with as many draws as a stochastic model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Model = Callable[[jax.Array], jax.Array]
_PURPOSE = 0x6D6F6465  # "mode": keeps the draws of a model apart from those of the attack.


class Ascent(NamedTuple):
    """An evaluation with its gradient.

    Attributes:
      gradients: of the objective in the pixels; zero where it is not finite.
      values: of the objective, `[batch]`.
      logits: of the images evaluated.
      vanished: the gradient is zero everywhere or not finite.
    """

    gradients: Float[Array, "batch height width channels"]
    values: Float[Array, " batch"]
    logits: Float[Array, "batch classes"]
    vanished: Bool[Array, " batch"]


def respond(model: Model, images: jax.Array, keys: Key[Array, " batch"], draw: jax.Array | int = 0) -> jax.Array:
    """Logits `[batch, classes]`; of a stochastic model `[samples, batch, classes]`. One forward pass, or `samples`.

    Args:
      model: canonical pixels to logits. One that has `stochastic` set is called as `model.sample(images, keys)`.
      images: canonical pixels.
      keys: one an example; used by a stochastic model alone.
      draw: the number of the evaluation, one or `[batch]`: other draws for each.
    """
    if not getattr(model, "stochastic", False):
        return model(images)
    draws = jnp.broadcast_to(jnp.asarray(draw, jnp.uint32), keys.shape)
    keys = jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, _PURPOSE), number))(keys, draws)
    return model.sample(images, keys)


def collapse(responses: jax.Array) -> jax.Array:
    """Logits `[batch, classes]`: what softmax turns into the mean probability over the draws."""
    if responses.ndim != 3:
        return responses
    return jax.nn.logsumexp(jax.nn.log_softmax(responses), axis=0) - jnp.log(responses.shape[0])


def logits(
    model: Model, images: jax.Array, keys: jax.Array, draw: jax.Array | int = 0
) -> Float[Array, "batch classes"]:
    """Logits of a batch, averaged as probabilities where the model is stochastic. Arguments as in `respond`."""
    return collapse(respond(model, images, keys, draw))


def widened(
    model: Model,
    images: Float[Array, "times batch height width channels"],
    keys: Key[Array, " batch"],
    steps: Int[Array, " batch"],
) -> Float[Array, "times batch classes"]:
    """Logits of several images of each example, as one batch; every one is a draw of its own. `times` forward passes.

    Args:
      model: as in `respond`.
      images: canonical pixels.
      keys: one an example.
      steps: how many the attack has taken before.
    """
    times, batch = images.shape[:2]
    # An example's images lie together, so that examples that are split over devices stay where they are.
    images = images.swapaxes(0, 1).reshape(-1, *images.shape[2:])
    draws = steps.astype(jnp.uint32)[:, None] * times + jnp.arange(times, dtype=jnp.uint32)[None]
    found = logits(model, images, jnp.repeat(keys, times), draws.reshape(-1))
    return found.reshape(batch, times, -1).swapaxes(0, 1)


def ascent(
    objective: Callable,
    model: Model,
    images: jax.Array,
    keys: jax.Array,
    *operands: jax.Array,
    draw: jax.Array | int = 0,
) -> Ascent:
    """The gradient of `objective(logits, *operands) -> [batch]` in the pixels; over draws, of its mean (EOT).

    Cost: one forward and backward pass, or as many as a stochastic model has samples.
    """

    def total(images):
        responses = respond(model, images, keys, draw)
        if responses.ndim == 2:
            values = objective(responses, *operands)
        else:
            values = jnp.mean(jax.vmap(lambda one: objective(one, *operands))(responses), axis=0)
        return jnp.sum(values), (values, collapse(responses))

    gradients, (values, outputs) = jax.grad(total, has_aux=True)(images)
    axes = tuple(range(1, images.ndim))
    finite = jnp.all(jnp.isfinite(gradients), axis=axes)
    gradients = jnp.where(finite.reshape(finite.shape + (1,) * len(axes)), gradients, 0.0)
    return Ascent(gradients, values, outputs, jnp.all(gradients == 0.0, axis=axes))


def passes(model: Model) -> int:
    """How many passes one evaluation of the model is."""
    return int(getattr(model, "samples", 1)) if getattr(model, "stochastic", False) else 1


def count_classes(model: Model, shape: tuple[int, ...]) -> int:
    """How many logits the model gives for images of this shape `[batch, height, width, channels]`; computes nothing."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape[0]))
    found = jax.eval_shape(logits, model, jax.ShapeDtypeStruct(shape, jnp.float32), keys)
    return found.shape[-1]
