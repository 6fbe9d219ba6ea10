"""Corruptions by noise that is independent from pixel to pixel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robust_vit import errors
from robust_vit.corruptions import severities

# hendrycks/robustness: ImageNet-C/create_c/make_imagenet_c.py and make_cifar_c.py.
GAUSSIAN = {
    "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38),
    "cifar": (0.04, 0.06, 0.08, 0.09, 0.10),
}


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """Made by `gaussian_noise`.

    Attributes:
      deviations: standard deviation at each severity, in pixel units.
    """

    deviations: tuple[float, ...]

    def __call__(
        self, keys: Key[Array, " batch"], images: Float[Array, "batch height width channels"], severity: int | jax.Array
    ) -> Float[Array, "batch height width channels"]:
        """Images with noise, clipped to [0, 1].

        Args:
          keys: one typed key an example.
          images: canonical pixels in [0, 1].
          severity: 1 to 5, one for the whole call; may be traced.
        """
        deviation = severities.level(self.deviations, severity)
        noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys)
        return jnp.clip(images + deviation.astype(images.dtype) * noise, 0.0, 1.0)


def gaussian_noise(*, benchmark: str = "imagenet") -> GaussianNoise:
    """Additive Gaussian noise (Hendrycks & Dietterich 2019). Departure: not rounded to 8 bits, which the original truncates to.

    Args:
      benchmark: whose severities: `imagenet` (ImageNet-C) or `cifar` (CIFAR-10-C and CIFAR-100-C).
    """
    if benchmark not in GAUSSIAN:
        raise errors.unknown("benchmark of gaussian_noise", benchmark, GAUSSIAN)
    return GaussianNoise(GAUSSIAN[benchmark])
