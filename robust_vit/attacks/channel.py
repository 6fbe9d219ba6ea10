"""From a file to a photograph of its print, as a differentiable transform, and how often an attack does not survive it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from robust_vit import errors
from robust_vit.attacks import arguments, cameras, jpeg, warps
from robust_vit.metrics import statistics

_DARKEST = 1.0 / 255.0  # Below it the curve of a gamma is straight: its slope at zero would be infinite.


class Channel(flax.struct.PyTreeNode, kw_only=True):
    """A random print and photograph of each image: `(keys, images) -> images`. `print_photo` makes one.

    In the order of the attributes: colours of print and light, perspective, blur, noise of the sensor, JPEG. A part that is None
    is left out. Ranges are (low, high), drawn uniformly for each image, colours for each channel too.

    Attributes:
      strength: 0 is the identity, 1 the ranges as given; between them every range shrinks towards what does nothing.
      gain: factor of the colours.
      bias: what is added to the colours.
      gamma: exponent of the colours, before gain and bias.
      tilt: largest angle about the vertical and about the horizontal axis, in degrees.
      roll: largest angle in the plane, in degrees.
      scale: of what is seen.
      shift: largest shift, as a share of the image's sides.
      blur: standard deviation in pixels.
      noise: standard deviation in pixel units [0, 1].
      quality: of JPEG, 1 to 100.
      radius: of the blur in pixels; static.
      padding: what lies beyond the print, as in `warps.affine`; static.
      rounding: of `jpeg.jpeg`; static.
    """

    strength: Any
    gain: Any = None
    bias: Any = None
    gamma: Any = None
    tilt: Any = None
    roll: Any = None
    scale: Any = None
    shift: Any = None
    blur: Any = None
    noise: Any = None
    quality: Any = None
    radius: int = flax.struct.field(pytree_node=False, default=1)
    padding: str = flax.struct.field(pytree_node=False, default="edge")
    rounding: Callable = flax.struct.field(pytree_node=False, default=jpeg.straight_through)

    @jax.jit
    def __call__(
        self, keys: Key[Array, " batch"], images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """The images after print and photograph, in [0, 1]. No passes of a model.

        Args:
          keys: one typed key an example: what is drawn for an image depends on its own key only.
          images: canonical pixels in [0, 1].
        """
        found = self._coloured(keys, images)
        found = self._moved(keys, found)
        if self.blur is not None:
            found = cameras.blur(found, self._draw(keys, "blur", 0.0, like=images), radius=self.radius)
        if self.noise is not None:
            deviations = self._draw(keys, "noise", 0.0, like=images)
            noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(_fold(keys, "grains"))
            found = jnp.clip(found + deviations[:, None, None, None] * noise, 0.0, 1.0)
        if self.quality is not None:
            quality = self._draw(keys, "quality", 100.0, like=images)
            # JPEG of quality 100 rounds to 8 bits: at no strength there is no file in between.
            coded = jpeg.jpeg(found, quality, rounding=self.rounding)
            found = jnp.where(jnp.asarray(self.strength) > 0, coded, found)
        return found

    def _coloured(self, keys: jax.Array, images: jax.Array) -> jax.Array:
        if self.gain is None and self.bias is None and self.gamma is None:
            return images

        def per_channel(name: str, neutral: float) -> jax.Array:
            return self._draw(keys, name, neutral, like=images, shape=images.shape[3:])[:, None, None, :]

        found = images
        if self.gamma is not None:
            gamma = per_channel("gamma", 1.0)
            bright = jnp.maximum(images, _DARKEST)
            found = jnp.where(images > _DARKEST, bright**gamma, images * _DARKEST ** (gamma - 1.0))
        if self.gain is not None:
            found = found * per_channel("gain", 1.0)
        if self.bias is not None:
            found = found + per_channel("bias", 0.0)
        return jnp.clip(found, 0.0, 1.0)

    def _moved(self, keys: jax.Array, images: jax.Array) -> jax.Array:
        if self.tilt is None and self.roll is None and self.scale is None and self.shift is None:
            return images
        maps = cameras.camera(
            self._draw(keys, "tilt", 0.0, like=images, shape=(2,), symmetric=True),
            self._draw(keys, "roll", 0.0, like=images, symmetric=True),
            self._draw(keys, "scale", 1.0, like=images),
            self._draw(keys, "shift", 0.0, like=images, shape=(2,), symmetric=True),
            aspect=images.shape[2] / images.shape[1],
        )
        return warps.affine(images, maps, padding=self.padding)

    def _draw(
        self,
        keys: jax.Array,
        name: str,
        neutral: float,
        *,
        like: jax.Array,
        shape: tuple[int, ...] = (),
        symmetric: bool = False,
    ) -> jax.Array:
        """One number an example, or an array of that shape, in the named range as the strength leaves it."""
        limits = getattr(self, name)
        if limits is None:
            return jnp.full((len(keys), *shape), neutral, like.dtype)
        low, high = (-limits, limits) if symmetric else limits
        drawn = jax.vmap(lambda key: jax.random.uniform(key, shape, like.dtype))(_fold(keys, name))
        far = low + (high - low) * drawn
        return (neutral + self.strength * (far - neutral)).astype(like.dtype)


# Each part draws from keys of its own, so that leaving one out changes no other.
_DRAWS = ("gain", "bias", "gamma", "tilt", "roll", "scale", "shift", "blur", "noise", "grains", "quality")


def _fold(keys: jax.Array, name: str) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, _DRAWS.index(name)))(keys)


def print_photo(
    *,
    strength: float | jax.Array = 1.0,
    gain: tuple[float, float] | None = (0.8, 1.2),
    bias: tuple[float, float] | None = (-0.1, 0.1),
    gamma: tuple[float, float] | None = (0.8, 1.25),
    tilt: float | None = 10.0,
    roll: float | None = 5.0,
    scale: tuple[float, float] | None = (0.9, 1.1),
    shift: float | None = 0.03,
    blur: tuple[float, float] | None = (0.0, 1.0),
    noise: tuple[float, float] | None = (0.0, 0.03),
    quality: tuple[float, float] | None = (60.0, 95.0),
    padding: str = "edge",
    rounding: str | Callable = "straight_through",
) -> Channel:
    """The channel digital -> print -> photograph -> file of Kurakin et al. 2017 (arXiv 1607.02533), as a transform.

    They printed and photographed; Athalye et al. 2018 (arXiv 1707.07397) modelled it by random changes, of which this is one set.
    The defaults are a hand-held photograph of a good print, from the front; they are this library's and nobody's measurement.

    Args:
      strength: 0 (the identity) to 1 (the ranges as given) and beyond; a leaf, so that another one compiles nothing.
      gain, bias, gamma, tilt, roll, scale, shift, blur, noise, quality: as in `Channel`; None leaves a part out. A blur of one
        pixel is little for images of 224 pixels and much for those of 32.
      padding: what lies beyond the print: `edge`, `reflect` or `zeros`.
      rounding: in JPEG: `straight_through` or `soft`.

    Raises:
      errors.UserError: a range that is upside down or out of bounds.
    """
    ranges = {
        "gain": (gain, 0.0, np.inf),
        "bias": (bias, -1.0, 1.0),
        "gamma": (gamma, 1e-3, np.inf),
        "scale": (scale, 1e-3, np.inf),
        "blur": (blur, 0.0, 64.0),
        "noise": (noise, 0.0, np.inf),
        "quality": (quality, 1.0, 100.0),
    }
    for name, (limits, least, most) in ranges.items():
        if limits is not None and not (len(limits) == 2 and least <= limits[0] <= limits[1] <= most):
            raise errors.UserError(f"{name} is {limits}: expected (low, high) within [{least:g}, {most:g}], or None.")
    for name, size, most in (("tilt", tilt, 80.0), ("roll", roll, 180.0), ("shift", shift, 1.0)):
        if size is not None and not 0 <= size <= most:
            raise errors.UserError(f"{name} is {size}: expected a number from 0 to {most:g}, or None.")
    if not np.all(np.asarray(strength) >= 0):
        raise errors.UserError(f"strength is {strength}: expected a number from 0 (the identity).")
    if padding not in warps.PADDINGS:
        raise errors.unknown("padding", padding, warps.PADDINGS)

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(arguments.number(part) for part in value)
        return None if value is None else arguments.number(value)

    return Channel(
        strength=leaf(strength),
        **{name: leaf(limits) for name, (limits, _, _) in ranges.items()},
        tilt=leaf(tilt),
        roll=leaf(roll),
        shift=leaf(shift),
        radius=1 if blur is None else max(1, int(np.ceil(3 * blur[1]))),
        padding=padding,
        rounding=arguments.find("rounding", rounding, jpeg.ROUNDINGS),
    )


def destruction_rate(
    right: Bool[np.ndarray, " examples"],
    fooled: Bool[np.ndarray, " examples"],
    right_again: Bool[np.ndarray, " examples"],
) -> statistics.Interval | None:
    """The share of working adversarial images that the channel makes harmless (Kurakin et al. 2017, arXiv 1607.02533, section 3).

    Only images count that the model gets right as they are and wrong once attacked.

    Args:
      right: the model gets the clean image right.
      fooled: it gets the adversarial image wrong.
      right_again: it gets the adversarial image right after the transform.

    Returns:
      The share with its Clopper-Pearson interval over images; None where no attack worked.
    """
    counted = np.asarray(right, bool) & np.asarray(fooled, bool)
    if not counted.any():
        return None
    destroyed = counted & np.asarray(right_again, bool)
    return statistics.proportion(int(destroyed.sum()), int(counted.sum()))
