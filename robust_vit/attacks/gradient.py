"""Attacks by the gradient of the loss in the pixels: FGSM and PGD."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import errors
from robust_vit.attacks import norms, skeleton, threats


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
    `stop_on_success` an image that is misclassified as it is stays as it is; without, every image takes the step.
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
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083); without a random start, the basic iterative method.

    Cost: `restarts * (steps + 1)` forward and backward passes at most (`steps` without a random start), and one forward
    pass that judges.

    Args:
      epsilon: radius, in pixel units [0, 1]. `Attack.sweep` makes the same attack at many radii.
      norm: `linf` or `l2`; the maximum norm where neither it nor `threat` is given.
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
      stop_on_success: leave an example alone as soon as it reaches the goal; the rate of success is the same or higher.
    """
    if threat is not None:
        if epsilon is not None or norm is not None:
            raise errors.UserError(
                "an attack got a threat and also epsilon or norm: give the threat alone, or the others."
            )
        model = threats.threat(threat) if isinstance(threat, str) else threat
        epsilon, norm = model.epsilon, model.norm
    if epsilon is None:
        raise errors.UserError('an attack got no size: give epsilon=8/255, norm="linf", or threat="cifar10/linf-8".')
    if np.any(np.asarray(epsilon) < 0) or not np.all(np.isfinite(epsilon)):
        raise errors.UserError(f"epsilon is {epsilon}: expected a number from 0, in pixel units [0, 1] (8/255, not 8).")
    norm = norms.find("linf" if norm is None else norm)
    if norm is norms.LINF and np.any(np.asarray(epsilon) > 1):
        raise errors.UserError(
            f"epsilon is {epsilon}: pixels are in [0, 1], so the maximum norm ends at 1 (8/255, not 8)."
        )
    for name, value in (("steps", steps), ("restarts", restarts)):
        if not isinstance(value, int) or value < 1:
            raise errors.UserError(f"{name} is {value!r}: expected a whole number from 1.")
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
    return skeleton.Attack(
        epsilon=_number(epsilon),
        relative_step=_number(relative_step),
        norm=norm,
        loss=_find("loss", loss, skeleton.LOSSES),
        schedule=_find("schedule", schedule, skeleton.SCHEDULES),
        goal=_find("goal", goal, skeleton.GOALS),
        steps=steps,
        restarts=restarts,
        random_start=bool(random_start),
        stop_on_success=bool(stop_on_success),
    )


def _number(value: float | jax.Array) -> np.generic | jax.Array:
    # A NumPy scalar, because a Python float is weakly typed and so another program than an array of the same value.
    if isinstance(value, jax.Array):
        return value
    return np.asarray(value, jnp.result_type(float))[()]


def _find(kind: str, value, known: dict):
    if not isinstance(value, str):
        return value
    if value not in known:
        raise errors.unknown(kind, value, known)
    return known[value]
