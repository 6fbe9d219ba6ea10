"""Auto-PGD by name: on the cross-entropy, on the DLR loss, on the targeted DLR loss, and on any other."""

from __future__ import annotations

from collections.abc import Callable

import jax

from robust_vit import losses
from robust_vit.attacks import arguments, auto_pgd, norms, skeleton, threats

# The radii that a run in L1 goes through, in units of epsilon, with the share of the steps that each has (Croce & Hein 2021,
# arXiv 2103.01208, section 4.2).
SHRINKING = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
FIXED = ((1.0, 1.0),)


def apgd(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    loss: str | Callable = "margin",
    steps: int = 100,
    restarts: int = 1,
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """Auto-PGD on any loss: no step size to choose (Croce & Hein 2020, arXiv 2003.01690; in L1 2021, arXiv 2103.01208).

    Cost: at most `1 + restarts * (steps + 1)` forward and backward passes (in L1 `1 + restarts * (steps + 3)`), and one forward
    pass that judges.

    With `stop_on_success` an example ends at its first success, where the original goes on to no effect on its decisions: those
    are the same, given the same starts. L2 differs from the original where pixels are at 0 or 1: it projects onto the ball
    first and the box second, which stops short of the nearest point of both.

    Args:
      epsilon: radius, in pixel units [0, 1].
      norm: `linf`, `l2` or `l1`; the maximum norm where neither it nor `threat` is given. In L1 a run goes through balls of
        3, 2 and 1 times the radius, as AutoAttack does.
      threat: a threat model or its name (`cifar10/linf-8`), in place of `epsilon` and `norm`.
      loss: `margin`, `cross_entropy`, `dlr` or a named function `(logits, labels) -> [batch]`.
      steps: gradient steps of a run.
      restarts: runs from random starts.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
      stop_on_success: leave an example alone as soon as it reaches the goal. Without it, and on a model that draws, every example
        takes all steps, and the success with the largest loss is returned, for training or to look at losses.
    """
    epsilon, norm = arguments.ball(epsilon, norm, threat)
    arguments.counts(steps=steps, restarts=restarts)
    return auto_pgd.AutoPGD(
        epsilon=epsilon,
        norm=norm,
        loss=arguments.find("loss", loss, skeleton.LOSSES),
        goal=arguments.find("goal", goal, skeleton.GOALS),
        steps=steps,
        restarts=restarts,
        radii=SHRINKING if norm is norms.L1 else FIXED,
        stop_on_success=bool(stop_on_success),
    )


def apgd_ce(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 100,
    restarts: int = 1,
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """Auto-PGD on the cross-entropy, the first attack of AutoAttack. Arguments and cost as of `apgd`."""
    return apgd(
        epsilon=epsilon,
        norm=norm,
        threat=threat,
        loss="cross_entropy",
        steps=steps,
        restarts=restarts,
        goal=goal,
        stop_on_success=stop_on_success,
    )


def apgd_dlr(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 100,
    restarts: int = 1,
    goal: str | skeleton.Goal = "untargeted",
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """Auto-PGD on the difference of logits ratio (`losses.dlr`), for three classes or more. Arguments and cost as of `apgd`."""
    return apgd(
        epsilon=epsilon,
        norm=norm,
        threat=threat,
        loss="dlr",
        steps=steps,
        restarts=restarts,
        goal=goal,
        stop_on_success=stop_on_success,
    )


def apgd_t(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    stop_on_success: bool = True,
) -> skeleton.Attack:
    """Auto-PGD on the targeted DLR loss: runs towards the most likely other classes, until the image is misclassified.

    The second attack of AutoAttack. Success is any misclassification, not the class gone for, as in the original. The order of
    the classes is that of the clean image's logits. For four classes or more.

    Cost: that of `apgd` with `targets * restarts` for `restarts`. Arguments as of `apgd`, and

    Args:
      targets: how many classes are gone for; fewer than there are.
      restarts: runs from random starts for each of them.
    """
    arguments.counts(targets=targets)
    attack = apgd(
        epsilon=epsilon,
        norm=norm,
        threat=threat,
        loss="dlr",
        steps=steps,
        restarts=restarts,
        stop_on_success=stop_on_success,
    )
    return attack.replace(towards=losses.targeted_dlr, targets=targets)
