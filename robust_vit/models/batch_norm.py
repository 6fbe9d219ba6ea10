"""Batch normalisation with several named sets of statistics."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import errors

_EPSILON = 1e-5
_MOMENTUM = 0.9


class BatchNorm(nn.Module):
    """Normalises each channel by its mean and variance over the batch and all positions (Ioffe & Szegedy 2015, arXiv 1502.03167).

    The batch is the whole, global one: on a mesh, `jax.jit` takes the mean over all devices. Each set in `norm_sets` has its own
    statistics, scale and shift (Xie et al. 2020, AdvProp, arXiv 1911.09665). Statistics are float32.

    Attributes:
      norm_sets: names of the sets; "main" keeps the plain names in the variables, another set is a suffix.
      zero_scale: the scale starts at zero, so that a residual branch starts as nothing (Goyal et al. 2017).
      dtype: what the output has.
    """

    norm_sets: tuple[str, ...]
    zero_scale: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool, norm_set: str
    ) -> Float[Array, "batch height width channels"]:
        """Normalised by the batch and the running statistics moved (`train`), or normalised by the running statistics."""
        if norm_set not in self.norm_sets:
            raise errors.unknown("norm_set", norm_set, self.norm_sets)
        shape = (x.shape[-1],)
        scale_init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        for name in self.norm_sets:
            # Every set is declared whichever is used: the variables of a module must not depend on the call.
            suffix = "" if name == "main" else f"_{name}"
            own_scale = self.param(f"scale{suffix}", scale_init, shape)
            own_bias = self.param(f"bias{suffix}", nn.initializers.zeros, shape)
            own_mean = self.variable("batch_stats", f"mean{suffix}", jnp.zeros, shape)
            own_variance = self.variable("batch_stats", f"var{suffix}", jnp.ones, shape)
            if name == norm_set:
                scale, bias, running_mean, running_variance = own_scale, own_bias, own_mean, own_variance
        mean, variance = running_mean.value, running_variance.value
        if train:
            mean, variance = _moments(x.astype(jnp.float32))
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                running_mean.value = _MOMENTUM * running_mean.value + (1.0 - _MOMENTUM) * mean
                running_variance.value = _MOMENTUM * running_variance.value + (1.0 - _MOMENTUM) * variance
        factor = scale * jax.lax.rsqrt(variance + _EPSILON)
        shift = bias - mean * factor
        factor, shift = (each.astype(self.dtype)[None, None, None, :] for each in (factor, shift))
        return x.astype(self.dtype) * factor + shift


def _moments(x: Float[Array, "batch height width channels"]) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance of each channel, in one pass over `x`."""
    mean = jnp.mean(x, axis=(0, 1, 2))
    square = jnp.mean(jnp.square(x), axis=(0, 1, 2))
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)
