"""Auto-PGD, the attack: ascent whose step size is halved where the loss stalls (`apgd` makes its kinds)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_vit import errors
from robust_vit.attacks import arguments, evaluation, norms, skeleton

# Croce & Hein 2020, arXiv 2003.01690, section 3: of an iterate the step's share and the momentum's; what share of steps has to
# raise the loss; the first window between two checkpoints, by how much each is shorter, the shortest; in shares of the steps.
STEP_SHARE = 0.75
RISING_SHARE = 0.75
WINDOWS = (0.22, 0.03, 0.06)
# Croce & Hein 2021, arXiv 2103.01208, section 4: in L1 all windows are equal; the share of values that the first steps move; of
# the values that the best image changes, the share that the next steps move, and the decline that counts as progress; the
# divisor of the step size, and of the smallest one.
SPARSE_WINDOW = 0.04
SPARSE_START = 0.2
SPARSE_DIVISOR = 1.5
SPARSE_DECLINE = 0.95
SPARSE_LEAST = 10.0


class Course(NamedTuple):
    """One run of the attack, evaluation by evaluation: what each is, whatever the example.

    Attributes:
      index: the steps before it from its leg's start; a leg of n steps has n + 1 evaluations.
      checkpoint: the step size is looked at.
      window: steps since the last look, where there is one.
      radius: of the leg's ball, in units of epsilon.
      last: of its leg.
    """

    index: np.ndarray
    checkpoint: np.ndarray
    window: np.ndarray
    radius: np.ndarray
    last: np.ndarray


@functools.cache
def course(steps: int, sparse: bool, radii: tuple[tuple[float, float], ...]) -> Course:
    """The table of one run. Its steps are shared among the radii, each rounded up but the last.

    Args:
      steps: of the whole run.
      sparse: whether the windows are those of L1.
      radii: pairs of a radius in units of epsilon and its share of the steps.
    """
    lengths = []
    for _, share in radii[:-1]:
        lengths.append(min(math.ceil(share * steps), steps - sum(lengths)))
    lengths.append(steps - sum(lengths))
    rows = []
    for length, (radius, _) in zip(lengths, radii, strict=True):
        if sparse:
            window, shorter, shortest = max(int(SPARSE_WINDOW * length), 1), 0, 1
        else:
            window, shorter, shortest = (max(int(share * length), 1) for share in WINDOWS)
        since = 0
        for index in range(length + 1):
            looks = since == window
            rows.append((index, looks, window, radius, index == length))
            if looks:
                since, window = 0, max(window - shorter, shortest)
            since += 1
    return Course(*(np.asarray(column) for column in zip(*rows, strict=True)))


class AutoState(skeleton.State, kw_only=True):
    """Where a run of Auto-PGD stands.

    Attributes:
      best_value: the objective at `best`, which here is the image of the largest one, a success before any other.
      targets: the classes gone for, one a run; those with the largest logits of the clean image.
      previous: the iterate that the last step left.
      peak: the image with the run's largest objective, `peak_value`; `peak_gradient` is the gradient there.
      value: the objective at the last image.
      rises: steps since the last checkpoint that raised it.
      checked_value: `peak_value` at the last checkpoint.
      shortened: the step size was made smaller there.
      size: of a step, in units of the radius.
      moved: in L1, the share of values that a step moves.
      changed: in L1, the values that the peak changed at the last checkpoint.
    """

    best_value: Float[Array, " batch"]
    targets: Int[Array, "batch targets"]
    previous: Float[Array, "batch height width channels"]
    peak: Float[Array, "batch height width channels"]
    peak_gradient: Float[Array, "batch height width channels"]
    peak_value: Float[Array, " batch"]
    value: Float[Array, " batch"]
    rises: Int[Array, " batch"]
    checked_value: Float[Array, " batch"]
    shortened: Bool[Array, " batch"]
    size: Float[Array, " batch"]
    moved: Float[Array, " batch"]
    changed: Float[Array, " batch"]


class AutoPGD(skeleton.Attack, kw_only=True):
    """Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, algorithm 1; in L1 2021, arXiv 2103.01208).

    It evaluates the clean image, then in each run the random start and the image after each step; so nothing returned was
    not evaluated.

    Attributes:
      epsilon: radius of the ball, in pixel units [0, 1].
      towards: `(logits, labels, targets) -> [batch]`, what a run for a target climbs; None climbs `loss`.
      targets: runs go for so many classes in turn, in the order of the clean image's logits; 0 without `towards`.
      steps: gradient steps of a run.
      restarts: runs, or for each target so many.
      radii: pairs of a radius in units of epsilon and its share of the steps: balls that a run goes through, the last being
        epsilon's.
      stop_on_success: leave an example alone as soon as it is misclassified, or the target reached, which the clean image may
        do by itself. Without it, and on a model that draws, every example takes all steps, and the result is the success with
        the largest objective.
    """

    epsilon: Any
    towards: Callable | None = flax.struct.field(pytree_node=False, default=None)
    targets: int = flax.struct.field(pytree_node=False, default=0)
    steps: int = flax.struct.field(pytree_node=False, default=100)
    restarts: int = flax.struct.field(pytree_node=False, default=1)
    radii: tuple[tuple[float, float], ...] = flax.struct.field(pytree_node=False, default=((1.0, 1.0),))
    stop_on_success: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def course(self) -> Course:
        """The table of one run."""
        return course(self.steps, self.is_sparse, self.radii)

    @property
    def is_sparse(self) -> bool:
        """Whether steps and step sizes are those of L1."""
        return self.norm is norms.L1

    @property
    def evaluations(self) -> int:
        """Of the clean image, and of every run's starts and steps."""
        return 1 + max(self.targets, 1) * self.restarts * len(self.course.index)

    def sweep(self, epsilons: Float[Array, " sweep"]) -> AutoPGD:
        """This attack at each radius: `jax.vmap(lambda a: a(model, keys, images, labels))(attack.sweep(epsilons))`."""
        epsilon = arguments.ball(epsilons, self.norm, None)[0]
        return self.replace(epsilon=jnp.asarray(epsilon, jnp.result_type(float)))

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> AutoState:
        """The state before any evaluation. No passes."""
        fields = skeleton.blank(keys, images, labels)
        images, lowest = fields["images"], jnp.full(len(labels), -jnp.inf, fields["images"].dtype)
        return AutoState(
            **fields,
            best_value=lowest,
            targets=jnp.zeros((len(labels), self.targets), jnp.int32),
            previous=images,
            peak=images,
            peak_gradient=jnp.zeros_like(images),
            peak_value=lowest,
            value=lowest,
            rises=fields["count"],
            checked_value=lowest,
            shortened=fields["done"],
            size=jnp.ones_like(lowest),
            moved=jnp.ones_like(lowest),
            changed=jnp.ones_like(lowest),
        )

    def step(self, model: skeleton.Model, state: AutoState) -> AutoState:
        """Evaluates the current images, looks at the step size, and moves them. One forward and backward pass."""
        # The clean image comes as the end of a run before the first.
        run, place = jnp.divmod(state.count - 1, len(self.course.index))
        at, following = self._row(place, state), self._row((place + 1) % len(self.course.index), state)
        found = evaluation.ascent(
            self._objective, model, state.images, state.keys, state.labels, state.targets, run, draw=state.count
        )
        # What is not a number is no progress, and what the clean image's objective is without a target nobody asks.
        values = jnp.where(jnp.isnan(found.values) | (run < 0), -jnp.inf, found.values).astype(state.value.dtype)
        state = self._record(state, found, values, (run < 0) | (at.radius <= 1))
        if self.targets:
            rivals = _rivals(found.logits, state.labels, self.targets)
            state = state.replace(targets=skeleton.select(run < 0, rivals, state.targets))
        state = self._follow(state, found.gradients, values, at)
        returns, state = self._check(state, at)
        current = skeleton.select(returns, state.peak, state.images)
        gradients = skeleton.select(returns, state.peak_gradient, found.gradients)
        moved = self._move(state, current, gradients, at)
        moved = jax.lax.cond(
            jnp.any(at.last),
            lambda: skeleton.select(at.last, self._begin(state, run + 1, following), moved),
            lambda: moved,
        )
        return state.replace(images=moved, previous=current, value=values)

    def answer(self, model: skeleton.Model, state: AutoState) -> jax.Array:
        """The image with the largest objective, of those that reach the goal if any does."""
        del model
        return state.best

    def _row(self, place: jax.Array, state: AutoState) -> Course:
        row = jax.tree.map(lambda column: jnp.asarray(column)[place], self.course)
        return row._replace(radius=row.radius.astype(state.images.dtype))

    def _objective(self, logits: jax.Array, labels: jax.Array, targets: jax.Array, run: jax.Array) -> jax.Array:
        if self.towards is None:
            return self.goal.direction * self.loss(logits, labels)
        target = jnp.take_along_axis(targets, (run // self.restarts)[:, None], axis=-1)[:, 0]
        return self.towards(logits, labels, target)

    def _record(
        self, state: AutoState, found: evaluation.Ascent, values: jax.Array, inside: Bool[Array, " batch"]
    ) -> AutoState:
        """What the attack returns, and whether it is done; images of larger balls do not count."""
        achieved = inside & self.achieves(found.logits, state.labels)
        larger = (achieved == state.success) & (values > state.best_value)
        chosen = (achieved & ~state.success) | (inside & larger)
        return state.replace(
            done=state.done | achieved if self.stop_on_success else state.done,
            success=state.success | achieved,
            best=skeleton.select(chosen, state.images, state.best),
            best_value=jnp.where(chosen, values, state.best_value),
            vanished=state.vanished + found.vanished,
        )

    def _follow(self, state: AutoState, gradients: jax.Array, values: jax.Array, at: Course) -> AutoState:
        """The leg's peak and its count of rises; at its start they begin anew."""
        first = at.index == 0
        higher = first | (values > state.peak_value)
        # The original compares the first step's loss with 0, where the start's belongs: with cross-entropy it always rises.
        risen = values > jnp.where(at.index == 1, 0.0, state.value)
        changed, share = self._changed(state.images, state.clean)
        if len(self.radii) == 1:
            changed, share = jnp.full_like(changed, state.clean[0].size), jnp.full_like(share, SPARSE_START)
        return state.replace(
            peak=skeleton.select(higher, state.images, state.peak),
            peak_gradient=skeleton.select(higher, gradients, state.peak_gradient),
            peak_value=jnp.where(higher, values, state.peak_value),
            rises=jnp.where(first, 0, state.rises + risen),
            checked_value=jnp.where(first, values, state.checked_value),
            shortened=first | state.shortened,
            size=jnp.where(first, 1.0 if self.is_sparse else 2.0, state.size),
            moved=jnp.where(first, share, state.moved),
            changed=jnp.where(first, changed, state.changed),
        )

    def _check(self, state: AutoState, at: Course) -> tuple[Bool[Array, " batch"], AutoState]:
        """At a checkpoint, the new size of a step; and who goes back to the peak."""
        if self.is_sparse:
            changed, share = self._changed(state.peak, state.clean)
            returns = changed / jnp.maximum(state.changed, 1.0) < SPARSE_DECLINE
            shorter = jnp.maximum(state.size / SPARSE_DIVISOR, 1.0 / SPARSE_LEAST)
            new = {"size": jnp.where(returns, 1.0, shorter), "moved": share, "changed": changed}
        else:
            stalled = ~state.shortened & (state.checked_value >= state.peak_value)
            returns = (state.rises <= RISING_SHARE * at.window) | stalled
            new = {
                "size": jnp.where(returns, 0.5 * state.size, state.size),
                "rises": jnp.zeros_like(state.rises),
                "checked_value": state.peak_value,
                "shortened": returns,
            }
        new = {name: jnp.where(at.checkpoint, value, getattr(state, name)) for name, value in new.items()}
        return at.checkpoint & returns, state.replace(**new)

    def _changed(self, images: jax.Array, clean: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How many values differ from the clean ones, and in L1 the share that the next steps move."""
        changed = jnp.sum(images != clean, axis=(1, 2, 3)).astype(images.dtype)
        return changed, changed / images[0].size / SPARSE_DIVISOR

    def _move(self, state: AutoState, current: jax.Array, gradients: jax.Array, at: Course) -> jax.Array:
        radius = self._radius(at, current)
        length = (state.size * radius)[:, None, None, None]
        if self.is_sparse:
            signs = jnp.where(norms.largest(gradients, state.moved), jnp.sign(gradients), 0.0)
            return self.norm.project(current + length * norms.normalize(norms.L1, signs), state.clean, radius)
        stepped = self.norm.project(current + length * self.norm.ascend(gradients), state.clean, radius)
        share = jnp.where(at.index == 0, 1.0, STEP_SHARE).astype(current.dtype)[:, None, None, None]
        mixed = current + share * (stepped - current) + (1.0 - share) * (current - state.previous)
        return self.norm.project(mixed, state.clean, radius)

    def _begin(self, state: AutoState, run: jax.Array, following: Course) -> jax.Array:
        """The start of the leg that follows: the peak of the one before it, or of a run's first leg a random image."""
        radius = self._radius(following, state.clean)
        keys = jax.vmap(jax.random.fold_in)(state.keys, run)
        if self.is_sparse:
            noise = jax.vmap(lambda key: jax.random.normal(key, state.clean.shape[1:], state.clean.dtype))(keys)
        else:
            noise = norms.normalize(self.norm, self.norm.draw(keys, state.clean, jnp.ones_like(radius)))
            noise = radius[:, None, None, None] * noise
        fresh = following.radius == self.radii[0][0]
        return self.norm.project(skeleton.select(fresh, state.clean + noise, state.peak), state.clean, radius)

    def _radius(self, at: Course, like: jax.Array) -> Float[Array, " batch"]:
        return jnp.asarray(self.epsilon, like.dtype) * at.radius


def _rivals(logits: jax.Array, labels: jax.Array, count: int) -> Int[Array, "batch count"]:
    """The classes with the largest logits, but for the true one."""
    classes = logits.shape[-1]
    if count >= classes:
        raise errors.UserError(
            f"the attack goes for {count} target classes, and the model has {classes - 1} beside the true one: set "
            f"targets={classes - 1}."
        )
    is_true = jax.nn.one_hot(labels, classes, dtype=bool)
    return jax.lax.top_k(jnp.where(is_true, -jnp.inf, logits), count)[1].astype(jnp.int32)
