"""Attention: explicit and head-first, so that every contraction is a plain batched matrix product; or by a fused kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from robust_vit import errors
from robust_vit.models import layers

_DEPTH_OF_KERNEL = 128


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
    weights = _weights(query, key, bias, allowed)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value), weights


def fused(
    query: Float[Array, "batch queries heads depth"],
    key: Float[Array, "batch keys heads depth"],
    value: Float[Array, "batch keys heads depth"],
    *,
    bias: Float[Array, "heads queries keys"] | None = None,
    allowed: Bool[Array, "queries keys"] | None = None,
) -> tuple[Float[Array, "batch queries heads depth"], Float[Array, "batch heads queries keys"]]:
    """`attend` by `jax.nn.dot_product_attention`, which takes tokens before heads: cuDNN's kernel on a GPU, XLA's elsewhere.

    The kernel has a first derivative only. The weights are computed apart from it; where nobody reads them, XLA removes them.

    Args:
      query: what asks; on a GPU bfloat16 or float16, as key and value.
      key: what is matched.
      value: what is mixed by the weights.
      bias: added to the logits, shared by the batch.
      allowed: False where a query must not see a key.

    Raises:
      errors.UserError: on a GPU, what cuDNN has no kernel for.
    """
    implementation = "xla"
    if jax.default_backend() == "gpu":
        check_kernel(query.dtype, depth=query.shape[-1], tokens=key.shape[1], shifted=not (bias is allowed is None))
        implementation = "cudnn"
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=None if bias is None else bias.astype(query.dtype)[None],
        mask=None if allowed is None else allowed[None, None],
        implementation=implementation,
    )
    return mixed, _weights(query.swapaxes(1, 2), key.swapaxes(1, 2), bias, allowed)


def check_kernel(dtype: jnp.dtype, *, depth: int, tokens: int, shifted: bool) -> None:
    """Holds attention to what cuDNN's fused kernel computes and differentiates (read off JAX 0.10's own checks).

    Args:
      dtype: of query, key and value.
      depth: channels of a head.
      tokens: that are attended to.
      shifted: whether there is a bias or a mask.

    Raises:
      errors.UserError: what does not fit, and what to choose.
    """
    problem = None
    if dtype not in (jnp.bfloat16, jnp.float16):
        problem = f'computes in bfloat16, not {jnp.dtype(dtype).name}: set dtype="bfloat16"'
    elif depth > _DEPTH_OF_KERNEL or depth % 8:
        problem = (
            f"needs heads of a multiple of 8 channels, {_DEPTH_OF_KERNEL} at most, not {depth}: change width or heads"
        )
    elif shifted and tokens % 2:
        problem = f'needs an even number of tokens beside a bias or a mask, not {tokens}: set head="gap"'
    if problem:
        raise errors.UserError(f'the fused attention of a GPU {problem}, or attention="explicit".')


def _weights(query: jax.Array, key: jax.Array, bias: jax.Array | None, allowed: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)[None]
    if allowed is not None:
        logits = jnp.where(allowed[None, None], logits, jnp.finfo(logits.dtype).min)
    return layers.softmax(logits).astype(query.dtype)


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
