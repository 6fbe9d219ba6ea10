"""The parts of a pre-norm transformer encoder: MLP, block, attention pooling."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit.models import attention, gating, initializers, layers, positions


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout (Srivastava et al. 2014): a share `rate` of zeros, the rest divided by 1 - rate; without a key, `x` itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.size,)).reshape(x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def _split_heads(x: jax.Array, count: int, heads: int) -> list[jax.Array]:
    """`[batch, tokens, count * width]` to `count` times `[batch, tokens, heads, depth]`."""
    parts = x.reshape(*x.shape[:2], count, heads, -1)
    return [parts[:, :, index] for index in range(count)]


def _heads_first(*parts: jax.Array) -> list[jax.Array]:
    return [part.swapaxes(1, 2) for part in parts]


class Mlp(nn.Module):
    """Two dense layers with a GELU between.

    Attributes:
      hidden: width of the hidden layer.
      approximate: tanh approximation of the GELU; the exact one is what `transformers` and torch weights expect.
      dtype: what is computed in.
    """

    hidden: int
    approximate: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Applied to each token alone."""
        dense = {"kernel_init": initializers.glorot, "dtype": self.dtype}
        hidden = layers.Dense(self.hidden, name="expand", **dense)(x)
        return layers.Dense(x.shape[-1], name="contract", **dense)(
            nn.gelu(hidden) if self.approximate else layers.gelu(hidden)
        )


class Block(nn.Module):
    """One encoder block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Attributes: those of `vit.ViT`, and `grid`, the rows and columns of patches.
    """

    heads: int
    mlp_width: int
    grid: tuple[int, int]
    class_token: bool
    relative: bool
    neighbourhood: int | None
    layer_scale: float | None
    dropout: float
    qkv_bias: bool
    approximate_gelu: bool
    attention: str
    dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        gates: jax.Array | None,
        key: jax.Array | None,
        read: int | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The block's output and its features.

        Args:
          x: the tokens.
          gates: `[batch or 1, 2]`, or None.
          key: decides the dropout, or None.
          read: how many of the first tokens anybody reads; only theirs are then computed, and without dropout. None is all.
        """
        if read is not None and key is not None:
            raise ValueError("dropout draws for all tokens: read=None.")
        keys = (None, None) if key is None else jax.random.split(key)
        attention_gate, mlp_gate = (None, None) if gates is None else (gates[:, 0], gates[:, 1])
        normed = layers.LayerNorm(self.dtype, name="attention_norm")(x)
        branch, weights = self._attention(normed, read)
        branch = gating.apply(self._scaled(dropped(branch, self.dropout, keys[0]), "attention_scale"), attention_gate)
        features = {"attention": branch, "attention_weights": weights}
        x = x[:, :read] + branch
        normed = layers.LayerNorm(self.dtype, name="mlp_norm")(x)
        branch = Mlp(self.mlp_width, self.approximate_gelu, self.dtype, name="mlp")(normed)
        branch = gating.apply(self._scaled(dropped(branch, self.dropout, keys[1]), "mlp_scale"), mlp_gate)
        x = x + branch
        return x, {**features, "mlp": branch, "out": x}

    def _attention(self, x: jax.Array, read: int | None) -> tuple[jax.Array, jax.Array]:
        width = x.shape[-1]
        qkv = layers.Dense(
            3 * width,
            use_bias=self.qkv_bias,
            kernel_init=initializers.square_projections,
            dtype=self.dtype,
            name="query_key_value",
        )(x)
        bias = self._relative_bias() if self.relative else None
        allowed = None
        if self.neighbourhood is not None:
            allowed = jnp.asarray(
                attention.neighbourhood(self.grid, window=self.neighbourhood, class_token=self.class_token)
            )
        query, key, value = _split_heads(qkv, 3, self.heads)
        if read is not None:
            query = query[:, :read]
            bias, allowed = (None if each is None else each[..., :read, :] for each in (bias, allowed))
        if self.attention == "fused" and read is None:
            mixed, weights = attention.fused(query, key, value, bias=bias, allowed=allowed)
        else:
            mixed, weights = attention.attend(*_heads_first(query, key, value), bias=bias, allowed=allowed)
            mixed = mixed.swapaxes(1, 2)
        project = layers.Dense(width, kernel_init=initializers.glorot, dtype=self.dtype, name="project")
        return project(mixed.reshape(*mixed.shape[:2], width)), weights

    def _relative_bias(self) -> jax.Array:
        index, length = positions.relative_offsets(self.grid, class_token=self.class_token)
        table = self.param("relative_position", initializers.position, (length, self.heads))
        return table[index].transpose(2, 0, 1)

    def _scaled(self, branch: jax.Array, name: str) -> jax.Array:
        """LayerScale (Touvron et al. 2021, arXiv 2103.17239)."""
        if self.layer_scale is None:
            return branch
        scale = self.param(name, nn.initializers.constant(self.layer_scale), (branch.shape[-1],))
        return branch * scale.astype(branch.dtype)[None, None, :]


class AttentionPooling(nn.Module):
    """One learned query attends over all tokens, then an MLP (Zhai et al. 2022, arXiv 2106.04560, the MAP head).

    Attributes: those of `vit.ViT`.
    """

    heads: int
    mlp_width: int
    qkv_bias: bool
    approximate_gelu: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> tuple[Float[Array, "batch width"], jax.Array]:
        """The pooled token and the attention weights `[batch, heads, 1, tokens]`."""
        width = x.shape[-1]
        probe = self.param("probe", initializers.glorot, (1, 1, width)).astype(x.dtype)
        dense = {"kernel_init": initializers.glorot, "dtype": self.dtype}
        query = layers.Dense(width, use_bias=self.qkv_bias, name="query", **dense)(probe)
        key_value = layers.Dense(
            2 * width,
            use_bias=self.qkv_bias,
            kernel_init=initializers.square_projections,
            dtype=self.dtype,
            name="key_value",
        )(x)
        (query,) = _heads_first(*_split_heads(query, 1, self.heads))
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape[1:]))
        mixed, weights = attention.attend(query, *_heads_first(*_split_heads(key_value, 2, self.heads)))
        pooled = layers.Dense(width, name="project", **dense)(mixed.swapaxes(1, 2).reshape(x.shape[0], 1, width))
        normed = layers.LayerNorm(self.dtype, name="mlp_norm")(pooled)
        pooled = pooled + Mlp(self.mlp_width, self.approximate_gelu, self.dtype, name="mlp")(normed)
        return pooled[:, 0], weights
