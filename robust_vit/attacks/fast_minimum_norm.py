"""Minimal attacks that grow and shrink a ball around the clean image: DDN and FMN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import losses
from robust_vit.attacks import arguments, evaluation, minimal, norms, skeleton, threats

# What the step sizes, and of FMN the changes of the radius, have fallen to at the end.
_LAST_STEP = 0.01
_LAST_CHANGE = 0.001

LOSSES = {**skeleton.LOSSES, "both": losses.margin}


class State(minimal.State, kw_only=True):
    """Where each example's search stands.

    Attributes:
      radius: of the ball that `images` were put into.
    """

    radius: Float[Array, " batch"]


class DecoupledDirection(minimal.MinimalAttack, kw_only=True):
    """The decoupled direction and norm attack. `robust_vit.attacks.build("ddn", ...)` makes one.

    Attributes:
      start_radius: of the first ball, in pixel units.
      radius_change: the radius grows or shrinks by this share in each step.
      levels: values that a pixel may take, as 256 in an 8-bit image; None for any.
      steps: gradient steps.
    """

    start_radius: Any
    radius_change: Any
    levels: int | None = flax.struct.field(pytree_node=False, default=None)
    steps: int = flax.struct.field(pytree_node=False, default=100)

    @property
    def evaluations(self) -> int:
        """Steps of one example at most."""
        return self.steps

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The clean image. No passes."""
        start = minimal.blank(keys, images, labels)
        return State(**start, radius=jnp.full_like(start["nearest"], self.start_radius))

    def step(self, model: skeleton.Model, state: State) -> State:
        """Evaluates the images; a success makes the ball smaller, a failure larger. One forward and backward pass."""
        found = evaluation.ascent(self.loss, model, state.images, state.keys, state.labels, draw=state.count)
        achieved = self.achieves(found.logits, state.labels)
        change = jnp.where(achieved, -1.0, 1.0).astype(state.radius.dtype) * self.radius_change
        radius = jnp.minimum(state.radius * (1.0 + change), _farthest(self.norm, state.clean))
        directions = skeleton.select(
            found.vanished, _random_directions(state), self.goal.direction * self.norm.ascend(found.gradients)
        )
        moved = state.images + _wide(_fall(state.count, self.steps, 1.0, _LAST_STEP, radius.dtype)) * directions
        moved = jnp.clip(state.clean + _wide(radius) * self.norm.ascend(moved - state.clean), 0.0, 1.0)
        if self.levels is not None:
            moved = jnp.round(moved * (self.levels - 1)) / (self.levels - 1)
        recorded = self.record(state, state.images, achieved)
        return recorded.replace(images=moved, radius=radius, vanished=state.vanished + found.vanished)


class FastMinimumNorm(minimal.MinimalAttack, kw_only=True):
    """The fast minimum-norm attack. `robust_vit.attacks.build("fmn", ...)` makes one.

    Attributes:
      step_size: L2 length of the first step, in pixel units; the last ones have a hundredth of it.
      radius_change: share by which the radius first grows or shrinks; 0.001 in the end.
      explore: `(logits, labels) -> [batch]`, climbed in place of `loss` in the first half of each run; None for nothing.
      steps: gradient steps of each run.
      restarts: runs; all but the first from a random start in the ball of the nearest success.
    """

    step_size: Any
    radius_change: Any
    explore: Callable | None = flax.struct.field(pytree_node=False, default=None)
    steps: int = flax.struct.field(pytree_node=False, default=100)
    restarts: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def evaluations(self) -> int:
        """Steps of one example at most."""
        return self.restarts * self.steps

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The clean image. No passes."""
        start = minimal.blank(keys, images, labels)
        return State(**start, radius=jnp.copy(start["nearest"]))

    def step(self, model: skeleton.Model, state: State) -> State:
        """Evaluates the images, sizes the ball and moves in it. One forward and backward pass."""
        count = state.count % self.steps
        found = evaluation.ascent(
            self._objective, model, state.images, state.keys, state.labels, count, draw=state.count
        )
        achieved = self.achieves(found.logits, state.labels)
        recorded = self.record(state, state.images, achieved)
        dtype = state.radius.dtype
        change = _fall(count, self.steps, self.radius_change, _LAST_CHANGE, dtype)
        # Before the first success the ball ends past the boundary of an affine model: on it, rounding would decide.
        ahead = jnp.abs(found.values).astype(dtype) / jnp.maximum(minimal.slope(self.norm, found.gradients), 1e-12)
        estimate = self.norm.measure(state.images - state.clean) + ahead
        failed = jnp.where(state.success, state.radius * (1.0 + change), estimate * (1.0 + _LAST_CHANGE))
        radius = jnp.where(achieved, jnp.minimum(state.radius * (1.0 - change), recorded.nearest), failed)
        radius = jnp.minimum(radius, _farthest(self.norm, state.clean))
        length = _fall(count, self.steps, self.step_size, _LAST_STEP * self.step_size, dtype)
        moved = state.images + _wide(self.goal.direction * length) * norms.L2.ascend(found.gradients)
        if self.restarts > 1:
            ends = count == self.steps - 1
            radius = jnp.where(ends & recorded.success, recorded.nearest, radius)
            keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
            moved = skeleton.select(ends, state.clean + self.norm.draw(keys, state.clean, radius), moved)
        moved = self.norm.project(moved, state.clean, radius)
        return recorded.replace(images=moved, radius=radius, vanished=state.vanished + found.vanished)

    def _objective(self, logits: jax.Array, labels: jax.Array, count: jax.Array) -> jax.Array:
        values = self.loss(logits, labels)
        if self.explore is None:
            return values
        return jnp.where(count < self.steps // 2, self.explore(logits, labels), values)


def ddn(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 100,
    start_radius: float = 1.0,
    radius_change: float = 0.05,
    levels: int | None = None,
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """The decoupled direction and norm attack, L2 (Rony et al. 2019, arXiv 1811.09600, algorithm 1).

    A departure: where the gradient vanishes, the random direction taken has length one, as all others have.
    Cost: `steps` forward and backward passes at most, and one forward pass that judges.

    Args:
      epsilon: end an example at the first success at most this far away, in pixel units; None seeks on.
      norm: `l2`.
      threat: a threat model or its name (`cifar10/l2-0.5`), in place of `epsilon` and `norm`.
      steps: gradient steps.
      start_radius: of the first ball, in pixel units.
      radius_change: share by which the radius grows or shrinks in each step, in (0, 1).
      levels: values that a pixel may take: 256 returns images that survive 8 bits. None for any.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
    """
    epsilon, norm = minimal.ball("ddn", epsilon, norm, threat, ("l2",))
    arguments.counts(steps=steps)
    if levels is not None:
        arguments.counts(least=2, levels=levels)
    arguments.positive(start_radius=start_radius)
    arguments.shares(radius_change=radius_change)
    return DecoupledDirection(
        epsilon=epsilon,
        norm=norm,
        loss=losses.cross_entropy,
        goal=arguments.find("goal", goal, skeleton.GOALS),
        start_radius=arguments.number(start_radius),
        radius_change=arguments.number(radius_change),
        levels=levels,
        steps=steps,
    )


def fmn(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 100,
    restarts: int = 1,
    step_size: float = 1.0,
    radius_change: float = 0.05,
    loss: str | Callable = "both",
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """The fast minimum-norm attack, L-infinity, L2 or L1 (Pintor et al. 2021, arXiv 2102.12827, algorithm 1).

    Departures: the first half of a run climbs the cross-entropy, which looks at all classes; the margin, as published
    (`loss="margin"`), goes for the likeliest where it stands and passes by nearer ones (tests/benchmarks/results/attacks.md). The
    projection is the nearest point of ball and box at once, not of one after the other, and before the first success the radius
    is a thousandth above the estimate, which for an affine model is on the boundary.
    Cost: `restarts * steps` forward and backward passes at most, and one forward pass that judges.

    Args:
      epsilon: end an example at the first success at most this far away, in pixel units; None seeks on.
      norm: `linf`, `l2` or `l1`.
      threat: a threat model or its name (`cifar10/linf-8`), in place of `epsilon` and `norm`.
      steps: gradient steps of each run.
      restarts: runs; all but the first start in a random point of the ball that the nearest success lies on.
      step_size: L2 length of the first step, in pixel units.
      radius_change: share by which the radius grows or shrinks in the first step, in (0, 1).
      loss: `both`, the cross-entropy in the first half of each run and the margin in the second; `margin`; `cross_entropy`, which
        vanishes where the softmax saturates; `dlr`; or a named function `(logits, labels) -> [batch]`.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
    """
    epsilon, norm = minimal.ball("fmn", epsilon, norm, threat, ("linf", "l2", "l1"))
    arguments.counts(steps=steps, restarts=restarts)
    arguments.positive(step_size=step_size)
    arguments.shares(radius_change=radius_change)
    return FastMinimumNorm(
        epsilon=epsilon,
        norm=norm,
        loss=arguments.find("loss", loss, LOSSES),
        explore=losses.cross_entropy if loss == "both" else None,
        goal=arguments.find("goal", goal, skeleton.GOALS),
        step_size=arguments.number(step_size),
        radius_change=arguments.number(radius_change),
        steps=steps,
        restarts=restarts,
    )


def _fall(count: jax.Array, steps: int, first: Any, last: Any, dtype: Any) -> Float[Array, " batch"]:
    """From `first` to `last` along half a cosine, each example at its own step."""
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * count.astype(dtype) / steps))
    return jnp.asarray(last, dtype) + (jnp.asarray(first, dtype) - jnp.asarray(last, dtype)) * cosine


def _farthest(norm: norms.Norm, clean: jax.Array) -> Float[Array, " batch"]:
    return norm.measure(jnp.maximum(clean, 1.0 - clean))


def _random_directions(state: State) -> jax.Array:
    shape, dtype = state.clean.shape[1:], state.clean.dtype
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    return norms.L2.ascend(jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys))


def _wide(values: Float[Array, " batch"]) -> Float[Array, "batch 1 1 1"]:
    return values[:, None, None, None]
