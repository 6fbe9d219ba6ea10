"""The Square attack: random search with square-shaped changes, from logits alone, in the maximum norm and in L2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_vit import errors
from robust_vit.attacks import arguments, evaluation, norms, skeleton, threats

# Queries of ten thousand after which the share of pixels that a square covers halves (section 5.1 of the paper).
_HALVINGS = np.asarray([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])


class State(skeleton.State, kw_only=True):
    """Where the search of each example stands.

    Attributes:
      current: the image that the present restart changes.
      value: of the loss at `current`, in the direction of the goal.
      closest: of the loss at `images`, the highest met so far; among successes, once there is one.
    """

    current: Float[Array, "batch height width channels"]
    value: Float[Array, " batch"]
    closest: Float[Array, " batch"]


class Windows(NamedTuple):
    """One square an example: rows and columns counted from its upper left corner, and its side.

    Attributes:
      rows: `[batch, height]`; negative above the square.
      columns: `[batch, width]`; negative left of it.
      side: in pixels.
    """

    rows: Int[Array, "batch height"]
    columns: Int[Array, "batch width"]
    side: Int[Array, " batch"]

    @property
    def mask(self) -> Bool[Array, "batch height width 1"]:
        """Which pixels are in the square."""
        rows, columns = ((index >= 0) & (index < self.side[:, None]) for index in (self.rows, self.columns))
        return rows[:, :, None, None] & columns[:, None, :, None]


class Square(skeleton.Attack, kw_only=True):
    """Random search over squares. `robust_vit.attacks.build("square", ...)` makes one.

    Attributes:
      epsilon: radius of the ball, in pixel units [0, 1].
      share: of the pixels that the first squares cover.
      queries: proposals after each start.
      restarts: starts, at least one.
      rescale: the schedule of ten thousand queries is played over `queries`, rather than cut off there.
      stop_on_success: leave an example alone as soon as it reaches the goal. On a model that draws every example takes all
        queries, and the success with the largest loss is returned.
    """

    epsilon: Any
    share: Any
    queries: int = flax.struct.field(pytree_node=False, default=5000)
    restarts: int = flax.struct.field(pytree_node=False, default=1)
    rescale: bool = flax.struct.field(pytree_node=False, default=True)
    stop_on_success: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def evaluations(self) -> int:
        """The clean image, then of each restart the start and its proposals."""
        return 1 + self.restarts * (self.queries + 1)

    @property
    def step_passes(self) -> tuple[int, int]:
        """One query."""
        return 1, 0

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """At the clean image. No passes."""
        fields = skeleton.blank(keys, images, labels)
        worst = jnp.full(fields["labels"].shape, -jnp.inf, jnp.promote_types(fields["clean"].dtype, jnp.float32))
        return State(**fields, current=fields["clean"], value=worst, closest=worst)

    def step(self, model: skeleton.Model, state: State) -> State:
        """Asks about the clean image, a start or a proposal, and keeps what raises the loss. One forward pass."""
        is_clean = state.count == 0
        query = (state.count - 1) % (self.queries + 1)  # 0 is a start.
        is_start = ~is_clean & (query == 0)
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
        start, propose = _MOVES[self.norm.name]
        epsilon = jnp.asarray(self.epsilon, state.clean.dtype)
        asked = propose(keys, state, self._share(query - 1), epsilon)
        fresh = jax.lax.cond(jnp.any(is_start), lambda: start(keys, state.clean, epsilon), lambda: asked)
        asked = skeleton.select(is_start, fresh, asked)
        asked = skeleton.select(is_clean, state.clean, asked)

        logits = evaluation.logits(model, asked, state.keys, state.count)
        achieved = self.achieves(logits, state.labels)
        value = (self.goal.direction * self.loss(logits, state.labels)).astype(state.value.dtype)
        first = achieved & ~state.success
        kept = is_clean | is_start | first | (value > state.value)
        nearer = first | ((achieved == state.success) & (value > state.closest))
        return state.replace(
            current=skeleton.select(kept, asked, state.current),
            value=jnp.where(kept, value, state.value),
            images=skeleton.select(nearer, asked, state.images),
            closest=jnp.where(nearer, value, state.closest),
            done=state.done | achieved if self.stop_on_success else state.done,
            success=state.success | achieved,
            best=skeleton.select(nearer & achieved, asked, state.best),
        )

    def _share(self, proposal: jax.Array) -> Float[Array, " batch"]:
        """Of the pixels, what the squares cover at a proposal."""
        of_ten_thousand = jnp.floor(proposal * (10_000 / self.queries)) if self.rescale else proposal
        halvings = jnp.sum(of_ten_thousand[:, None] > _HALVINGS[None], axis=1)
        return self.share * 0.5**halvings


def _stripes(keys: jax.Array, clean: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Vertical stripes one pixel wide, each channel up or down by epsilon."""
    _, _, width, channels = clean.shape
    signs = jax.vmap(lambda key: jax.random.rademacher(key, (1, width, channels), clean.dtype))(keys)
    return norms.LINF.project(clean + epsilon * signs, clean, epsilon)


def _recolour(keys: jax.Array, state: State, share: jax.Array, epsilon: jax.Array) -> jax.Array:
    """The current image with one square, each channel of which is up or down by epsilon."""
    height, width, channels = state.clean.shape[1:]
    side = jnp.round(jnp.sqrt(share * (height * width))).astype(jnp.int32)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2 + channels,)))(keys)
    windows = _place(uniforms[:, :2], jnp.clip(side, 1, min(height, width)), (height, width))
    change = epsilon * _signs(uniforms[:, 2:], state.clean.dtype)[:, None, None, :]
    return jnp.where(windows.mask, norms.LINF.project(state.clean + change, state.clean, epsilon), state.current)


def _tiles(keys: jax.Array, clean: jax.Array, epsilon: jax.Array) -> jax.Array:
    """A grid of 5 x 5 bumps, each of one sign below and the other above, of length epsilon together."""
    height, width, channels = clean.shape[1:]
    side = max(min(height, width) // 5, 1)
    tile_rows, rows = _cut(height, side)
    tile_columns, columns = _cut(width, side)
    tiles = Windows(jnp.asarray(rows)[None], jnp.asarray(columns)[None], jnp.full(1, side))
    shape = (height // side, width // side, 1 + channels)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)[:, tile_rows][:, :, tile_columns]
    profile = jnp.where(uniforms[..., :1] < 0.5, _lying_bump(tiles), _bump(tiles))
    change = profile * _signs(uniforms[..., 1:], clean.dtype)
    return jnp.clip(clean + epsilon * norms.L2.ascend(change.astype(clean.dtype)), 0.0, 1.0)


def _cut(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The tile that each pixel of an axis lies in, and its place there: -1 at the border, where no whole tile fits."""
    place = np.arange(size) - size % side // 2
    inside = (place >= 0) & (place < size - size % side)
    return np.where(inside, place // side, 0), np.where(inside, place % side, -1)


def _shift_mass(keys: jax.Array, state: State, share: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Takes the change out of one square and puts it, and what of epsilon is unused, into another one as a new bump."""
    height, width, channels = state.clean.shape[1:]
    side = jnp.maximum(jnp.round(jnp.sqrt(share * (height * width))).astype(jnp.int32), 3)
    side = jnp.minimum(side + (side + 1) % 2, min(height, width))
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (5 + channels,)))(keys)
    given, taken = (_place(uniforms[:, i : i + 2], side, (height, width)) for i in (0, 2))
    delta = state.current - state.clean
    inside, emptied = given.mask, taken.mask

    def length(values: jax.Array) -> Float[Array, "batch 1 1 channels"]:
        return jnp.sqrt(jnp.sum(values * values, axis=(1, 2), keepdims=True))

    moved = length(jnp.where(inside | emptied, delta, 0.0))
    unused = jnp.maximum(epsilon**2 - norms.L2.measure(delta) ** 2, 0.0)[:, None, None, None]
    lying = (uniforms[:, 4] < 0.5)[:, None, None, None]
    bump = jnp.where(lying, _lying_bump(given), _bump(given)) * _signs(uniforms[:, 5:], delta.dtype)[:, None, None, :]
    old = jnp.where(inside, delta, 0.0)
    bump = bump + old / jnp.maximum(length(old), 1e-12)
    bump = bump * (jnp.sqrt(unused / channels + moved**2) / jnp.maximum(length(bump), 1e-12))
    delta = jnp.where(inside, bump, jnp.where(emptied, 0.0, delta)).astype(delta.dtype)
    return jnp.clip(state.clean + epsilon * norms.L2.ascend(delta), 0.0, 1.0)


# A start and a proposal, by norm.
_MOVES = {"linf": (_stripes, _recolour), "l2": (_tiles, _shift_mass)}


def _place(uniforms: Float[Array, "batch 2"], side: jax.Array, shape: tuple[int, int]) -> Windows:
    """Squares of a side, uniformly anywhere within the image."""
    corners = jnp.floor(uniforms * (jnp.asarray(shape)[None] - side[:, None] + 1)).astype(jnp.int32)
    rows, columns = (jnp.arange(size)[None] - corners[:, axis, None] for axis, size in enumerate(shape))
    return Windows(rows, columns, side)


def _signs(uniforms: jax.Array, dtype: Any) -> jax.Array:
    return jnp.where(uniforms < 0.5, -1.0, 1.0).astype(dtype)


def _bump(windows: Windows) -> Float[Array, "batch height width 1"]:
    """The profile of a change in L2: a pyramid in the square's upper half, a negative one in its lower half.

    At `d` pixels (the larger of both axes) from the centre of its half, a pyramid is the sum of 1 / k^2 for k above d, up to half
    the side (section 3.3 of the paper); each half has length 1.
    """
    rows, columns, side = windows
    half = (side // 2)[:, None]
    is_lower = rows >= half
    height = jnp.where(is_lower, side[:, None] - half, half)
    from_centre = jnp.abs(rows - jnp.where(is_lower, half, 0) - height // 2), jnp.abs(columns - half)
    size = max(rows.shape[1], columns.shape[1])
    sums = jnp.asarray(np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, size + 2) ** 2)]), jnp.float32)
    # The sums fall with the distance: that of the larger distance is the lesser of two sums.
    down, across = (sums[half + 1] - sums[jnp.minimum(distance, size)] for distance in from_centre)
    pyramid = jnp.where(windows.mask[..., 0], jnp.minimum(down[:, :, None], across[:, None, :]), 0.0)
    upper, lower = (jnp.where(part[:, :, None], pyramid, 0.0) for part in (~is_lower, is_lower))
    return (_unit(upper) - _unit(lower))[..., None]


def _unit(values: Float[Array, "batch height width"]) -> Float[Array, "batch height width"]:
    return values / jnp.maximum(jnp.sqrt(jnp.sum(values * values, axis=(1, 2), keepdims=True)), 1e-12)


def _lying_bump(windows: Windows) -> Float[Array, "batch height width 1"]:
    """The same with a left and a right half."""
    return _bump(Windows(windows.columns, windows.rows, windows.side)).swapaxes(1, 2)


def square(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    queries: int = 5000,
    share: float = 0.8,
    restarts: int = 1,
    rescale: bool = True,
    loss: str | Callable = "margin",
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """The Square attack (Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3; AutoAttack's `square.py`).

    It asks for logits only, so masked gradients do not stop it. It leaves an example alone as soon as it reaches the goal, unless
    the model draws. Beside AutoAttack it draws a square for each example rather than one for the batch, anywhere in the image as
    the paper has it (AutoAttack never reaches the last row and column), looks at the clean image first, and returns the image of
    the highest loss where it has no success.

    Cost: `1 + restarts * (queries + 1)` forward passes at most, one that judges, and no backward pass.

    Args:
      epsilon: radius, in pixel units [0, 1].
      norm: `linf` or `l2`; the maximum norm where neither it nor `threat` is given.
      threat: a threat model or its name (`cifar10/linf-8`), in place of `epsilon` and `norm`.
      queries: proposals after each start.
      share: of the pixels that the first squares cover, in (0, 1].
      restarts: random starts.
      rescale: play the schedule of the squares' sizes, which is given for ten thousand queries, over `queries`, as the paper
        does; AutoAttack with its 5,000 cuts it off.
      loss: `margin`, `cross_entropy`, or a named function `(logits, labels) -> [batch]`.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
    """
    epsilon, norm = arguments.ball(epsilon, norm, threat)
    if norm.name not in _MOVES:
        raise errors.UserError(f"the Square attack is defined for {' and '.join(_MOVES)}, not for {norm.name}.")
    arguments.counts(queries=queries, restarts=restarts)
    arguments.positive(share=share)
    if np.any(np.asarray(share) > 1):
        raise errors.UserError(f"share is {share}: expected a share of the image's pixels, above 0 and at most 1.")
    return Square(
        epsilon=epsilon,
        share=arguments.number(share),
        norm=norm,
        loss=arguments.find("loss", loss, skeleton.LOSSES),
        goal=arguments.find("goal", goal, skeleton.GOALS),
        queries=queries,
        restarts=restarts,
        rescale=bool(rescale),
    )
