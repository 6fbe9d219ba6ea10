"""Residual networks, ImageNet and CIFAR forms (He et al. 2016, arXiv 1512.03385)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import errors, mesh
from robust_vit.models import batch_norm, gating, initializers

# depth: (blocks of each stage, bottleneck), He et al. 2016, table 1.
IMAGENET_DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
STEMS = ("imagenet", "cifar")
_EXPANSION = 4


class Convolution(nn.Module):
    """A bias-free convolution, padded by half its kernel on every side, as torch's.

    Attributes:
      channels: of the output.
      size: side of the kernel.
      stride: step in both directions.
      dtype: what is computed in.
    """

    channels: int
    size: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> jax.Array:
        """`[batch, height / stride, width / stride, channels]`, rounded up."""
        kernel = self.param("kernel", initializers.he, (self.size, self.size, x.shape[-1], self.channels))
        padding = self.size // 2
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            mesh.whole(kernel.astype(self.dtype)),
            (self.stride, self.stride),
            ((padding, padding), (padding, padding)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Block(nn.Module):
    """`relu(shortcut(x) + branch(x))`: two 3x3 convolutions, or 1x1, 3x3 (which strides), 1x1 where it is a bottleneck.

    Attributes: those of `ResNet`; and `channels` of the inner convolutions, and the `stride`.
    """

    channels: int
    stride: int
    bottleneck: bool
    projection: bool
    zero_init_residual: bool
    norm_sets: tuple[str, ...]
    dtype: str

    @nn.compact
    def __call__(
        self, x: jax.Array, gate: Float[Array, " batch"] | None, train: bool, norm_set: str
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The block's output and its features."""
        layers = ((self.channels, 3, self.stride), (self.channels, 3, 1))
        if self.bottleneck:
            layers = ((self.channels, 1, 1), (self.channels, 3, self.stride), (_EXPANSION * self.channels, 1, 1))
        branch = x
        for index, (channels, size, stride) in enumerate(layers, start=1):
            last = index == len(layers)
            branch = Convolution(channels, size, stride, self.dtype, name=f"convolution{index}")(branch)
            branch = batch_norm.BatchNorm(
                self.norm_sets, last and self.zero_init_residual, self.dtype, name=f"norm{index}"
            )(branch, train=train, norm_set=norm_set)
            branch = branch if last else nn.relu(branch)
        branch = gating.apply(branch, gate)
        out = nn.relu(self._shortcut(x, branch.shape[-1], train, norm_set) + branch)
        return out, {"branch": branch, "out": out}

    def _shortcut(self, x: jax.Array, channels: int, train: bool, norm_set: str) -> jax.Array:
        if self.stride == 1 and x.shape[-1] == channels:
            return x
        if self.projection:
            x = Convolution(channels, 1, self.stride, self.dtype, name="shortcut")(x)
            norm = batch_norm.BatchNorm(self.norm_sets, False, self.dtype, name="shortcut_norm")
            return norm(x, train=train, norm_set=norm_set)
        # Option A: every second pixel, the new channels are zero, half on each side as in the usual CIFAR code.
        missing = channels - x.shape[-1]
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class ResNet(nn.Module):
    """A residual network.

    Attributes:
      num_classes: width of the logits.
      blocks: number of blocks of each stage; a stage doubles the channels and, after the first, halves the size.
      width: inner channels of the first stage.
      bottleneck: blocks of 1x1, 3x3, 1x1 convolutions with four times the channels at the output.
      stem: "imagenet" is a 7x7 convolution of stride 2 and a max pooling, "cifar" a 3x3 convolution.
      projection: shortcuts that change shape are 1x1 convolutions (option B), else free of parameters (option A).
      stochastic_depth: probability of dropping the last branch; it grows linearly over the branches.
      zero_init_residual: the last scale of each branch starts at zero.
      norm_sets: names of the sets of BatchNorm variables that are kept.
      dtype: "float32" or "bfloat16", what is computed in. Parameters, statistics and logits are float32.
    """

    num_classes: int
    blocks: tuple[int, ...]
    width: int
    bottleneck: bool
    stem: str
    projection: bool
    stochastic_depth: float = 0.0
    zero_init_residual: bool = False
    norm_sets: tuple[str, ...] = ("main",)
    dtype: str = "float32"

    @property
    def branches(self) -> tuple[str, ...]:
        """The residual branches, in the order of `gates` and under the names of their features."""
        return tuple(
            f"{_block(stage, index)}/branch"
            for stage, count in enumerate(self.blocks, start=1)
            for index in range(count)
        )

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

        Features: `stem`, `stageN/blockNN/branch` is what a branch adds, `stageN/blockNN/out` the sum after its ReLU,
        `pre_logits` `[batch, channels]`.

        Args:
          images: normalised.
          train: normalises by the batch and, where "batch_stats" is mutable, moves the running statistics; draws stochastic
            depth from the "dropout" key, where the model has it.
          gates: `[batch or 1, len(branches)]`; None is all ones.
          norm_set: which of `norm_sets` normalises.
        """
        batch, count = images.shape[0], sum(self.blocks)
        gating.check(gates, batch=batch, branches=count)
        if train and self.stochastic_depth:
            key, rate = self.make_rng("dropout"), self.stochastic_depth
            gates = gating.stochastic_depth(key, gates, rate=rate, batch=batch, branches=count)
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = Convolution(self.width, size, stride, self.dtype, name="stem")(images)
        norm = batch_norm.BatchNorm(self.norm_sets, False, self.dtype, name="stem_norm")
        x = nn.relu(norm(x, train=train, norm_set=norm_set))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        features = {"stem": x}
        position = 0
        for stage, stage_blocks in enumerate(self.blocks, start=1):
            for index in range(stage_blocks):
                block = Block(
                    channels=self.width * 2 ** (stage - 1),
                    stride=2 if stage > 1 and index == 0 else 1,
                    bottleneck=self.bottleneck,
                    projection=self.projection,
                    zero_init_residual=self.zero_init_residual,
                    norm_sets=self.norm_sets,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{index:02d}",
                )
                x, found = block(x, None if gates is None else gates[:, position], train, norm_set)
                features.update({f"{_block(stage, index)}/{part}": value for part, value in found.items()})
                position += 1
        x = jnp.mean(x, axis=(1, 2))
        features["pre_logits"] = x
        head = nn.Dense(self.num_classes, kernel_init=initializers.lecun, dtype=self.dtype, name="head")
        return head(x).astype(jnp.float32), features


def _block(stage: int, index: int) -> str:
    return f"stage{stage}/block{index:02d}"


def build(
    *,
    num_classes: int,
    depth: int = 50,
    width: int | None = None,
    stem: str | None = None,
    stochastic_depth: float = 0.0,
    zero_init_residual: bool = False,
    norm_sets: tuple[str, ...] = ("main",),
    dtype: str = "float32",
) -> ResNet:
    """A `ResNet` of a published depth.

    Depths 18, 34, 50, 101 and 152 are the ImageNet forms: four stages, width 64, projection shortcuts; `stem="cifar"` fits them
    to small images. Depths 6 n + 2 (8, 14, 20, 32, 44, 56, 110) are the CIFAR forms: three stages of n blocks, width 16,
    shortcuts of option A. The other options are the attributes of `ResNet`.

    Raises:
      errors.UserError: an unknown depth or stem, or a number out of range.
    """
    imagenet = depth in IMAGENET_DEPTHS
    if not imagenet and (depth < 8 or depth % 6 != 2):
        raise errors.UserError(
            f"a ResNet of depth {depth} is not known: choose {', '.join(map(str, IMAGENET_DEPTHS))}, or for small images "
            "6 n + 2 (8, 14, 20, 32, 44, 56, 110)."
        )
    stem = stem if stem is not None else ("imagenet" if imagenet else "cifar")
    if stem not in STEMS:
        raise errors.unknown("ResNet stem", stem, STEMS)
    width = width if width is not None else (64 if imagenet else 16)
    if width < 1:
        raise errors.UserError(f"width={width}: expected a positive whole number.")
    if not 0.0 <= stochastic_depth < 1.0:
        raise errors.UserError(f"stochastic_depth={stochastic_depth}: expected a probability in [0, 1).")
    norm_sets = tuple(norm_sets)
    if "main" not in norm_sets or len(set(norm_sets)) != len(norm_sets):
        raise errors.UserError(f'norm_sets={norm_sets}: expected distinct names, "main" among them.')
    if dtype not in ("float32", "bfloat16"):
        raise errors.unknown("dtype", dtype, ("float32", "bfloat16"))
    blocks, bottleneck = IMAGENET_DEPTHS.get(depth, (((depth - 2) // 6,) * 3, False))
    return ResNet(
        num_classes=num_classes,
        blocks=blocks,
        width=width,
        bottleneck=bottleneck,
        stem=stem,
        projection=imagenet,
        stochastic_depth=float(stochastic_depth),
        zero_init_residual=zero_init_residual,
        norm_sets=norm_sets,
        dtype=dtype,
    )
