"""The adversarial patch: one printed shape that fools a model wherever it lies in whatever image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from robust_vit import errors, losses
from robust_vit.attacks import arguments, evaluation, expectations, fitting, skeleton, warps

SHAPES = ("circle", "square")
_AREA, _CHANNEL = 1, 2  # What the key of an image is folded with, beside place and angle.


class Patch(flax.struct.PyTreeNode, kw_only=True):
    """A patch with how it is laid on images; `fit` learns one.

    Attributes:
      texture: its pixels in [0, 1]; of a circle the corners are never seen.
      rotation: largest angle to either side at which it is laid, in degrees.
      shape: `circle` or `square`; static.
    """

    texture: Float[Array, "side side channels"]
    rotation: Any
    shape: str = flax.struct.field(pytree_node=False, default="circle")

    @jax.jit
    def apply(
        self,
        keys: Key[Array, " batch"],
        images: Float[Array, "batch height width channels"],
        area: float | Float[Array, " batch"],
    ) -> Float[Array, "batch height width channels"]:
        """Images with the patch, wholly inside, at a place and an angle drawn for each. No passes of a model.

        Args:
          keys: one typed key an example.
          images: canonical pixels in [0, 1].
          area: share of the image that the patch covers, one or `[batch]`; a leaf. What does not fit is made to fit.
        """
        covered, patch = self.place(keys, images, area)
        return images + covered * (patch - images)

    def place(
        self, keys: jax.Array, images: jax.Array, area: float | jax.Array
    ) -> tuple[Float[Array, "batch height width 1"], Float[Array, "batch height width channels"]]:
        """How much of each pixel is covered, 0 to 1, and the patch's colours there. Arguments as in `apply`."""
        batch, height, width, _ = images.shape
        dtype = images.dtype
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (3,), dtype, -1.0, 1.0))(keys)
        radians = jnp.deg2rad(drawn[:, 0] * jnp.asarray(self.rotation, dtype))
        cosine, sine = jnp.cos(radians), jnp.sin(radians)
        # How far it reaches to the sides in units of its half side: a square that is turned needs more room.
        reach = jnp.ones_like(cosine) if self.shape == "circle" else jnp.abs(cosine) + jnp.abs(sine)
        half = jnp.broadcast_to(half_side(self.shape, area, height, width).astype(dtype), (batch,))
        half = jnp.minimum(half, 0.5 * min(height, width) / reach)
        sides = jnp.asarray([width, height], dtype)
        centres = drawn[:, 1:] * (0.5 * sides[None] - (half * reach)[:, None])
        # From pixels about the centre of the image to pixels about that of the patch, turned with it.
        turn = jnp.stack([jnp.stack([cosine, -sine], -1), jnp.stack([sine, cosine], -1)], -2)
        maps = jnp.concatenate([turn, -jnp.sum(turn * centres[:, None, :], axis=-1)[:, :, None]], axis=2)
        y = jnp.arange(height, dtype=dtype)[:, None] - 0.5 * (height - 1)
        x = jnp.arange(width, dtype=dtype)[None] - 0.5 * (width - 1)
        across, down = (
            maps[:, row, 0, None, None] * x[None] + maps[:, row, 1, None, None] * y[None] + maps[:, row, 2, None, None]
            for row in (0, 1)
        )
        distance = (
            jnp.sqrt(across**2 + down**2) if self.shape == "circle" else jnp.maximum(jnp.abs(across), jnp.abs(down))
        )
        # A pixel at the edge is covered in part; a patch of no area covers none.
        size = half[:, None, None]
        covered = jnp.clip(size - distance + 0.5, 0.0, jnp.minimum(2.0 * size, 1.0))
        to_pixels = jnp.concatenate([0.5 * sides, jnp.ones(1, dtype)])
        maps = maps * to_pixels[None, None] / jnp.maximum(half, 1e-3)[:, None, None]
        textures = jnp.broadcast_to(self.texture.astype(dtype)[None], (batch, *self.texture.shape))
        return covered[..., None], warps.affine(textures, maps, padding="edge", out_shape=(height, width))


def half_side(shape: str, area: float | jax.Array, height: int, width: int) -> jax.Array:
    """Half the side, or the radius, in pixels of a patch that covers this share of an image."""
    pixels = jnp.asarray(area) * (height * width)
    return jnp.sqrt(pixels / jnp.pi) if shape == "circle" else 0.5 * jnp.sqrt(pixels)


def fit(
    models: Any | Sequence[Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    key: Key[Array, ""],
    *,
    target: int | None = None,
    shape: str = "circle",
    areas: tuple[float, float] = (0.05, 0.3),
    rotation: float = 22.5,
    side: int | None = None,
    steps: int = 500,
    learning_rate: float = 0.05,
    transform: Callable | None = None,
) -> Patch:
    """Learns an adversarial patch (Brown et al. 2017, arXiv 1712.09665, equation 1).

    Adam on the patch's pixels, clipped to [0, 1]; each step takes a batch and lays the patch on each of its images at an area,
    place and angle drawn for it: the expectation over transformations. Of several models the mean loss is followed, which they
    call an ensemble. Departures: areas rather than diameters are drawn uniformly; Adam in place of gradient descent with a
    rate of 5; without a target, the cross-entropy of the true label is raised (Naseer et al. 2021, arXiv 2105.10497).

    Args:
      models: canonical pixels to logits, one or several, stochastic ones too.
      batches: `image` `[n, height, width, channels]` in [0, 1] and `label` `[n]`, all of one size, `mask` where there is
        padding; gone through again where there are fewer than steps, so a list and not a generator.
      key: the one source of randomness: places, angles, areas and the draws of stochastic models.
      target: the class to reach; None to leave the true one. Images of the target's class teach nothing and are left out.
      shape: `circle` or `square`.
      areas: smallest and largest share of the image that is covered.
      rotation: largest angle to either side, in degrees.
      side: of the texture in pixels; that of the largest patch where it is None.
      steps: one batch, one forward and backward pass of each model, each.
      learning_rate: of Adam, in pixel units.
      transform: `(keys, images) -> images` after the patch is laid on, such as `print_photo()`: for a patch to be printed.

    Raises:
      errors.UserError: a shape, area, target or batch that makes no sense.
    """
    models = tuple(models) if isinstance(models, list | tuple) else (models,)
    check(shape=shape, areas=areas, rotation=rotation, steps=steps, learning_rate=learning_rate)
    stream = fitting.Batches(batches, models)
    goal = stream.goal(target)
    patch, moments = blank(stream.image_shape, shape=shape, area=areas[1], rotation=rotation, side=side)
    numbers = options(areas=areas, learning_rate=learning_rate, transform=transform)
    for step, batch in stream.take(steps, target):
        patch, moments = learn(goal, patch, moments, models, jax.random.fold_in(key, step), batch, numbers)
    return patch


def check(*, shape: str, areas: tuple[float, float], rotation: float, steps: int, learning_rate: float) -> None:
    """Refuses settings of `fit` that make no sense.

    Raises:
      errors.UserError: one of them.
    """
    arguments.counts(steps=steps)
    arguments.positive(learning_rate=learning_rate)
    if shape not in SHAPES:
        raise errors.unknown("shape of a patch", shape, SHAPES)
    most = np.pi / 4 if shape == "circle" else 1.0
    if not 0 < areas[0] <= areas[1] <= most:
        raise errors.UserError(
            f"areas are {areas}: expected shares of the image, smallest first, above 0 and up to {most:.3g} for a {shape}."
        )
    if not 0 <= rotation <= 180:
        raise errors.UserError(f"rotation is {rotation}: expected degrees to either side, 0 to 180.")


def options(*, areas: tuple[float, float], learning_rate: float, transform: Callable | None) -> dict[str, Any]:
    """What each step of `learn` is given beside patch, models and batch, as leaves."""
    return {
        "areas": tuple(arguments.number(area) for area in areas),
        "learning_rate": arguments.number(learning_rate),
        "transform": expectations.as_pytree(transform),
    }


def blank(
    image_shape: tuple[int, int, int], *, shape: str, area: float, rotation: float, side: int | None = None
) -> tuple[Patch, Any]:
    """A grey patch, and Adam's moments of it, before anything is learned.

    Args:
      image_shape: height, width and channels of the images.
      shape: `circle` or `square`.
      area: the largest share of an image that it will cover, for which it has pixels enough where `side` is None.
      rotation: largest angle to either side, in degrees.
      side: of the texture in pixels.

    Raises:
      errors.UserError: a side that is no whole number from 1.
    """
    height, width, channels = image_shape
    if side is None:
        side = max(2, int(np.ceil(2 * float(half_side(shape, area, height, width)))))
    arguments.counts(side=side)
    texture = jnp.full((side, side, channels), 0.5, jnp.float32)
    patch = Patch(texture=texture, rotation=arguments.number(rotation), shape=shape)
    return patch, optax.scale_by_adam().init(texture)


@functools.partial(jax.jit, static_argnums=0)
def learn(
    goal: skeleton.Goal, patch: Patch, moments: Any, models: tuple, key: jax.Array, batch: fitting.Batch, numbers: dict
) -> tuple[Patch, Any]:
    """One step of Adam along the mean gradient over the batch and the models, compiled; `fit` makes its arguments."""
    keys = jax.random.split(key, len(batch.images))
    low, high = numbers["areas"]
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _AREA), (), batch.images.dtype))
    areas = low + (high - low) * draw(keys)

    def lay(texture: jax.Array) -> jax.Array:
        laid = patch.replace(texture=texture).apply(keys, batch.images, areas)
        if numbers["transform"] is not None:
            laid = numbers["transform"](jax.vmap(lambda key: jax.random.fold_in(key, _CHANNEL))(keys), laid)
        return laid

    laid, pull = jax.vjp(lay, patch.texture)
    gradients = sum(
        evaluation.ascent(losses.cross_entropy, model, laid, keys, batch.labels).gradients for model in models
    )
    (gradient,) = pull(batch.weights[:, None, None, None] * gradients)
    moves, moments = optax.scale_by_adam().update(gradient, moments)
    texture = patch.texture + goal.direction * numbers["learning_rate"] * moves
    return patch.replace(texture=jnp.clip(texture, 0.0, 1.0)), moments


@jax.jit
def predict(
    model: Any,
    patch: Patch,
    keys: Key[Array, " batch"],
    images: Float[Array, "batch height width channels"],
    area: float | jax.Array,
) -> Int[Array, " batch"]:
    """The classes that the model sees in images with the patch, each at one place and angle. One forward pass."""
    logits = evaluation.logits(model, patch.apply(keys, images, area), keys)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
