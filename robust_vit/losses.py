"""Losses of one example: pure functions of logits and labels, in float32 or wider, reduced by the caller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], *, smoothing: float = 0.0
) -> Float[Array, "*batch"]:
    """Softmax cross-entropy in nats, one value an example.

    Args:
      logits: `[..., classes]`, any float dtype; computed in float32, or float64 where they are float64.
      labels: `[...]`, class indices.
      smoothing: share of the target spread evenly over all classes, in [0, 1) (Szegedy et al. 2016, arXiv 1512.00567).
    """
    log_probabilities = jax.nn.log_softmax(_widen(logits))
    loss = -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1.0 - smoothing) * loss - smoothing * jnp.mean(log_probabilities, axis=-1)
    return loss


def margin(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Largest other logit minus the true logit: positive where the example is misclassified (Carlini & Wagner 2017)."""
    logits = _widen(logits)
    is_true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    true = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.max(jnp.where(is_true, -jnp.inf, logits), axis=-1) - true


def _widen(logits: jax.Array) -> jax.Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
