"""Explicit attention, head-first: every contraction is a plain batched matrix product with a second derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def attend(
    query: Float[Array, "batch heads queries depth"],
    key: Float[Array, "batch heads keys depth"],
    value: Float[Array, "batch heads keys depth"],
    *,
    bias: Float[Array, "heads queries keys"] | None = None,
    allowed: Bool[Array, "queries keys"] | None = None,
) -> tuple[Float[Array, "batch heads queries depth"], Float[Array, "batch heads queries keys"]]:
    """Scaled dot-product attention and its weights (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

    The softmax runs in float32 or better whatever the dtype of the inputs; both outputs have the dtype of `query`.

    Args:
      query: what asks.
      key: what is matched; `query . key / sqrt(depth)` is the logit.
      value: what is mixed by the weights.
      bias: added to the logits, shared by the batch.
      allowed: False where a query must not see a key; a row needs one True.
    """
    logits = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)[None]
    if allowed is not None:
        logits = jnp.where(allowed[None, None], logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value), weights


def neighbourhood(grid: tuple[int, int], *, window: int, class_token: bool) -> np.ndarray:
    """Which token sees which, when attention is restricted to a window x window neighbourhood on the patch grid.

    A window reaches `window // 2` patches to each side and is cut off at the border, as a zero-padded convolution's. The
    class token sees every patch and is seen by every patch.

    Args:
      grid: rows and columns of patches.
      window: odd number of patches.
      class_token: whether token 0 is a class token.

    Returns:
      bool `[tokens, tokens]`, True where the row's token sees the column's.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    reach = window // 2
    near = (np.abs(rows[:, None] - rows[None, :]) <= reach) & (np.abs(columns[:, None] - columns[None, :]) <= reach)
    return np.pad(near, ((1, 0), (1, 0)), constant_values=True) if class_token else near
