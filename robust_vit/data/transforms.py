"""Transforms of uint8 images, written as strings: "resize(256)", "random_resized_crop(224, 0.08, 1.0)".

A random transform is given its uniform draws; it draws nothing itself. So an image depends on (seed, epoch, row) and on
nothing else, and reading from memory, from disk or on the device gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from robust_vit import errors, registry

Pixels = UInt8[np.ndarray, "height width channels"]

_GEOMETRY = "robust_vit.data.geometry:"
_COLOUR = "robust_vit.data.colour:"
TRANSFORMS = {
    "resize": _GEOMETRY + "resize",
    "center_crop": _GEOMETRY + "center_crop",
    "pad_crop": _GEOMETRY + "pad_crop",
    "flip": _GEOMETRY + "flip",
    "random_resized_crop": _GEOMETRY + "random_resized_crop",
    "simple_random_crop": _GEOMETRY + "simple_random_crop",
    "random_erasing": _GEOMETRY + "random_erasing",
    "color_jitter": _COLOUR + "color_jitter",
    "three_augment": _COLOUR + "three_augment",
    "rand_augment": "robust_vit.data.rand_augment:rand_augment",
}


@dataclasses.dataclass(frozen=True)
class Batched:
    """A transform of many images of one size: the host decides, then the host or the device moves the pixels.

    Both give the bytes of `Transform.apply` on each image.

    Attributes:
      decide: uniforms `[batch, draws]` -> int32 `[batch, k]`.
      host: (images uint8 `[batch, height, width, channels]`, decisions) -> images; may write over its argument.
      device: the same of JAX arrays, traceable.
    """

    decide: Callable[[Float[np.ndarray, "batch draws"]], Int[np.ndarray, "batch k"]]
    host: Callable[[np.ndarray, np.ndarray], np.ndarray]
    device: Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Window:
    """A transform that cuts a rectangle and resizes it to a square: it can be fused with the decoding of a JPEG.

    Attributes:
      box: (height, width, uniforms) -> (top, left, height, width) in pixels.
      size: sides of the result.
      filter: a key of `resampling.FILTERS`.
    """

    box: Callable[[int, int, Sequence[float]], tuple[int, int, int, int]]
    size: int
    filter: str


@dataclasses.dataclass(frozen=True)
class Transform:
    """A configured transform.

    Attributes:
      name: as registered.
      apply: `apply(image)`, or `apply(image, uniforms)` where `draws` is not zero.
      draws: how many uniform numbers in [0, 1) one image takes.
      takes_any_size: whether the output's size does not depend on the input's.
      batched: the same of many images at once, where there is such a form.
      window: the same as a rectangle, where it is one.
    """

    name: str
    apply: Callable[..., np.ndarray]
    draws: int = 0
    takes_any_size: bool = False
    batched: Batched | None = None
    window: Window | None = None

    def __call__(self, image: Pixels, uniforms: Float[np.ndarray, " draws"]) -> Pixels:
        """The transformed image; `uniforms` is empty where nothing is drawn."""
        return self.apply(image, uniforms) if self.draws else self.apply(image)


def parse(text: str) -> Transform:
    """A transform from its string; arguments are Python literals.

    Raises:
      errors.UserError: not a call of a known transform, or arguments that it does not take.
    """
    name, positional, named = registry.parse("transform", text, example="'pad_crop(4)' or 'flip()'")
    factory = registry.find("transform", name, TRANSFORMS)
    try:
        inspect.signature(factory).bind(*positional, **named)
    except TypeError as error:
        raise errors.UserError(f"transform {text!r}: {error}; it takes {name}{inspect.signature(factory)}.") from error
    try:
        return factory(*positional, **named)
    except (TypeError, ValueError) as error:  # An argument of another kind: "pad_crop('4')".
        raise errors.UserError(f"transform {text!r}: {error}; it takes {name}{inspect.signature(factory)}.") from error


def parse_all(texts: Sequence[str]) -> tuple[Transform, ...]:
    """`parse` of each string."""
    if isinstance(texts, str):
        raise errors.UserError(f"transforms are given as the string {texts!r}: give a tuple, ({texts!r},).")
    return tuple(parse(text) for text in texts)


def apply_to_batch(
    transform: Transform, images: np.ndarray | list[np.ndarray], uniforms: Float[np.ndarray, "batch draws"]
) -> np.ndarray | list[np.ndarray]:
    """A transform of each image: at once where it and the images allow it. May write over `images`.

    Args:
      transform: what to apply.
      images: `[batch, height, width, channels]`, or a list of images of several sizes.
      uniforms: the draws of each image.

    Returns:
      An array where all results have one size, else a list.
    """
    if isinstance(images, np.ndarray) and transform.batched is not None:
        return transform.batched.host(images, transform.batched.decide(uniforms))
    return stacked([transform(image, drawn) for image, drawn in zip(images, uniforms, strict=True)])


def stacked(images: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """One array where all images have one size, else the list."""
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def check_number(name: str, argument: str, value: object, low: float, high: float) -> None:
    """Refuses an argument that is no number in [low, high].

    Raises:
      errors.UserError: naming the transform and the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise errors.UserError(f"{name}: {argument} is {value!r}: expected a number from {low:g} to {high:g}.")
