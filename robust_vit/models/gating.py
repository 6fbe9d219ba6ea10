"""Factors of the residual branches: lesions from outside, stochastic depth from within."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import errors


def check(gates: Float[Array, "batch branches"] | None, *, batch: int, branches: int) -> None:
    """Holds gates to `[batch or 1, branches]`.

    Raises:
      errors.UserError: another shape.
    """
    if gates is None:
        return
    if gates.ndim != 2 or gates.shape[0] not in (1, batch) or gates.shape[1] != branches:
        raise errors.UserError(
            f"gates have shape {tuple(gates.shape)}: expected [1 or {batch}, {branches}], a factor for each of "
            "module.branches."
        )


def stochastic_depth(
    key: jax.Array, gates: Float[Array, "batch branches"] | None, *, rate: float, batch: int, branches: int
) -> Float[Array, "batch branches"]:
    """Gates with branches dropped at random, one row of draws an example (Huang et al. 2016, arXiv 1603.09382).

    The rate grows linearly from the first branch's share to `rate` at the last; a branch that is kept is divided by its
    probability of being kept, so that evaluation needs no factor.

    Args:
      key: decides what is dropped.
      gates: factors to multiply with, or None.
      rate: probability, in [0, 1), that the last branch of an example is dropped.
      batch: examples.
      branches: residual branches.
    """
    keep = 1.0 - rate * jnp.arange(1, branches + 1, dtype=jnp.float32)[None, :] / branches
    kept = jax.random.bernoulli(key, jnp.broadcast_to(keep, (batch, branches))) / keep
    return kept if gates is None else kept * gates


def apply(branch: jax.Array, gate: Float[Array, " batch"] | None) -> jax.Array:
    """A residual branch `[batch, ...]` times its gate, in the branch's dtype."""
    if gate is None:
        return branch
    return branch * gate.astype(branch.dtype).reshape(-1, *(1,) * (branch.ndim - 1))
