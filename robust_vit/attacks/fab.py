"""FAB, the fast adaptive boundary attack: between the clean image's and the current image's way to a linear boundary."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from robust_vit import losses
from robust_vit.attacks import arguments, boundaries, evaluation, hyperplanes, minimal, norms, skeleton, threats

# Twice the length of random starts where no epsilon is given: autoattack/fab_base.py, DEFAULT_EPS_DICT_BY_NORM.
START_RADIUS = {"linf": 0.3, "l2": 1.0, "l1": 5.0}


class State(minimal.State, kw_only=True):
    """Where each example's search stands.

    Attributes:
      rivals: the targets, most likely first at the clean image.
    """

    rivals: Int[Array, "batch targets"]


class FastAdaptiveBoundary(minimal.MinimalAttack, kw_only=True):
    """Projections on linear boundaries in the box. `robust_vit.attacks.build("fab", ...)` or `"fab_t"` makes one.

    Attributes:
      bias: alpha_max, the largest share of the step from the clean image.
      overshoot: eta, factor of the way to the boundary.
      retreat: beta, share of the way from the clean image that is kept after a success.
      targets: classes whose boundaries are approached one after the other; 0 approaches the nearest in each step.
      candidates: with no targets, classes whose boundaries are looked at, the label among them: the most likely ones.
      steps: of each run.
      restarts: runs for each target; all but the first from a random start.
    """

    bias: Any
    overshoot: Any
    retreat: Any
    targets: int = flax.struct.field(pytree_node=False, default=0)
    candidates: int = flax.struct.field(pytree_node=False, default=10)
    steps: int = flax.struct.field(pytree_node=False, default=100)
    restarts: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def runs(self) -> int:
        """Of one example at most: one for each target and restart."""
        return self.restarts * max(1, self.targets)

    @property
    def evaluations(self) -> int:
        """Steps of one example at most."""
        return self.runs * self.steps

    @property
    def step_passes(self) -> tuple[int, int]:
        """Without targets a model with fewer classes than `candidates` takes fewer backward passes than are counted."""
        return 2, self._rivals

    @property
    def _rivals(self) -> int:
        """Boundaries looked at in one step: of a class to reach, the one that is crossed last."""
        return 1 if self.targets or self.goal is skeleton.TARGETED else self.candidates - 1

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The clean image. No passes."""
        start = minimal.blank(keys, images, labels)
        return State(**start, rivals=jnp.zeros((len(start["images"]), self.targets), jnp.int32))

    def step(self, model: skeleton.Model, state: State) -> State:
        """Moves the images towards a boundary, evaluates them, and takes successes back towards the clean image."""
        found = boundaries.linearise(
            model, state.images, state.keys, state.labels, lambda logits: self._choose(state, logits), 2 * state.count
        )
        moved = self._move(state, found)
        logits = evaluation.logits(model, moved, state.keys, 2 * state.count + 1)
        achieved = self.achieves(logits, state.labels)
        recorded = self.record(state, state.images, self.achieves(found.logits, state.labels))
        recorded = self.record(recorded, moved, achieved)
        retreated = state.clean + jnp.asarray(self.retreat, moved.dtype) * (moved - state.clean)
        images = skeleton.select(achieved, retreated, moved)
        following = (state.count + 1) // self.steps
        starts = ((state.count + 1) % self.steps == 0) & (following < self.runs)
        images = skeleton.select(starts, self._start(state, following), images)
        done = recorded.done
        if self.targets:
            # A model with fewer other classes than targets has no more boundaries.
            done = done | (following >= self.restarts * min(self.targets, logits.shape[-1] - 1))
        return recorded.replace(
            images=images,
            rivals=self._rank(state, found.logits),
            done=done,
            vanished=state.vanished + found.vanished,
        )

    def _rank(self, state: State, logits: jax.Array) -> jax.Array:
        """The targets: of the clean image, which is what the first step evaluates."""
        if not self.targets:
            return state.rivals
        ranked = boundaries.most_likely_rivals(logits, state.labels, self.targets)
        ranked = jnp.pad(ranked, ((0, 0), (0, self.targets - ranked.shape[1])))
        return skeleton.select(state.count == 0, ranked, state.rivals)

    def _choose(self, state: State, logits: jax.Array) -> jax.Array:
        if not self.targets:
            return boundaries.most_likely_rivals(logits, state.labels, self._rivals)
        target = jnp.minimum(state.count // (self.steps * self.restarts), self.targets - 1)
        return jnp.take_along_axis(self._rank(state, logits), target[:, None], axis=1)

    def _move(self, state: State, found: boundaries.Boundaries) -> jax.Array:
        """Between the ways of the current and of the clean image to the boundary, by how long they are (algorithm 1)."""
        gap, normal, _ = boundaries.nearest(self.norm, found)
        gap = gap.astype(normal.dtype)
        # The same hyperplane, seen from the clean image.
        clean_gap = gap + jnp.sum(normal * (state.images - state.clean), axis=(1, 2, 3))
        both = jnp.concatenate((state.images, state.clean))
        ways = hyperplanes.reach(self.norm, both, jnp.concatenate((normal, normal)), jnp.concatenate((gap, clean_gap)))
        lengths = jnp.maximum(self.norm.measure(ways), 1e-8)
        ahead, from_clean = jnp.split(both + jnp.asarray(self.overshoot, ways.dtype) * ways, 2)
        length, clean_length = jnp.split(lengths, 2)
        share = jnp.minimum(length / (length + clean_length), jnp.asarray(self.bias, ways.dtype))[:, None, None, None]
        return jnp.clip((1.0 - share) * ahead + share * from_clean, 0.0, 1.0)

    def _start(self, state: State, run: jax.Array) -> jax.Array:
        """The clean image in the first run of a target; else at half the radius from it, in a random direction."""
        if self.restarts == 1:
            return state.clean
        shape, dtype = state.clean.shape[1:], state.clean.dtype
        keys = jax.vmap(jax.random.fold_in)(state.keys, run)
        if self.norm is norms.LINF:
            direction = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, -1.0, 1.0))(keys)
        else:
            direction = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
        radius = jnp.asarray(START_RADIUS[self.norm.name] if self.epsilon is None else self.epsilon, dtype)
        length = jnp.where(run % self.restarts == 0, 0.0, 0.5 * radius / self.norm.measure(direction))
        return jnp.clip(state.clean + length[:, None, None, None] * direction, 0.0, 1.0)


def fab(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 100,
    restarts: int = 1,
    bias: float = 0.1,
    overshoot: float = 1.05,
    retreat: float = 0.9,
    candidates: int = 10,
    goal: str | skeleton.Goal = "untargeted",
    end_early: bool = True,
) -> skeleton.Attack:
    """FAB, L-infinity, L2 or L1, towards the nearest boundary (Croce & Hein 2020, arXiv 1907.02044, algorithm 1).

    As in the AutoAttack repository (autoattack/fab_base.py), which has no final search. Departures: only the `candidates` most
    likely classes are looked at (there, all of them), a success met at the start of a step counts too, and `targeted` is ours.
    Cost: `restarts * steps` times two forward and `candidates - 1` backward passes at most, and one forward pass that judges.

    Args:
      epsilon: end an example at the first success at most this far away, in pixel units, and start at random from half of it;
        None seeks on, and starts as AutoAttack does where it has none (`START_RADIUS`).
      norm: `linf`, `l2` or `l1`.
      threat: a threat model or its name (`cifar10/linf-8`), in place of `epsilon` and `norm`.
      steps: of each run.
      restarts: runs; the first starts at the clean image.
      bias: alpha_max, the largest share of the way from the clean image, in (0, 1).
      overshoot: eta, factor of the ways to the boundary, from 1.
      retreat: beta, share of the way from the clean image that is kept after a success, in (0, 1).
      candidates: classes whose boundaries are looked at, the label among them; at least 2.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach, and each step goes to the
        boundary with the most likely other class, for one backward pass.
      end_early: False seeks on in spite of epsilon, as AutoAttack does: it then sets the random starts alone.
    """
    arguments.counts(least=2, candidates=candidates)
    goal = arguments.find("goal", goal, skeleton.GOALS)
    options = {"candidates": candidates, "goal": goal, "end_early": bool(end_early)}
    return _build("fab", epsilon, norm, threat, steps, restarts, bias, overshoot, retreat, **options)


def fab_t(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    bias: float = 0.1,
    overshoot: float = 1.05,
    retreat: float = 0.9,
    end_early: bool = True,
) -> skeleton.Attack:
    """FAB towards the boundary of one likely class after the other, as in AutoAttack; any other class is a success.

    Cost: `targets * restarts * steps` times two forward passes and one backward pass at most, and one forward pass that
    judges. Arguments as in `fab`, and

    Args:
      targets: classes, the most likely ones at the clean image; all others where there are fewer.
    """
    arguments.counts(targets=targets)
    options = {"targets": targets, "end_early": bool(end_early)}
    return _build("fab_t", epsilon, norm, threat, steps, restarts, bias, overshoot, retreat, **options)


def _build(name, epsilon, norm, threat, steps, restarts, bias, overshoot, retreat, **options) -> skeleton.Attack:
    epsilon, norm = minimal.ball(name, epsilon, norm, threat, ("linf", "l2", "l1"))
    arguments.counts(steps=steps, restarts=restarts)
    arguments.shares(bias=bias, retreat=retreat)
    arguments.positive(overshoot=overshoot)
    return FastAdaptiveBoundary(
        epsilon=epsilon,
        norm=norm,
        loss=losses.margin,
        bias=arguments.number(bias),
        overshoot=arguments.number(overshoot),
        retreat=arguments.number(retreat),
        steps=steps,
        restarts=restarts,
        **options,
    )
