"""Carlini and Wagner's L2 attack: Adam behind a change of variables, and a binary search over the loss's weight."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_vit import errors, losses
from robust_vit.attacks import arguments, evaluation, minimal, moments, norms, skeleton, threats

_ADAM_FLOOR = 1e-8
_INSIDE = 1.0 - 1e-6  # Pixels at the ends of [0, 1] would be infinitely far away behind the change of variables.
_UNBOUNDED = 1e10
_CHECKS = 4  # A round is looked at this often for progress.


class State(minimal.State, kw_only=True):
    """Where each example's search stands.

    Attributes:
      modifier: what is optimised: `images = (tanh(atanh(2 clean - 1) + modifier) + 1) / 2`.
      moments: Adam's, in this round.
      weight: of the loss beside the squared distance, in this round.
      too_small, too_large: bounds of the weight that the rounds have found.
      iteration: in this round.
      round: of the binary search.
      reached: a success was met in this round.
      least: the least objective of this round.
      earlier: what it was when the round was last looked at.
    """

    modifier: Float[Array, "batch height width channels"]
    moments: moments.Moments
    weight: Float[Array, " batch"]
    too_small: Float[Array, " batch"]
    too_large: Float[Array, " batch"]
    iteration: Int[Array, " batch"]
    round: Int[Array, " batch"]
    reached: Bool[Array, " batch"]
    least: Float[Array, " batch"]
    earlier: Float[Array, " batch"]


class CarliniWagner(minimal.MinimalAttack, kw_only=True):
    """Least squared distance plus a weighted hinge. `robust_vit.attacks.build("carlini_wagner", ...)` makes one.

    Attributes:
      learning_rate: of Adam.
      start_weight: of the hinge, in the first round.
      confidence: margin, in logits, that a success must have.
      rounds: of the binary search.
      steps: of Adam in one round.
      abort_early: end an example's round where a quarter of it brought no progress.
    """

    learning_rate: Any
    start_weight: Any
    confidence: Any
    rounds: int = flax.struct.field(pytree_node=False, default=9)
    steps: int = flax.struct.field(pytree_node=False, default=1000)
    abort_early: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def evaluations(self) -> int:
        """Steps of one example at most."""
        return self.rounds * self.steps

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The clean image, in the first round. No passes."""
        start = minimal.blank(keys, images, labels)
        numbers = start["nearest"]
        return State(
            **start,
            **_fresh_round(start["images"]),
            weight=jnp.full_like(numbers, self.start_weight),
            too_small=jnp.zeros_like(numbers),
            too_large=jnp.full_like(numbers, _UNBOUNDED),
            round=jnp.zeros_like(start["count"]),
        )

    def step(self, model: skeleton.Model, state: State) -> State:
        """Evaluates the images and takes one step of Adam, or starts the next round. One forward and backward pass."""
        found = evaluation.ascent(self._hinge, model, state.images, state.keys, state.labels, draw=state.count)
        margin = self.goal.direction * losses.margin(found.logits, state.labels)
        achieved = self.achieves(found.logits, state.labels) & (margin >= self.confidence)
        difference = state.images - state.clean
        objective = norms.L2.measure(difference) ** 2 + state.weight * found.values.astype(state.weight.dtype)
        gradients = 2.0 * difference + _wide(state.weight) * found.gradients
        recorded = self.record(state, state.images, achieved).replace(vanished=state.vanished + found.vanished)
        optimised = self._adam(recorded, gradients).replace(reached=state.reached | achieved)
        ends = state.iteration + 1 >= self.steps
        if self.abort_early:
            looked_at = state.iteration % max(1, self.steps // _CHECKS) == 0
            # The least objective so far: that of one step goes up and down by more than Adam gains in many.
            least = jnp.minimum(state.least, objective)
            ends = ends | (looked_at & (least > 0.9999 * state.earlier))
            optimised = optimised.replace(least=least, earlier=jnp.where(looked_at, least, state.earlier))
        following = self._next_round(optimised)
        changed = {
            name: skeleton.select(ends, getattr(following, name), getattr(optimised, name)) for name in _OF_A_ROUND
        }
        moved = optimised.replace(**changed)
        return moved.replace(done=moved.done | (moved.round >= self.rounds))

    def _hinge(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.maximum(self.confidence - self.goal.direction * losses.margin(logits, labels), 0.0)

    def _adam(self, state: State, gradients: jax.Array) -> State:
        shift = jnp.arctanh((2.0 * state.clean - 1.0) * _INSIDE)
        gradients = gradients * 0.5 * (1.0 - jnp.tanh(shift + state.modifier) ** 2)
        iteration = state.iteration + 1
        updated = state.moments.update(gradients)
        modifier = state.modifier - self.learning_rate * updated.direction(iteration, _ADAM_FLOOR)
        images = 0.5 * (jnp.tanh(shift + modifier) + 1.0)
        return state.replace(images=images, modifier=modifier, moments=updated, iteration=iteration)

    def _next_round(self, state: State) -> State:
        """The weight between the bounds, or ten times as large while none was too large."""
        too_large = jnp.where(state.reached, jnp.minimum(state.too_large, state.weight), state.too_large)
        too_small = jnp.where(state.reached, state.too_small, jnp.maximum(state.too_small, state.weight))
        weight = jnp.where(too_large < _UNBOUNDED, 0.5 * (too_small + too_large), 10.0 * state.weight)
        return state.replace(
            **_fresh_round(state.clean),
            images=state.clean,
            weight=weight,
            too_small=too_small,
            too_large=too_large,
            round=state.round + 1,
        )


def carlini_wagner(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 1000,
    rounds: int = 9,
    learning_rate: float = 0.01,
    start_weight: float = 1e-3,
    confidence: float = 0.0,
    abort_early: bool = True,
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """Carlini and Wagner's L2 attack (2017, arXiv 1608.04644, section VI.A, and the authors' nn_robust_attacks).

    Departures: 1,000 steps a round rather than 10,000; each example ends its rounds by itself, on its least objective, and not
    when the sum over the batch stands still; a last round at the largest weight is not repeated.
    Cost: `rounds * steps` forward and backward passes at most, and one forward pass that judges.

    Args:
      epsilon: end an example at the first success at most this far away, in pixel units; None seeks on.
      norm: `l2`.
      threat: a threat model or its name (`cifar10/l2-0.5`), in place of `epsilon` and `norm`.
      steps: of Adam in each round.
      rounds: of the binary search over the weight c of the hinge.
      learning_rate: of Adam, behind the change of variables.
      start_weight: c of the first round.
      confidence: margin kappa, in logits, that a success must have, from 0.
      abort_early: end an example's round where a quarter of it brought no progress.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
    """
    epsilon, norm = minimal.ball("carlini_wagner", epsilon, norm, threat, ("l2",))
    arguments.counts(steps=steps, rounds=rounds)
    arguments.positive(learning_rate=learning_rate, start_weight=start_weight)
    if not np.all(np.isfinite(confidence)) or np.any(np.asarray(confidence) < 0):
        raise errors.UserError(f"confidence is {confidence}: expected a number from 0, in logits.")
    return CarliniWagner(
        epsilon=epsilon,
        norm=norm,
        loss=losses.margin,
        goal=arguments.find("goal", goal, skeleton.GOALS),
        learning_rate=arguments.number(learning_rate),
        start_weight=arguments.number(start_weight),
        confidence=arguments.number(confidence),
        rounds=rounds,
        steps=steps,
        abort_early=bool(abort_early),
    )


_OF_A_ROUND = (
    "images",
    "modifier",
    "moments",
    "weight",
    "too_small",
    "too_large",
    "iteration",
    "round",
    "reached",
    "least",
    "earlier",
)


def _fresh_round(images: jax.Array) -> dict[str, jax.Array]:
    batch = images.shape[0]
    return {
        "modifier": jnp.zeros_like(images),
        "moments": moments.zeros(images),
        "iteration": jnp.zeros(batch, jnp.int32),
        "reached": jnp.zeros(batch, bool),
        "least": jnp.full(batch, jnp.inf, images.dtype),
        "earlier": jnp.full(batch, jnp.inf, images.dtype),
    }


def _wide(values: Float[Array, " batch"]) -> Float[Array, "batch 1 1 1"]:
    return values[:, None, None, None]
