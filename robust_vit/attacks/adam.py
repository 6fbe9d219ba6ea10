"""Ascent by Adam in a ball, as Paul & Chen climb the loss of ViTs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from robust_vit.attacks import arguments, evaluation, moments, norms, skeleton, threats

_STABILISER = 1e-7  # Added to the root of the second mean: the default of Keras, which Paul & Chen leave as it is.


class State(skeleton.State, kw_only=True):
    """Where each example's ascent stands.

    Attributes:
      moments: of the gradients so far.
    """

    moments: moments.Moments


class AdamAscent(skeleton.Climb, kw_only=True):
    """Adam's steps up the loss, projected into a ball. `robust_vit.attacks.build("adam", ...)` makes one.

    Attributes:
      epsilon: radius of the ball, in pixel units [0, 1].
      relative_step: Adam's learning rate, in units of epsilon.
      steps: gradient steps from the clean image.
    """

    epsilon: Any
    relative_step: Any
    steps: int = flax.struct.field(pytree_node=False, default=10)

    @property
    def evaluations(self) -> int:
        """Steps of one example at most."""
        return self.steps

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """Nothing seen yet. No passes."""
        fields = skeleton.blank(keys, images, labels)
        return State(**fields, moments=moments.zeros(fields["clean"]))

    def step(self, model: skeleton.Model, state: State) -> State:
        """Evaluates the current images and moves them. One forward and backward pass."""
        found = evaluation.ascent(self.loss, model, state.images, state.keys, state.labels, draw=state.count)
        updated = state.moments.update(self.goal.direction * found.gradients)
        epsilon = jnp.asarray(self.epsilon, state.clean.dtype)
        size = epsilon * jnp.asarray(self.relative_step, epsilon.dtype)
        moved = state.images + size * updated.direction(state.count + 1, _STABILISER)
        moved = self.norm.project(moved, state.clean, epsilon)
        achieved = self.achieves(found.logits, state.labels)
        stop = self.stop_on_success
        return skeleton.follow(state, moved, achieved, found.vanished, stop_on_success=stop, moments=updated)


def adam(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 10,
    relative_step: float | None = None,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """Adam's ascent from the clean image (Paul & Chen 2022, arXiv 2105.07581, github.com/sayakpaul/robustness-vit).

    There 10 steps of learning rate 0.001 climb in balls of 0.001 to 0.003, of pixels in [-1, 1]: relative steps of 0.3 to 1.
    Cost: `steps` forward and backward passes at most, and one forward pass that judges.

    Args:
      epsilon: radius, in pixel units [0, 1].
      norm: of the ball; the maximum norm where neither it nor `threat` is given.
      threat: a threat model or its name (`cifar10/linf-8`), in place of `epsilon` and `norm`.
      steps: gradient steps.
      relative_step: Adam's learning rate in units of epsilon; `2.5 / steps` where it is not given.
      loss: `cross_entropy`, `margin`, or a named function `(logits, labels) -> [batch]`.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
      stop_on_success: as in `pgd`.
    """
    epsilon, norm = arguments.ball(epsilon, norm, threat)
    arguments.counts(steps=steps)
    relative_step = 2.5 / steps if relative_step is None else relative_step
    arguments.positive(relative_step=relative_step)
    return AdamAscent(
        epsilon=epsilon,
        relative_step=arguments.number(relative_step),
        norm=norm,
        loss=arguments.find("loss", loss, skeleton.LOSSES),
        goal=arguments.find("goal", goal, skeleton.GOALS),
        steps=steps,
        stop_on_success=bool(stop_on_success),
    )
