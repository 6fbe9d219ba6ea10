"""HopSkipJump: the nearest misclassified image, found from decisions alone, neither gradients nor logits."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from robust_vit import errors
from robust_vit.attacks import arguments, evaluation, norms, skeleton

# What a step asks about: images to start from, the line to the clean image, directions around the boundary, lengths of a step.
_START, _LINE, _AROUND, _STEP = range(4)


class Schedule(NamedTuple):
    """What each step of an example does; arrays over steps.

    Attributes:
      kind: one of the four phases.
      round: from 1; 0 before the first.
      probes: directions that the round's estimate is made of.
      last: the phase ends with this step.
    """

    kind: np.ndarray
    round: np.ndarray
    probes: np.ndarray
    last: np.ndarray


@functools.lru_cache(maxsize=64)
def _schedule(starts: int, rounds: int, probes: int, narrowings: int, together: int) -> Schedule:
    phases = [(_START, 0, 0, starts), (_LINE, 0, 0, narrowings)]
    for index in range(1, rounds + 1):
        steps = math.ceil(probes * math.sqrt(index) / together)
        phases += [(_AROUND, index, 0, steps), (_STEP, index, steps * together, 1), (_LINE, index, 0, narrowings)]
    rows = [(*phase[:3], step == phase[3] - 1) for phase in phases for step in range(phase[3])]
    kind, index, count, last = zip(*rows, strict=True)
    return Schedule(np.asarray(kind), np.asarray(index), np.asarray(count), np.asarray(last))


class State(skeleton.State, kw_only=True):
    """Where each example stands.

    Attributes:
      point: an image that reaches the goal; after a line search at the boundary.
      low: on the line from the clean image (0) to `point` (1), the farthest known not to reach the goal before `high`.
      high: the nearest known to reach it.
      agreed: sum of the round's directions, each with the sign of its answer.
      asked: sum of the round's directions.
      votes: sum of the signs.
      nearest: distance of `best`; infinite where there is none.
    """

    point: Float[Array, "batch height width channels"]
    low: Float[Array, " batch"]
    high: Float[Array, " batch"]
    agreed: Float[Array, "batch height width channels"]
    asked: Float[Array, "batch height width channels"]
    votes: Float[Array, " batch"]
    nearest: Float[Array, " batch"]


class HopSkipJump(skeleton.Attack, kw_only=True):
    """Descent along the boundary. `robust_vit.attacks.build("hop_skip_jump", ...)` makes one.

    Attributes:
      radius: how far from the boundary directions are tried, in units of the distance to the clean image.
      references: an image of each class to start from, `[classes, height, width, channels]`, or None.
      starts: steps that look for a start.
      rounds: estimate, step and line search.
      probes: directions of the first round; the n-th takes sqrt(n) times as many.
      narrowings: steps of a line search; each leaves one part in `together + 1`.
      together: queries of one step.
    """

    radius: Any
    references: Any = None
    starts: int = flax.struct.field(pytree_node=False, default=5)
    rounds: int = flax.struct.field(pytree_node=False, default=40)
    probes: int = flax.struct.field(pytree_node=False, default=100)
    narrowings: int = flax.struct.field(pytree_node=False, default=4)
    together: int = flax.struct.field(pytree_node=False, default=10)

    minimal: ClassVar[bool] = True

    @property
    def schedule(self) -> Schedule:
        """The phase of each step."""
        return _schedule(self.starts, self.rounds, self.probes, self.narrowings, self.together)

    @property
    def evaluations(self) -> int:
        """Steps, of `together` queries each."""
        return len(self.schedule.kind)

    @property
    def step_passes(self) -> tuple[int, int]:
        """The queries of one step."""
        return self.together, 0

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """At the clean image, with no image that reaches the goal. No passes."""
        fields = skeleton.blank(keys, images, labels)
        clean = fields["clean"]
        zeros = jnp.zeros(clean.shape[0], jnp.promote_types(clean.dtype, jnp.float32))
        return State(
            **fields,
            point=clean,
            low=zeros,
            high=zeros + 1,
            agreed=jnp.zeros_like(clean),
            asked=jnp.zeros_like(clean),
            votes=zeros,
            nearest=zeros + jnp.inf,
        )

    def step(self, model: skeleton.Model, state: State) -> State:
        """Asks for the decision on `together` images of each example, and goes on by its phase. `together` forward passes."""
        now = jax.tree.map(lambda column: jnp.asarray(column)[state.count], self.schedule)
        distance = self.norm.measure(state.point - state.clean)
        levels = self._levels(state)
        images = self._asked(state, now, levels, distance)
        logits = evaluation.widened(model, images, state.keys, state.count)
        reached = jax.vmap(self.achieves, in_axes=(0, None))(logits, state.labels)
        state = self._keep_nearest(state, images, reached)

        is_start, is_line, is_around, is_step = (now.kind == kind for kind in (_START, _LINE, _AROUND, _STEP))
        low, high = _narrowed(levels, reached, state)
        found = is_line & now.last
        boundary = self._between(state, high[None], distance)[0]
        # The longest step that stays on the far side of the boundary.
        moved = skeleton.select(jnp.any(reached, axis=0), _pick(images, jnp.argmax(reached, axis=0)), state.point)
        point = skeleton.select(found, boundary, state.point)
        point = skeleton.select(is_step, moved, point)
        point = skeleton.select(is_start, state.best, point)
        directions = (images - state.point[None]) / _per_image(self._reach(distance)[None])
        directions = jnp.where(_per_image(is_around[None]), directions, 0.0)
        signs = jnp.where(is_around[None], jnp.where(reached, 1.0, -1.0), 0.0).astype(directions.dtype)
        clean_reaches = (state.count == 0) & reached[0]
        return state.replace(
            point=point,
            low=jnp.where(is_line & ~found, low, 0.0),
            high=jnp.where(is_line & ~found, high, 1.0),
            agreed=_fresh_after(is_step, state.agreed + jnp.sum(_per_image(signs) * directions, axis=0)),
            asked=_fresh_after(is_step, state.asked + jnp.sum(directions, axis=0)),
            votes=_fresh_after(is_step, state.votes + jnp.sum(signs, axis=0)),
            done=state.done | clean_reaches | (is_start & now.last & ~state.success),
        )

    def _asked(self, state: State, now: Schedule, levels: jax.Array, distance: jax.Array) -> jax.Array:
        """The images `[together, batch, ...]` that each example asks about in its phase."""
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
        images = none = jnp.zeros((self.together, *state.clean.shape), state.clean.dtype)
        for kind, make in (
            (_START, lambda: self._starts(state, keys)),
            (_LINE, lambda: self._between(state, levels, distance)),
            (_AROUND, lambda: self._around(state, keys, distance)),
            (_STEP, lambda: self._steps(state, now, distance)),
        ):
            chosen = now.kind == kind
            # Only the phases that some example is in are computed; the model is asked once for all.
            made = jax.lax.cond(jnp.any(chosen), make, lambda: none)
            images = jnp.where(_per_image(chosen[None]), made, images)
        return images

    def _keep_nearest(self, state: State, images: jax.Array, reached: Bool[Array, "together batch"]) -> State:
        distances = jax.vmap(self.norm.measure)(images - state.clean[None])
        distances = jnp.where(reached, distances, jnp.inf).astype(state.nearest.dtype)
        index = jnp.argmin(distances, axis=0)
        nearest = jnp.min(distances, axis=0)
        nearer = nearest < state.nearest
        return state.replace(
            best=skeleton.select(nearer, _pick(images, index), state.best),
            nearest=jnp.minimum(nearest, state.nearest),
            success=state.success | nearer,
        )

    def _levels(self, state: State) -> Float[Array, "together batch"]:
        """Fractions of the line that cut what is left of it into equal parts."""
        parts = jnp.arange(1, self.together + 1, dtype=state.low.dtype)[:, None] / (self.together + 1)
        return state.low[None] + parts * (state.high - state.low)[None]

    def _between(self, state: State, levels: Float[Array, "times batch"], distance: jax.Array) -> jax.Array:
        """Images on the way from the clean image to `point`: on the line, or in the maximum norm clipped to a smaller ball."""
        levels = _per_image(levels.astype(state.clean.dtype))
        change = (state.point - state.clean)[None]
        if self.norm is norms.LINF:
            most = levels * _per_image(distance[None])
            return state.clean[None] + jnp.clip(change, -most, most)
        return state.clean[None] + levels * change

    def _starts(self, state: State, keys: jax.Array) -> jax.Array:
        """Noise blended in by and by; first of all the clean image, and one of the class to reach where there is one."""
        shape = (self.together, *state.clean.shape[1:])
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape, state.clean.dtype), out_axes=1)(keys)
        shares = jnp.arange(1, self.together + 1, dtype=noise.dtype)[:, None] / self.together
        images = state.clean[None] + _per_image(shares) * (noise - state.clean[None])
        first = state.count == 0
        images = images.at[0].set(skeleton.select(first, state.clean, images[0]))
        if self.references is None:
            return images
        classes = len(self.references)
        wanted = state.labels
        if self.goal is skeleton.UNTARGETED:
            others = jax.vmap(lambda key: jax.random.randint(key, (), 1, classes))(keys)
            wanted = (wanted + others) % classes
        return images.at[-1].set(jnp.asarray(self.references, images.dtype)[wanted])

    def _around(self, state: State, keys: jax.Array, distance: jax.Array) -> jax.Array:
        """Images around the point at the boundary, in random directions."""
        shape = (self.together, *state.clean.shape[1:])
        draw = _DIRECTIONS[self.norm.name]
        directions = jax.vmap(lambda key: draw(key, shape, state.clean.dtype), out_axes=1)(keys)
        directions = jax.vmap(norms.L2.ascend)(directions)
        return jnp.clip(state.point[None] + _per_image(self._reach(distance)[None]) * directions, 0.0, 1.0)

    def _steps(self, state: State, now: Schedule, distance: jax.Array) -> jax.Array:
        """Steps along the estimated normal of the boundary, each half as long as the one before."""
        # Less the mean answer, which has a lower variance where the answers are not balanced (equation 16 of the paper).
        mean = state.votes / jnp.maximum(now.probes, 1)
        mean = jnp.where(jnp.abs(mean) >= 1, 0.0, mean).astype(state.agreed.dtype)
        direction = self.norm.ascend(state.agreed - _per_image(mean) * state.asked)
        length = distance / jnp.sqrt(jnp.maximum(now.round, 1).astype(distance.dtype))
        lengths = length[None] * 0.5 ** jnp.arange(self.together, dtype=distance.dtype)[:, None]
        return jnp.clip(state.point[None] + _per_image(lengths) * direction[None], 0.0, 1.0)

    def _reach(self, distance: jax.Array) -> jax.Array:
        """The L2 length of what is added to the point at the boundary."""
        return jnp.maximum(jnp.asarray(self.radius, distance.dtype) * distance, jnp.finfo(distance.dtype).tiny)


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


# Of the random directions, by norm; their length is then one.
_DIRECTIONS = {"l2": _gaussian, "linf": _uniform}


def _narrowed(levels: jax.Array, reached: jax.Array, state: State) -> tuple[jax.Array, jax.Array]:
    """What is left of the line: up to the nearest level that reaches the goal, from the one before it."""
    first = jnp.argmax(reached, axis=0)
    before = jnp.concatenate([state.low[None], levels])
    any_reached = jnp.any(reached, axis=0)
    rows = jnp.arange(len(first))
    low = jnp.where(any_reached, before[first, rows], levels[-1])
    return low, jnp.where(any_reached, levels[first, rows], state.high)


def _per_image(values: jax.Array) -> jax.Array:
    return values[..., None, None, None]


def _fresh_after(ended: Bool[Array, " batch"], sums: jax.Array) -> jax.Array:
    """The sums of a round, and zero for the next one."""
    return skeleton.select(ended, jnp.zeros_like(sums), sums)


def _pick(images: Float[Array, "times batch height width channels"], index: jax.Array) -> jax.Array:
    """One image of each example."""
    return jnp.take_along_axis(images, index[None, :, None, None, None], axis=0)[0]


def hop_skip_jump(
    *,
    norm: str | norms.Norm = "l2",
    rounds: int = 40,
    probes: int = 100,
    radius: float = 0.01,
    narrowings: int = 4,
    together: int = 10,
    starts: int = 5,
    references: Float[Array, "classes height width channels"] | None = None,
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """HopSkipJump (Chen et al. 2020, arXiv 1904.02144, algorithm 2): minimal norm, from the predicted class alone.

    Each round estimates the normal of the boundary from random directions, takes the longest of `together` halved steps along it
    that stays on the far side, and searches the line back to the clean image. The returned image is the nearest of all that were
    asked about. A step asks `together` queries in one batch: a line search cuts the line into `together + 1` parts rather than
    into halves, which takes more queries and fewer calls. Directions are tried at 0.01 of the distance, where the paper has
    1 / dimension of it: in float32 the latter is below the rounding of the logits.

    Cost: `together` forward passes times `starts + narrowings + rounds * (1 + narrowings)` steps and the directions,
    about `2 / 3 * probes * rounds^1.5` (19,400 queries by default), one that judges, and no backward pass.

    Args:
      norm: `l2` or `linf`: of the distance that is made small.
      rounds: estimates of the boundary's normal.
      probes: directions of the first round; the n-th takes sqrt(n) times as many, rounded up to whole steps.
      radius: of the directions' length (in L2), in units of the distance.
      narrowings: steps of a line search; its tolerance is `(together + 1) ** -narrowings` of the line.
      together: queries of one step, at least 2.
      starts: steps that look for an image to start from: the clean image with more and more of uniform noise.
      references: an image of each class: a targeted attack starts from the one of its target, which noise seldom hits; an
        untargeted one tries one of another class in each of the `starts`.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
    """
    norm = norms.find(norm)
    if norm.name not in _DIRECTIONS:
        raise errors.UserError(f"HopSkipJump is defined for {' and '.join(_DIRECTIONS)}, not for {norm.name}.")
    arguments.counts(rounds=rounds, probes=probes, narrowings=narrowings, starts=starts)
    arguments.counts(least=2, together=together)
    arguments.positive(radius=radius)
    if references is not None and (np.ndim(references) != 4 or len(references) < 2):
        raise errors.UserError(
            f"references have shape {np.shape(references)}: expected one image a class, [classes, height, width, channels]."
        )
    return HopSkipJump(
        radius=arguments.number(radius),
        references=None if references is None else jnp.asarray(references),
        norm=norm,
        goal=arguments.find("goal", goal, skeleton.GOALS),
        starts=starts,
        rounds=rounds,
        probes=probes,
        narrowings=narrowings,
        together=together,
    )
