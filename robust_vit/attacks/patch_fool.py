"""Patch-Fool: an attack on the patches of one image that draw a Vision Transformer's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_vit import errors
from robust_vit.attacks import arguments, evaluation, expectations, masked, norms, skeleton, threats

SELECTIONS = ("attention", "saliency", "random")
_LEAST = 1e-12  # Attention below it is nothing: its logarithm would be infinite.


class State(masked.State, kw_only=True):
    """Where each example's attack stands.

    Attributes:
      chosen: the patch, counted row by row, to which attention is drawn: the first of those attacked.
    """

    chosen: Int[Array, " batch"]


class PatchFool(masked.MaskedAscent, kw_only=True):
    """`robust_vit.attacks.build("patch_fool", ...)` makes one.

    Attributes:
      attention_weight: of the gradient of each layer's attention loss beside that of the loss.
      patch: side of a patch, in pixels of the image.
      patches: how many are attacked.
      select: `attention`, `saliency` or `random`.
      layer: whose attention chooses.
      layers: whose attention is drawn.
    """

    attention_weight: Any
    patch: int = flax.struct.field(pytree_node=False, default=16)
    patches: int = flax.struct.field(pytree_node=False, default=1)
    select: str = flax.struct.field(pytree_node=False, default="attention")
    layer: int = flax.struct.field(pytree_node=False, default=4)
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(1, 2, 3, 4, 5))

    @property
    def step_passes(self) -> tuple[int, int]:
        """One forward pass, and a backward pass for the loss and for each layer's attention."""
        return 1, 1 + len(self.layers)

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The state before any evaluation. No passes."""
        common = vars(super().init(keys, images, labels))
        return State(**common, chosen=jnp.zeros(len(images), jnp.int32))

    def look(self, model: skeleton.Model, state: State) -> masked.Look:
        """The gradient of the loss merged with those of the attention losses, and the patches to attack."""
        grid = self._grid(state.clean)
        if self.layers or self.select == "attention":
            directions, logits, vanished, received = self._ask_attention(model, state, grid)
        else:
            found = evaluation.ascent(self.loss, model, state.images, state.keys, state.labels, draw=state.count)
            directions, received = self.goal.direction * found.gradients, None
            logits, vanished = found.logits, found.vanished
        if self.select == "random":
            folded = jax.vmap(lambda key: jax.random.fold_in(key, 1))(state.keys)
            scores = jax.vmap(lambda key: jax.random.uniform(key, (grid[0] * grid[1],)))(folded)
        elif self.select == "saliency":
            scores = _by_patch(jnp.abs(directions), grid)
        else:
            scores = received
        order = jax.lax.top_k(scores, self.patches)[1]
        attacked = jnp.sum(jax.nn.one_hot(order, scores.shape[1], dtype=jnp.int32), axis=1) > 0
        mask = attacked.reshape(-1, *grid).repeat(self.patch, axis=1).repeat(self.patch, axis=2)[..., None]
        fixed = {"mask": mask, "chosen": order[:, 0].astype(jnp.int32)}
        return masked.Look(directions, logits, vanished, fixed)

    def _ask_attention(
        self, model: skeleton.Model, state: State, grid: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array, jax.Array, Float[Array, "batch patches"] | None]:
        wanted = (*self.layers, self.layer) if self.select == "attention" else self.layers

        def drawn(weights):
            received = _received(weights, grid, logarithm=True)
            return jnp.take_along_axis(received, state.chosen[:, None], axis=1)[:, 0]

        def respond(images):
            answers, weights = _attention(model, images, state, wanted)
            logits = evaluation.collapse(answers)
            if (
                answers.ndim == 2
            ):  # One draw; of a stochastic model the attention is averaged over its draws, as the loss is.
                answers, weights = jax.tree.map(lambda array: array[None], (answers, weights))
            values = [_mean(lambda one: self.loss(one, state.labels), answers)]
            values += [_mean(drawn, weights[layer]) for layer in self.layers]
            received = None
            if self.select == "attention":
                received = _mean(lambda one: _received(one, grid), weights[self.layer])
            return tuple(values), (logits, received)

        values, pull, (logits, received) = jax.vjp(respond, state.images, has_aux=True)
        gradients = []
        for index in range(len(values)):
            (gradient,) = pull(tuple(jnp.full_like(v, float(i == index)) for i, v in enumerate(values)))
            finite = jnp.all(jnp.isfinite(gradient), axis=(1, 2, 3))
            gradients.append(jnp.where(finite[:, None, None, None], gradient, 0.0))
        vanished = jnp.all(gradients[0] == 0.0, axis=(1, 2, 3))
        # Under the mask alone: what lies outside of it never moves, and must not decide what conflicts.
        main = jnp.where(state.mask, self.goal.direction * gradients[0], 0.0)
        merged = self.goal.direction * gradients[0]
        for gradient in gradients[1:]:
            gradient = jnp.where(state.mask, gradient, 0.0)
            merged = merged + jnp.asarray(self.attention_weight, main.dtype) * without_conflict(gradient, main)
        return merged, logits, vanished, received

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            raise errors.UserError(
                f"the images are {height} x {width} pixels and the patch {self.patch}: set patch to that of the model, in pixels "
                "of the image."
            )
        grid = (height // self.patch, width // self.patch)
        if self.patches > grid[0] * grid[1]:
            raise errors.UserError(f"patches is {self.patches}, and the image has {grid[0] * grid[1]} of them.")
        return grid


def without_conflict(gradient: jax.Array, main: jax.Array) -> jax.Array:
    """Where a gradient points against the main one, what is left of it across (PCGrad: Yu et al. 2020, arXiv 2001.06782).

    Args:
      gradient: `[batch, ...]`.
      main: of the same shape.
    """
    axes = tuple(range(1, main.ndim))
    # Over the largest entry first: squares of small gradients underflow.
    largest = jnp.max(jnp.abs(main), axis=axes, keepdims=True)
    unit = main / jnp.where(largest > 0, largest, 1.0)
    squares = jnp.sum(unit * unit, axis=axes, keepdims=True)
    share = jnp.sum(gradient * unit, axis=axes, keepdims=True) / jnp.where(squares > 0, squares, 1.0)
    return gradient - jnp.minimum(share, 0.0) * unit


def patch_fool(
    *,
    patch: int = 16,
    patches: int = 1,
    select: str = "attention",
    layer: int = 4,
    layers: tuple[int, ...] = (1, 2, 3, 4, 5),
    attention_weight: float = 0.002,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 250,
    learning_rate: float = 0.05,
    decay: float = 0.95,
    decay_every: int = 10,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> PatchFool:
    """Patch-Fool (Fu et al. 2022, arXiv 2203.08392; GATECH-EIC/Patch-Fool main.py), vanilla, or mild with a ball besides.

    Adam on the pixels of the patches that receive most attention, up the loss and, for each of `layers`, up the logarithm of
    the attention that the first of these patches receives, its gradient merged by PCGrad. Their rate of 0.22 is one of
    normalised pixels: 0.05 here. Departures: PCGrad projects (their code divides by the length once and not twice), under the
    mask; the start is uniform in the ball; an example stops at its first success. A CNN: `select="saliency", layers=()`. On an
    `expectation` attention too is averaged over the draws, of the tokens that stand where the patches of the image do.

    Cost: `steps + 1` forward passes and `1 + len(layers)` times as many backward passes at most, and one that judges.

    Args:
      patch: side of a patch in pixels of the image; the model's own.
      patches: how many are attacked.
      select: `attention` received at `layer`, `saliency` (the gradient's absolute sum), or `random`.
      layer: the block, counted from 0, whose attention chooses.
      layers: the blocks whose attention is drawn: the first half without the first, of 12 blocks; () leaves it alone.
      attention_weight: of each attention gradient beside that of the loss.
      epsilon: radius of a ball, in pixel units: Mild Patch-Fool; without it the patch may be anything.
      norm: `linf` or `l2`.
      threat: a threat model or its name, in place of `epsilon` and `norm`.
      steps: of Adam.
      learning_rate: in pixel units.
      decay: factor of the rate every `decay_every` steps.
      decay_every: steps.
      loss: `cross_entropy`, `margin`, or a named function `(logits, labels) -> [batch]`.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
      stop_on_success: as in `pgd`.
    """
    arguments.counts(patch=patch, patches=patches)
    for block in (layer, *layers):
        arguments.counts(least=0, layer=block)
    if select not in SELECTIONS:
        raise errors.unknown("selection of patches", select, SELECTIONS)
    if attention_weight < 0:
        raise errors.UserError(f"attention_weight is {attention_weight}: expected a number from 0.")
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
    return PatchFool(
        **shared,
        attention_weight=arguments.number(attention_weight),
        patch=patch,
        patches=patches,
        select=select,
        layer=layer,
        layers=tuple(layers),
    )


def _attention(
    model: skeleton.Model, images: jax.Array, state: State, blocks: tuple[int, ...]
) -> tuple[jax.Array, dict[int, Float[Array, "*samples batch heads tokens tokens"]]]:
    """Logits, and the attention weights of some blocks; of a stochastic model those of each draw."""
    logits, found = evaluation.respond(expectations.Featured(model), images, state.keys, state.count)
    known = sorted(
        int(name[5:-18]) for name in found if name.startswith("block") and name.endswith("/attention_weights")
    )
    if not known:
        raise errors.UserError(
            "Patch-Fool reads attention weights, and this model names none: give a Vision Transformer of this library, or "
            'select="saliency", layers=().'
        )
    missing = sorted(set(blocks) - set(known))
    if missing:
        raise errors.UserError(
            f"Patch-Fool reads the attention of blocks {sorted(set(blocks))}, and the model has {known[0]} to {known[-1]}: "
            "set layer and layers to some of these (the original: the first half without block 0)."
        )
    return logits, {block: found[f"block{block:02d}/attention_weights"] for block in blocks}


def _received(
    weights: Float[Array, "batch heads tokens tokens"], grid: tuple[int, int], *, logarithm: bool = False
) -> Float[Array, "batch patches"]:
    """The attention that each patch receives, mean over heads and over the tokens that ask; or the mean of its logarithm."""
    count = grid[0] * grid[1]
    others = weights.shape[-1] - count
    if others not in (0, 1, 2):
        raise errors.UserError(
            f"the image has {grid[0]} x {grid[1]} patches, and the model attends over {weights.shape[-1]} tokens: set patch to "
            "that of the model, in pixels of the image."
        )
    # A class token, where there is one, comes first; it asks too, and is not attacked.
    weights = jnp.mean(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)), axis=1)[..., others:]
    return jnp.mean(jnp.log(jnp.maximum(weights, _LEAST)) if logarithm else weights, axis=1)


def _mean(function: Callable, draws: Float[Array, "samples batch ..."]) -> jax.Array:
    return jnp.mean(jax.vmap(function)(draws), axis=0)


def _by_patch(
    values: Float[Array, "batch height width channels"], grid: tuple[int, int]
) -> Float[Array, "batch patches"]:
    batch, height, width, channels = values.shape
    cells = values.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1], channels)
    return jnp.sum(cells, axis=(2, 4, 5)).reshape(batch, -1)
