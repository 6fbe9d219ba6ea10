"""Roto-translation: the worst of a grid, or of a few random draws, of small turns and shifts of an image."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_vit import classifier, errors
from robust_vit import mesh as meshes
from robust_vit.attacks import arguments, evaluation, norms, skeleton, warps


class State(skeleton.State, kw_only=True):
    """Where the search of each example stands.

    Attributes:
      highest: loss of `images`, in the direction of the goal.
    """

    highest: Float[Array, " batch"]


class Landscape(NamedTuple):
    """What the model does under transforms of a `RotoTranslation`.

    Attributes:
      parameters: shift to the right and down, in fractions of width and height, and degrees counterclockwise.
      prediction: the class.
      loss: in the attack's own loss.
      reached: the goal is.
    """

    parameters: Float[Array, "transforms batch 3"]
    prediction: Int[Array, "transforms batch"]
    loss: Float[Array, "transforms batch"]
    reached: Bool[Array, "transforms batch"]


class RotoTranslation(skeleton.Attack, kw_only=True):
    """Search over turns and shifts. `robust_vit.attacks.build("roto_translation", ...)` makes one.

    The transforms are numbered: 0 is the image as it is, then those of the grid from the farthest to the nearest, or the draws.

    Attributes:
      shift: largest shift, in fractions of width and height.
      degrees: largest turn, to either side.
      grid: shifts to the right, shifts down and turns, evenly spaced from limit to limit; None for random draws.
      tries: random draws, uniform within the limits, where there is no grid.
      padding: what a transform brings in from beyond the image; one of `warps.PADDINGS`.
      together: transforms of one step.
      stop_on_success: return the first transform that reaches the goal, in their order; otherwise, and on a model that draws, all
        are tried, and the one of the highest loss among those that reach it is returned.
    """

    shift: Any
    degrees: Any
    grid: tuple[int, int, int] | None = flax.struct.field(pytree_node=False, default=(5, 5, 31))
    tries: int = flax.struct.field(pytree_node=False, default=0)
    padding: str = flax.struct.field(pytree_node=False, default="zeros")
    together: int = flax.struct.field(pytree_node=False, default=5)
    stop_on_success: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def transforms(self) -> int:
        """How many there are, the image as it is among them."""
        return 1 + self.tries if self.grid is None else len(_grid(self.grid))

    @property
    def evaluations(self) -> int:
        """Steps, of `together` transforms each."""
        return -(-self.transforms // self.together)

    @property
    def step_passes(self) -> tuple[int, int]:
        """The transforms of one step."""
        return self.together, 0

    def parameters(self, keys: jax.Array, numbers: Int[Array, " batch"]) -> Float[Array, "batch 3"]:
        """Shift to the right, shift down and degrees of one transform an example, by its number. No passes.

        Args:
          keys: one an example; random draws are made from them.
          numbers: from 0, which is the image as it is.
        """
        if self.grid is not None:
            parts = jnp.asarray(_grid(self.grid))[numbers]
        else:
            keys = jax.vmap(jax.random.fold_in)(keys, numbers)
            parts = jax.vmap(lambda key: jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0))(keys)
            parts = jnp.where(numbers[:, None] == 0, 0.0, parts)
        return parts * jnp.stack([jnp.asarray(limit) for limit in (self.shift, self.shift, self.degrees)])[None]

    def transform(self, images: jax.Array, parameters: Float[Array, "batch 3"]) -> jax.Array:
        """The images, each turned and then shifted as its parameters say."""
        aspect = images.shape[2] / images.shape[1]
        maps = warps.similarity(parameters[:, 2], parameters[:, :2], aspect=aspect)
        return warps.affine(images, maps, padding=self.padding)

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """At the clean image. No passes."""
        fields = skeleton.blank(keys, images, labels)
        lowest = jnp.full(fields["labels"].shape, -jnp.inf, jnp.promote_types(fields["clean"].dtype, jnp.float32))
        return State(**fields, highest=lowest)

    def step(self, model: skeleton.Model, state: State) -> State:
        """Looks at the next `together` transforms. `together` forward passes."""
        images, seen = self.look(model, state.keys, state.clean, state.labels, state.count)
        value = (self.goal.direction * seen.loss).astype(state.highest.dtype)
        reached = seen.reached
        if self.stop_on_success:
            best = jnp.where(jnp.any(reached, axis=0), jnp.argmax(reached, axis=0), jnp.argmax(value, axis=0))
        else:
            best = jnp.argmax(jnp.where(reached | ~jnp.any(reached, axis=0)[None], value, -jnp.inf), axis=0)
        rows = jnp.arange(len(best))
        found, value, achieved = images[best, rows], value[best, rows], reached[best, rows]
        better = (achieved & ~state.success) | ((achieved == state.success) & (value > state.highest))
        success = state.success | achieved
        images = skeleton.select(better, found, state.images)
        return state.replace(
            images=images,
            best=images,
            highest=jnp.where(better, value, state.highest),
            success=success,
            done=state.done | (success & self.stop_on_success),
        )

    def look(
        self, model: skeleton.Model, keys: jax.Array, images: jax.Array, labels: jax.Array, steps: Int[Array, " batch"]
    ) -> tuple[Float[Array, "together batch height width channels"], Landscape]:
        """The transforms of a step of each example, and what the model does under them. `together` forward passes.

        The last step looks at the last transform again where `together` does not divide their number.
        """
        numbers = steps[None] * self.together + jnp.arange(self.together)[:, None]
        numbers = jnp.minimum(numbers, self.transforms - 1)
        parameters = jax.vmap(self.parameters, in_axes=(None, 0))(keys, numbers)
        images = jax.vmap(self.transform, in_axes=(None, 0))(images, parameters)
        logits = evaluation.widened(model, images, keys, steps)
        loss = jax.vmap(self.loss, in_axes=(0, None))(logits, labels)
        reached = jax.vmap(self.achieves, in_axes=(0, None))(logits, labels)
        return images, Landscape(parameters, jnp.argmax(logits, axis=-1), loss, reached)


def landscape(
    attack: RotoTranslation,
    model: skeleton.Model,
    keys: jax.Array,
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
) -> Landscape:
    """What the model, in float32, does under every transform, in NumPy: with the parameters that an `AttackResult` lacks.

    Cost: as many forward passes as there are transforms, rounded up to whole steps of `attack.together`.
    """
    parts = [
        meshes.fetch(looking(attack, model, keys, images, labels, np.int32(step))) for step in range(attack.evaluations)
    ]
    return Landscape(*(np.concatenate(columns)[: attack.transforms] for columns in zip(*parts, strict=True)))


@jax.jit
def looking(
    attack: RotoTranslation,
    model: skeleton.Model,
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    step: jax.Array,
) -> Landscape:
    """One step of `landscape`, compiled."""
    with jax.default_matmul_precision("highest"):
        steps = jnp.broadcast_to(step, labels.shape)
        return attack.look(classifier.in_float32(model), keys, images, labels, steps)[1]


def _grid(counts: tuple[int, int, int]) -> np.ndarray:
    """Points of a grid in [-1, 1]^3, the centre first and the others from the farthest to the nearest."""
    axes = (np.linspace(-1.0, 1.0, count) if count > 1 else np.zeros(1) for count in counts)
    points = np.asarray(list(itertools.product(*axes)))
    distance = np.sum(points**2, axis=1)
    order = np.argsort(-distance, kind="stable")
    points = points[order][np.sort(distance)[::-1] > 0]
    return np.concatenate([np.zeros((1, 3)), points]).astype(np.float32)


def roto_translation(
    *,
    shift: float = 3 / 32,
    degrees: float = 30.0,
    grid: tuple[int, int, int] = (5, 5, 31),
    tries: int | None = None,
    padding: str = "zeros",
    together: int = 5,
    stop_on_success: bool = True,
    norm: str | norms.Norm = "linf",
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """The worst turn and shift of an image within limits (Engstrom et al. 2019, arXiv 1712.02779, section 3).

    By default the paper's attack on CIFAR-10: up to 3 of 32 pixels and 30 degrees, the worst of a grid of 5 x 5 x 31 = 775; on
    ImageNet it takes 24 of 224 pixels. `tries=10` is its worst of ten random draws. The image as it is comes first, also
    with `tries`, so one that is misclassified stays as it is. One bilinear interpolation does both turn and shift, where the
    paper's code does two.

    The result's `distance` compares pixel with pixel, which of a turned image means nothing: `spatial.landscape` gives the
    parameters and what the model does under each of them.

    Cost: a forward pass a transform at most, one that judges, and no backward pass.

    Args:
      shift: largest shift, in fractions of the image's width and height.
      degrees: largest turn, to either side.
      grid: how many shifts to the right, shifts down and turns, evenly spaced from limit to limit; odd numbers hold zero, and
        1 is zero alone.
      tries: random draws in place of the grid, uniform within the limits.
      padding: `zeros`, `edge` or `reflect`: what comes in from beyond the image.
      together: transforms of one step, as one batch.
      stop_on_success: leave an example at the first transform that reaches the goal, the farthest first; otherwise, and on a
        model that draws, return the one of the highest loss among those that reach it, as the paper does.
      norm: of the result's `distance`.
      loss: `cross_entropy`, `margin`, or a named function: decides where no transform reaches the goal.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
    """
    for name, limit in (("shift", shift), ("degrees", degrees)):
        if not np.all(np.isfinite(limit)) or np.any(np.asarray(limit) < 0):
            raise errors.UserError(f"{name} is {limit}: expected a number from 0.")
    if np.any(np.asarray(shift) >= 1):
        raise errors.UserError(f"shift is {shift}: expected a fraction of the image's size, below 1 (3/32, not 3).")
    if padding not in warps.PADDINGS:
        raise errors.unknown("padding", padding, warps.PADDINGS)
    if len(grid) != 3:
        raise errors.UserError(f"grid is {grid}: expected three numbers: shifts to the right, shifts down, turns.")
    arguments.counts(together=together, **dict(zip(("shifts right", "shifts down", "turns"), grid, strict=True)))
    if tries is not None:
        arguments.counts(tries=tries)
    return RotoTranslation(
        shift=arguments.number(shift),
        degrees=arguments.number(degrees),
        norm=norms.find(norm),
        loss=arguments.find("loss", loss, skeleton.LOSSES),
        goal=arguments.find("goal", goal, skeleton.GOALS),
        grid=tuple(grid) if tries is None else None,
        tries=tries or 0,
        padding=padding,
        together=together,
        stop_on_success=bool(stop_on_success),
    )
