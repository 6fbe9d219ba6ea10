"""Attacks by steps along the gradient in a ball: FGSM, BIM, PGD, MI-FGSM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robust_vit import errors
from robust_vit.attacks import arguments, evaluation, norms, skeleton, threats


def constant(progress: jax.Array) -> jax.Array:
    """The step size as it is."""
    return jnp.ones_like(progress)


def cosine(progress: jax.Array) -> jax.Array:
    """The step size falling to zero along half a cosine."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


SCHEDULES = {"constant": constant, "cosine": cosine}


class AscentState(skeleton.State, kw_only=True):
    """Where an ascent stands.

    Attributes:
      velocity: of an ascent with momentum, the decaying sum of its gradients, each of L1 norm one; None without momentum.
    """

    velocity: Float[Array, "batch height width channels"] | None


class ProjectedAscent(skeleton.Climb, kw_only=True):
    """Projected steepest ascent of the loss in a ball. `robust_vit.attacks.build("pgd", ...)` makes one.

    Attributes:
      epsilon: radius of the ball, in pixel units [0, 1].
      relative_step: length of a step in units of epsilon, so that a sweep over epsilon scales the steps too.
      momentum: what a step keeps of the gradients before it, at least 0; None steps along the gradient alone.
      schedule: factor of the step size from the progress in [0, 1) of a restart, a named function.
      steps: gradient steps from each start.
      restarts: starts, at least one.
      random_start: start uniformly in the ball rather than at the clean image.
    """

    epsilon: Any
    relative_step: Any
    momentum: Any = None
    schedule: Callable = flax.struct.field(pytree_node=False, default=constant)
    steps: int = flax.struct.field(pytree_node=False, default=10)
    restarts: int = flax.struct.field(pytree_node=False, default=1)
    random_start: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def evaluations(self) -> int:
        """Steps of one example at most, the evaluations of random starts' ends included."""
        return self.restarts * (self.steps + 1) if self.random_start else self.steps

    def sweep(self, epsilons: Float[Array, " sweep"]) -> ProjectedAscent:
        """This attack at each radius, its numbers stacked: `jax.vmap(lambda a: a(model, keys, images, labels))(a.sweep(e))`."""
        epsilons = jnp.asarray(arguments.ball(epsilons, self.norm, None)[0], jnp.result_type(float))
        return jax.tree.map(lambda number: jnp.broadcast_to(number, epsilons.shape), self).replace(epsilon=epsilons)

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> AscentState:
        """The state before any evaluation. No passes."""
        velocity = None if self.momentum is None else jnp.zeros_like(jnp.asarray(images))
        return AscentState(**skeleton.blank(keys, images, labels), velocity=velocity)

    def step(self, model: skeleton.Model, state: AscentState) -> AscentState:
        """Evaluates the current images and moves them. One forward and backward pass."""
        # What is evaluated at a boundary is complete: the clean image, or the end of a restart. A new start follows.
        phase = state.count % (self.steps + 1) if self.random_start else state.count + 1
        restart = state.count // (self.steps + 1)
        found = evaluation.ascent(self.loss, model, state.images, state.keys, state.labels, draw=state.count)
        gradients, velocity = found.gradients, None
        if self.momentum is not None:
            gradients = velocity = self._accelerate(state.velocity, gradients, phase)
        moved = self._move(state, gradients, phase)
        if self.random_start:
            starts = phase == 0
            fresh = jax.lax.cond(jnp.any(starts), lambda: self._start(state, restart), lambda: moved)
            moved = skeleton.select(starts, fresh, moved)
        achieved = self.achieves(found.logits, state.labels)
        stop = self.stop_on_success
        return skeleton.follow(state, moved, achieved, found.vanished, stop_on_success=stop, velocity=velocity)

    def _accelerate(self, velocity: jax.Array, gradients: jax.Array, phase: jax.Array) -> jax.Array:
        # The gradient at a boundary is of another start's end.
        kept = jnp.where(phase == 0, 0.0, jnp.asarray(self.momentum, gradients.dtype))
        fresh = skeleton.select(phase == 0, jnp.zeros_like(gradients), norms.normalize(norms.L1, gradients))
        return kept[:, None, None, None] * velocity + fresh

    def _move(self, state: skeleton.State, gradients: jax.Array, phase: jax.Array) -> jax.Array:
        epsilon = jnp.asarray(self.epsilon, gradients.dtype)
        size = epsilon * jnp.asarray(self.relative_step, gradients.dtype)
        progress = (phase - 1).astype(gradients.dtype) / self.steps
        size = size * self.schedule(progress)
        direction = self.norm.climb(self.goal.direction * gradients, state.images)
        images = state.images + size[:, None, None, None] * direction
        return self.norm.project(images, state.clean, epsilon)

    def _start(self, state: skeleton.State, restart: jax.Array) -> jax.Array:
        epsilon = jnp.asarray(self.epsilon, state.clean.dtype)
        keys = jax.vmap(jax.random.fold_in)(state.keys, restart)
        return self.norm.project(state.clean + self.norm.draw(keys, state.clean, epsilon), state.clean, epsilon)


def fgsm(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """The fast gradient method: one step of length epsilon from the clean image (Goodfellow et al. 2015, arXiv 1412.6572).

    Cost: two forward passes and one backward pass, the judging pass included. Arguments as in `pgd`. With
    `stop_on_success` an image that is misclassified as it is stays as it is; without, and on a model that draws, every image
    takes the step.
    """
    return pgd(
        epsilon=epsilon,
        norm=norm,
        threat=threat,
        steps=1,
        relative_step=1.0,
        random_start=False,
        loss=loss,
        goal=goal,
        stop_on_success=stop_on_success,
    )


def bim(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 10,
    step_size: float | None = None,
    relative_step: float | jax.Array | None = None,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """The basic iterative method: gradient steps from the clean image (Kurakin et al. 2017, arXiv 1607.02533).

    Cost: `steps` forward and backward passes, and a forward pass that judges. Arguments as in `pgd`, but for the length of a
    step: `1.25 / steps` of epsilon, which is the paper's one level of 255 where it takes its `1.25 * 255 * epsilon` steps.
    """
    if step_size is None and relative_step is None:
        arguments.counts(steps=steps)
        relative_step = 1.25 / steps
    return pgd(
        epsilon=epsilon,
        norm=norm,
        threat=threat,
        steps=steps,
        step_size=step_size,
        relative_step=relative_step,
        random_start=False,
        loss=loss,
        goal=goal,
        stop_on_success=stop_on_success,
    )


def mi_fgsm(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 10,
    step_size: float | None = None,
    relative_step: float | jax.Array | None = None,
    momentum: float | jax.Array = 1.0,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """The momentum iterative method, whose steps transfer better between models (Dong et al. 2018, arXiv 1710.06081).

    Cost: `steps` forward and backward passes, and a forward pass that judges. Arguments as in `pgd`, but for the length of a
    step, `1 / steps` of epsilon as in the paper, and

    Args:
      momentum: what each step keeps of the sum of the gradients before it, which are scaled to L1 norm one; the paper's decay
        factor mu, at least 0.
    """
    if not np.all(np.isfinite(momentum)) or np.any(np.asarray(momentum) < 0):
        raise errors.UserError(f"momentum is {momentum}: expected a number from 0; the paper takes 1.")
    if step_size is None and relative_step is None:
        arguments.counts(steps=steps)
        relative_step = 1.0 / steps
    attack = bim(
        epsilon=epsilon,
        norm=norm,
        threat=threat,
        steps=steps,
        step_size=step_size,
        relative_step=relative_step,
        loss=loss,
        goal=goal,
        stop_on_success=stop_on_success,
    )
    return attack.replace(momentum=arguments.number(momentum))


def pgd(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 10,
    step_size: float | None = None,
    relative_step: float | jax.Array | None = None,
    schedule: str | Callable = "constant",
    restarts: int = 1,
    random_start: bool = True,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """Projected gradient descent from random starts (Madry et al. 2018, arXiv 1706.06083).

    In L1 a step is sparse (Tramer & Boneh 2019, arXiv 1904.13000); `apgd_ce` finds more there.

    Cost: `restarts * (steps + 1)` forward and backward passes at most (`steps` without a random start), and one forward
    pass that judges.

    Args:
      epsilon: radius, in pixel units [0, 1]. `Attack.sweep` makes the same attack at many radii.
      norm: `linf`, `l2` or `l1`; the maximum norm where neither it nor `threat` is given.
      threat: a threat model or its name (`cifar10/linf-8`), in place of `epsilon` and `norm`.
      steps: gradient steps from each start.
      step_size: length of a step in pixel units.
      relative_step: length of a step in units of epsilon, in place of `step_size`; `2.5 / steps` where neither is given.
      schedule: `constant`, `cosine`, or a named function of the progress in [0, 1).
      restarts: random starts.
      random_start: start uniformly in the ball; otherwise at the clean image, once.
      loss: `cross_entropy`, `margin` (does not saturate where the softmax does), or a named function
        `(logits, labels) -> [batch]`.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
      stop_on_success: leave an example alone as soon as it reaches the goal; the rate of success is the same or higher. On a
        model that draws every example takes all steps: there a first success is luck.
    """
    epsilon, norm = arguments.ball(epsilon, norm, threat)
    arguments.counts(steps=steps, restarts=restarts)
    if restarts > 1 and not random_start:
        raise errors.UserError(f"{restarts} restarts without a random start are all the same: set random_start=True.")
    if step_size is not None:
        if relative_step is not None:
            raise errors.UserError("an attack got step_size and relative_step: give one of them.")
        if np.ndim(epsilon) or not epsilon > 0:
            raise errors.UserError(
                f"step_size is given with epsilon {epsilon}: give relative_step, in units of epsilon, for a sweep or for 0."
            )
        relative_step = step_size / epsilon
    if relative_step is None:
        relative_step = 2.5 / steps
    if not np.all(np.isfinite(relative_step)) or np.any(np.asarray(relative_step) <= 0):
        raise errors.UserError(f"the step size is {relative_step} epsilon: expected a positive number.")
    return ProjectedAscent(
        epsilon=epsilon,
        relative_step=arguments.number(relative_step),
        norm=norm,
        loss=arguments.find("loss", loss, skeleton.LOSSES),
        schedule=arguments.find("schedule", schedule, SCHEDULES),
        goal=arguments.find("goal", goal, skeleton.GOALS),
        steps=steps,
        restarts=restarts,
        random_start=bool(random_start),
        stop_on_success=bool(stop_on_success),
    )
