"""Stickers on an object (RP2): a perturbation under a mask that can be printed, for one image or over a sequence of views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import errors, mesh, tables
from robust_vit.attacks import arguments, cameras, evaluation, masked, norms, skeleton, threats, transfer
from robust_vit.metrics import statistics

_TINY = 1e-6  # Under square roots, whose slope at zero is infinite.


class Stickers(masked.MaskedAscent, kw_only=True):
    """`robust_vit.attacks.build("stickers", ...)` makes one.

    Attributes:
      mask: where stickers may be; None is everywhere.
      colours: that can be printed; None is all.
      printability: weight of the non-printability score.
      smoothness: weight of the total variation.
      size: weight of the mean absolute change.
      has_penalties: whether one of the weights is above zero; static.
    """

    mask: Any
    colours: Any
    printability: Any
    smoothness: Any
    size: Any
    has_penalties: bool = flax.struct.field(pytree_node=False, default=False)

    def look(self, model: skeleton.Model, state: masked.State) -> masked.Look:
        """The gradient of the loss less that of the penalties. One forward and backward pass."""
        found = evaluation.ascent(self.loss, model, state.images, state.keys, state.labels, draw=state.count)
        directions = self.goal.direction * found.gradients
        if self.has_penalties:
            directions = directions - jax.grad(lambda images: jnp.sum(self.penalties(images, state)))(state.images)
        mask = jnp.ones(state.mask.shape, bool) if self.mask is None else self._mask(state)
        return masked.Look(directions, found.logits, found.vanished, {"mask": mask})

    def penalties(self, images: jax.Array, state: masked.State) -> Float[Array, " batch"]:
        """The weighted penalties of images, each a mean over the pixels under the mask."""
        under = state.mask
        pixels = jnp.maximum(jnp.sum(under, axis=(1, 2, 3)), 1)
        total = self.smoothness * total_variation(images, under) / pixels
        total = total + self.size * jnp.sum(jnp.abs(images - state.clean), axis=(1, 2, 3)) / pixels
        if self.colours is not None:
            total = total + self.printability * non_printability(images, under, self.colours) / pixels
        return total.astype(images.dtype)

    def _mask(self, state: masked.State) -> Bool[Array, "batch height width 1"]:
        if self.mask.shape != state.clean.shape[1:3]:
            raise errors.UserError(
                f"the mask is {tuple(self.mask.shape)} and the images are {tuple(state.clean.shape[1:3])}: give [height, width]."
            )
        return jnp.broadcast_to(self.mask[None, :, :, None], state.mask.shape)


def non_printability(
    images: Float[Array, "batch height width channels"],
    mask: Bool[Array, "batch height width 1"],
    colours: Float[Array, "colours channels"],
) -> Float[Array, " batch"]:
    """The non-printability score: the sum over pixels of the product of distances to the printable colours.

    Sharif et al. 2016 (Accessorize to a Crime, equation 6); Eykholt et al. 2018, arXiv 1707.08945, equation 3. Zero where each
    pixel is a printable colour.

    Args:
      images: in the units of the colours.
      mask: the pixels that count.
      colours: that can be printed.
    """
    distances = jnp.sum(jnp.square(images[:, :, :, None] - colours[None, None, None].astype(images.dtype)), axis=-1)
    # A distance below a thousandth of the range counts as that: the gradient stays finite on a printable colour.
    products = jnp.prod(jnp.sqrt(distances + _TINY) - np.sqrt(_TINY), axis=-1)
    return jnp.sum(jnp.where(mask[..., 0], products, 0.0), axis=(1, 2))


def total_variation(
    images: Float[Array, "batch height width channels"], mask: Bool[Array, "batch height width 1"]
) -> Float[Array, " batch"]:
    """The sum over pixels under the mask of the length of the step to the pixels below and to the right (Sharif et al. 2016)."""
    down = jnp.diff(images, axis=1, append=images[:, -1:])
    right = jnp.diff(images, axis=2, append=images[:, :, -1:])
    lengths = jnp.sqrt(jnp.sum(down**2 + right**2, axis=-1) + _TINY) - np.sqrt(_TINY)
    return jnp.sum(jnp.where(mask[..., 0], lengths, 0.0), axis=(1, 2))


class ByView(NamedTuple):
    """What stickers do from each view: `by_view` makes it.

    Attributes:
      distances: of each view.
      angles: likewise, in degrees.
      right: the model is right on the clean image from there.
      success: the image with stickers reaches the goal from there; raw, also where the clean one is not recognised.
    """

    distances: Float[np.ndarray, " views"]
    angles: Float[np.ndarray, " views"]
    right: Bool[np.ndarray, "views batch"]
    success: Bool[np.ndarray, "views batch"]

    def table(self) -> tables.Table:
        """One row a view and one for all: success among the images that are recognised clean from there (their equation 4)."""
        rows = [
            (float(distance), float(angle), _rate(success & right, right))
            for distance, angle, right, success in zip(*self, strict=True)
        ]
        rows.append(("all", "all", _rate(self.success & self.right, self.right, interval=False)))
        return tables.Table(
            "Success of stickers by view",
            ("distance", "angle", "success"),
            rows,
            "Of the images that are recognised without stickers from the same view; 95 % Clopper-Pearson intervals over images. "
            "Distances in units of that at which the image fills the picture, angles in degrees. All views: of the same images, "
            "so without an interval.",
        )


def by_view(
    model: skeleton.Model,
    views: cameras.Views,
    keys: Key[Array, " batch"],
    clean: Float[Array, "batch height width channels"],
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    *,
    targets: Int[Array, " batch"] | None = None,
) -> ByView:
    """Whether images with stickers reach their goal from each of a sequence of views. Two forward passes a view.

    Table 1 of Eykholt et al. 2018 (arXiv 1707.08945); judged in float32.

    Args:
      model: canonical pixels to logits.
      views: `robust_vit.attacks.views(...)`; the attack may have been made over others.
      keys: one typed key an example.
      clean: the images without stickers.
      images: with them.
      labels: true labels.
      targets: the classes to reach; None is any but the true one.
    """
    truth, goal = np.asarray(labels), None if targets is None else np.asarray(targets)
    right, success = [], []
    for index in range(len(views.distances)):
        before, after = (
            mesh.fetch(transfer.predict(model, keys, views.at(index, pixels))) for pixels in (clean, images)
        )
        right.append(before == truth)
        success.append(after != truth if goal is None else after == goal)
    return ByView(np.asarray(views.distances), np.asarray(views.angles), np.stack(right), np.stack(success))


def _rate(hits: np.ndarray, counted: np.ndarray, *, interval: bool = True) -> tables.Number | None:
    if not counted.any():
        return None
    if not interval:
        return tables.Number(float(hits.sum() / counted.sum()), format=".1%")
    return statistics.proportion(hits.sum(), counted.sum()).number(".1%")


def stickers(
    *,
    mask: np.ndarray | jax.Array | None = None,
    colours: np.ndarray | jax.Array | None = None,
    printability: float = 1.0,
    smoothness: float = 0.0,
    size: float = 0.0,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 250,
    learning_rate: float = 0.05,
    decay: float = 0.95,
    decay_every: int = 10,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = False,
) -> Stickers:
    """Robust physical perturbations, RP2 (Eykholt et al. 2018, arXiv 1707.08945, equation 3), under a mask.

    Adam down the loss, the non-printability score and the total variation. Over distances and angles: attack
    `expectation(model, transform=views(distances=..., angles=...))`, whose mean over views takes the place of their mean over
    photographs; `robust_vit.attacks.stickers.by_view` then says what each view makes of it. Departures: penalties are means
    over the mask; the change is penalised in L1; a ball is an option.

    Cost: `steps + 1` forward and backward passes at most, and two forward passes that judge (one with `stop_on_success`).

    Args:
      mask: `[height, width]`, true or 1 where stickers may be; None is everywhere. Their masks come from a first attack with
        `size` above zero: the places that it changes most.
      colours: `[colours, channels]` in [0, 1], those that the printer has; None leaves printability out.
      printability: weight of the non-printability score.
      smoothness: weight of the total variation.
      size: weight of the mean absolute change.
      epsilon: radius of a ball, in pixel units; without it the sticker may be anything.
      norm: `linf` or `l2`.
      threat: a threat model or its name, in place of `epsilon` and `norm`.
      steps, learning_rate, decay, decay_every, loss, goal: as in `patch_fool`.
      stop_on_success: as in `pgd`; off, since a sticker is to hold in views to come.
    """
    shared = masked.settings(
        epsilon=epsilon,
        norm=norm,
        threat=threat,
        learning_rate=learning_rate,
        decay=decay,
        decay_every=decay_every,
        steps=steps,
        loss=loss,
        goal=goal,
        stop_on_success=stop_on_success,
    )
    weights = {"printability": printability, "smoothness": smoothness, "size": size}
    for name, weight in weights.items():
        if not np.all(np.isfinite(weight)) or np.any(np.asarray(weight) < 0):
            raise errors.UserError(f"{name} is {weight}: expected a number from 0.")
    if mask is not None:
        if np.ndim(mask) != 2 or not np.isin(np.asarray(mask), (0, 1)).all() or not np.any(mask):
            raise errors.UserError(
                f"the mask is {np.shape(mask)}: expected [height, width] of 0 and 1 (or False and True), with a 1 in it."
            )
        mask = jnp.asarray(mask, bool)
    if colours is not None:
        if np.ndim(colours) != 2 or np.min(colours) < 0 or np.max(colours) > 1:
            raise errors.UserError(f"colours are {np.shape(colours)}: expected [colours, channels] in [0, 1].")
        colours = jnp.asarray(colours, jnp.result_type(float))
    return Stickers(
        **shared,
        mask=mask,
        colours=colours,
        **{name: arguments.number(weight) for name, weight in weights.items()},
        has_penalties=bool(smoothness or size or (colours is not None and printability)),
    )
