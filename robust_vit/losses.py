"""Losses of one example: pure functions of logits and labels, in float32 or wider, reduced by the caller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_vit import errors


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


def dlr(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Difference of logits ratio: the margin over the spread of the three largest logits; positive where wrong.

    It does not change when the logits are shifted or scaled, so it cannot be masked by a saturated softmax (Croce & Hein 2020,
    arXiv 2003.01690, equation 6). It is 1, whatever the image, where the true class is the third. Where the three largest are
    equal to rounding it is the margin itself.

    Raises:
      errors.UserError: there are fewer than three classes.
    """
    logits = _widen(logits)
    _require_classes("dlr", logits, 3)
    largest = jax.lax.top_k(logits, 3)[0]
    return _ratio(margin(logits, labels), largest[..., 0] - largest[..., 2], logits)


def targeted_dlr(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The target's logit minus the true one, over the spread of the four largest; rises towards the target.

    The spread is the largest logit minus the mean of the third and the fourth (Croce & Hein 2020, arXiv 2003.01690, equation
    7); where they are equal to rounding it is 1.

    Raises:
      errors.UserError: there are fewer than four classes.
    """
    logits = _widen(logits)
    _require_classes("targeted_dlr", logits, 4)
    largest = jax.lax.top_k(logits, 4)[0]
    chosen = [jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0] for index in (targets, labels)]
    return _ratio(chosen[0] - chosen[1], largest[..., 0] - 0.5 * (largest[..., 2] + largest[..., 3]), logits)


def _ratio(difference: jax.Array, spread: jax.Array, logits: jax.Array) -> jax.Array:
    """`difference / spread`; a spread of rounding size would give gradients that overflow, so it is not divided by."""
    scale = jnp.max(logits, axis=-1) - jnp.min(logits, axis=-1)
    least = jnp.maximum(jnp.finfo(logits.dtype).eps * scale, 1e-12)
    return difference / jnp.where(spread > least, spread, 1.0)


def _require_classes(name: str, logits: jax.Array, least: int) -> None:
    if logits.shape[-1] < least:
        raise errors.UserError(
            f"the loss {name} needs {least} classes or more, and the model has {logits.shape[-1]}: use the loss margin or "
            "cross_entropy (the attack apgd_ce)."
        )


def _widen(logits: jax.Array) -> jax.Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
