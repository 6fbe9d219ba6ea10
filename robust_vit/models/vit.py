"""The Vision Transformer, pre-norm (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import errors
from robust_vit.models import gating, initializers, layers, positions, transformer

# width, depth, MLP width, heads: Touvron et al. 2021 (DeiT, arXiv 2012.12877), table 1, for Ti and S; Dosovitskiy et al. 2021,
# table 1, for B, L and H.
SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}
HEADS = ("class", "gap", "map")
ATTENTIONS = ("explicit", "fused")


class ViT(nn.Module):
    """A Vision Transformer. The classifying layer starts at zero, so fresh logits are all zero.

    Attributes:
      num_classes: width of the logits.
      width: of a token.
      depth: number of blocks.
      heads: attention heads; divides `width`.
      mlp_width: hidden width of the MLPs.
      patch: side of a patch in pixels; divides the image's.
      head: "class" reads a class token, "gap" the mean of the patches, "map" an attention pooling.
      position: one of `positions.KINDS`.
      neighbourhood: None, or the odd side of the window of patches that a patch attends to.
      layer_scale: None, or the initial factor of each channel of each branch.
      stochastic_depth: probability of dropping the last branch; it grows linearly over the branches.
      dropout: probability of dropping a number at the embedding and at the end of each branch.
      qkv_bias: whether query, key and value have a bias.
      approximate_gelu: the tanh approximation of the GELU.
      scan: one block's program scanned over stacked parameters: compiles faster, steps about 1.2 times slower.
      remat: recompute the blocks in the backward pass; together with `scan` it saves memory.
      attention: "explicit", which has every derivative, or "fused": cuDNN's kernel on a GPU, in bfloat16, with first derivatives
        only (`models.explicit` gives the other); the pooling head is always explicit.
      dtype: "float32" or "bfloat16", what is computed in. Parameters, softmax and logits are float32.
    """

    num_classes: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    head: str = "class"
    position: str = "learned"
    neighbourhood: int | None = None
    layer_scale: float | None = None
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    qkv_bias: bool = True
    approximate_gelu: bool = False
    scan: bool = False
    remat: bool = False
    attention: str = "explicit"
    dtype: str = "float32"

    @property
    def branches(self) -> tuple[str, ...]:
        """The residual branches, in the order of `gates` and under the names of their features."""
        return tuple(f"{_block(index)}/{part}" for index in range(self.depth) for part in ("attention", "mlp"))

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        train: bool = False,
        gates: Float[Array, "batch branches"] | None = None,
        norm_set: str = "main",
    ) -> tuple[Float[Array, "batch classes"], dict[str, jax.Array]]:
        """Logits and features of normalised images.

        Features: `stem` is the embedded tokens with their positions, `blockNN/attention` and `blockNN/mlp` what a branch
        adds, `blockNN/attention_weights` `[batch, heads, tokens, tokens]`, `blockNN/out` the tokens after the block,
        `tokens` the normed ones at the end, `pre_logits` `[batch, width]`, with the MAP head `pool/attention_weights`.

        Args:
          images: normalised.
          train: draws dropout and stochastic depth from the "dropout" key, where the model has them.
          gates: `[batch or 1, len(branches)]`; None is all ones.
          norm_set: not used: LayerNorm keeps no statistics.
        """
        del norm_set
        batch = images.shape[0]
        gating.check(gates, batch=batch, branches=2 * self.depth)
        depth_key, dropout_key = None, None
        if train and (self.stochastic_depth or self.dropout):
            depth_key, dropout_key = jax.random.split(self.make_rng("dropout"))
        if depth_key is not None and self.stochastic_depth:
            rate = self.stochastic_depth
            gates = gating.stochastic_depth(depth_key, gates, rate=rate, batch=batch, branches=2 * self.depth)
        keys = None
        if dropout_key is not None and self.dropout:
            keys = jax.random.split(dropout_key, self.depth + 1)

        x, grid = self._embed(images)
        x = transformer.dropped(x, self.dropout, None if keys is None else keys[-1])
        features = {"stem": x}
        x, read = self._blocks(x, grid, gates, keys, features)
        norm = layers.LayerNorm(self.dtype, name="norm")
        features["tokens"] = x = norm(x)
        if self.head == "class":
            x = (x if read is None else norm(read))[:, 0]
        elif self.head == "gap":
            x = jnp.mean(x, axis=1)
        else:
            x, features["pool/attention_weights"] = transformer.AttentionPooling(
                self.heads, self.mlp_width, self.qkv_bias, self.approximate_gelu, self.dtype, name="pool"
            )(x)
        features["pre_logits"] = x
        head = layers.Dense(self.num_classes, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="head")
        return head(x).astype(jnp.float32), features

    def _embed(self, images: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        batch, height, width, channels = images.shape
        if height % self.patch or width % self.patch:
            raise errors.UserError(
                f"the image is {height} x {width} pixels and the patch {self.patch}: choose a patch that divides both."
            )
        grid = (height // self.patch, width // self.patch)
        patches = images.reshape(batch, grid[0], self.patch, grid[1], self.patch, channels).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, grid[0] * grid[1], self.patch * self.patch * channels)
        x = layers.Dense(self.width, kernel_init=initializers.lecun, dtype=self.dtype, name="embedding")(patches)
        if self.head == "class":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)), x], axis=1)
        table = self._positions(grid, x.shape[1])
        return (x if table is None else x + table.astype(x.dtype)[None]), grid

    def _positions(self, grid: tuple[int, int], tokens: int) -> jax.Array | None:
        if self.position == "learned":
            if self.has_variable("params", "position"):
                found = self.get_variable("params", "position").shape[0]
                if found != tokens:
                    raise errors.UserError(
                        f"the learned positions are for {found} tokens and the image gives {tokens}: use "
                        "models.resize_positions(variables, old_grid, new_grid)."
                    )
            return self.param("position", initializers.position, (tokens, self.width))
        if self.position in ("relative", "none"):
            return None
        if self.position == "sincos1d":
            return jnp.asarray(positions.sincos1d(tokens, self.width))
        table = jnp.asarray(positions.sincos2d(grid, self.width))
        return jnp.pad(table, ((tokens - table.shape[0], 0), (0, 0)))

    def _blocks(
        self, x: jax.Array, grid: tuple[int, int], gates: jax.Array | None, keys: jax.Array | None, features: dict
    ) -> tuple[jax.Array, jax.Array | None]:
        """All blocks in a loop, or scanned over parameters stacked along a leading axis; fills `features`.

        Returns:
          The tokens, and apart from them, where a class token alone is read in the end, what the last block makes of it: nobody
          pays for the other tokens of that block who reads none of its features, as XLA removes them.
        """
        block = transformer.Block
        if self.remat:
            static = () if self.scan else (4,)  # `read`, counted from the block itself.
            block = nn.remat(block, prevent_cse=not self.scan, static_argnums=static)
        settings = {
            "heads": self.heads,
            "mlp_width": self.mlp_width,
            "grid": grid,
            "class_token": self.head == "class",
            "relative": self.position == "relative",
            "neighbourhood": self.neighbourhood,
            "layer_scale": self.layer_scale,
            "dropout": self.dropout,
            "qkv_bias": self.qkv_bias,
            "approximate_gelu": self.approximate_gelu,
            "attention": self.attention,
            "dtype": self.dtype,
        }
        if not self.scan:
            read = None
            for index in range(self.depth):
                of_block = None if gates is None else gates[:, 2 * index : 2 * index + 2]
                key = None if keys is None else keys[index]
                each = block(**settings, name=_block(index))
                if self.head == "class" and index == self.depth - 1 and key is None:
                    read, _ = each(x, of_block, None, 1)
                x, found = each(x, of_block, key, None)
                features.update({f"{_block(index)}/{part}": value for part, value in found.items()})
            return x, read
        stacked = None if gates is None else gates.reshape(gates.shape[0], self.depth, 2).transpose(1, 0, 2)
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, found = scanned(**settings, name="blocks")(x, stacked, None if keys is None else keys[:-1])
        for index in range(self.depth):
            features.update({f"{_block(index)}/{part}": value[index] for part, value in found.items()})
        return x, None


def _block(index: int) -> str:
    return f"block{index:02d}"


def build(
    *,
    num_classes: int,
    size: str | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp_width: int | None = None,
    patch: int = 16,
    head: str = "class",
    position: str = "learned",
    neighbourhood: int | None = None,
    layer_scale: float | None = None,
    stochastic_depth: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: bool = True,
    approximate_gelu: bool = False,
    scan: bool = False,
    remat: bool = False,
    attention: str = "explicit",
    dtype: str = "float32",
) -> ViT:
    """A `ViT` of a named size ("Ti", "S", "B", "L", "H"), of a custom one, or of a named one with parts replaced.

    Without `size`, `width` and `depth` must be given; `heads` defaults to one for each 64 channels and at least 2,
    `mlp_width` to four times the width. The other options are the attributes of `ViT`.

    Raises:
      errors.UserError: an unknown size, head or position, or numbers that do not go together.
    """
    if size is not None:
        if size not in SIZES:
            raise errors.unknown("ViT size", size, SIZES)
        named = SIZES[size]
        if width is not None and width != named[0]:
            named = (width, named[1], 4 * width, max(2, width // 64))
        width, depth, mlp_width, heads = (
            given if given is not None else value
            for given, value in zip((width, depth, mlp_width, heads), named, strict=True)
        )
    if width is None or depth is None:
        raise errors.UserError(
            f"the ViT has no size: give size ({', '.join(SIZES)}), or width and depth (width={width}, depth={depth})."
        )
    heads = heads if heads is not None else max(2, width // 64)
    mlp_width = mlp_width if mlp_width is not None else 4 * width
    if width % heads:
        raise errors.UserError(f"heads={heads} do not divide width={width}: choose a divisor.")
    if head not in HEADS:
        raise errors.unknown("ViT head", head, HEADS)
    if attention not in ATTENTIONS:
        raise errors.unknown("attention", attention, ATTENTIONS)
    if position not in positions.KINDS:
        raise errors.unknown("position embedding", position, positions.KINDS)
    if position.startswith("sincos") and width % 4:
        raise errors.UserError(f"position={position!r} needs a width that is a multiple of 4, not {width}.")
    if neighbourhood is not None and (neighbourhood < 1 or neighbourhood % 2 == 0):
        raise errors.UserError(f"neighbourhood={neighbourhood}: expected None or an odd number of patches.")
    for option, rate in (("stochastic_depth", stochastic_depth), ("dropout", dropout)):
        if not 0.0 <= rate < 1.0:
            raise errors.UserError(f"{option}={rate}: expected a probability in [0, 1).")
    if min(width, depth, heads, mlp_width, patch) < 1:
        raise errors.UserError("width, depth, heads, mlp_width and patch must be positive whole numbers.")
    if dtype not in ("float32", "bfloat16"):
        raise errors.unknown("dtype", dtype, ("float32", "bfloat16"))
    return ViT(
        num_classes=num_classes,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=mlp_width,
        patch=patch,
        head=head,
        position=position,
        neighbourhood=neighbourhood,
        layer_scale=layer_scale,
        stochastic_depth=float(stochastic_depth),
        dropout=float(dropout),
        qkv_bias=qkv_bias,
        approximate_gelu=approximate_gelu,
        scan=scan,
        remat=remat,
        attention=attention,
        dtype=dtype,
    )
