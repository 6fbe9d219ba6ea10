"""The guards of `robust_vit.attacks.checks`, one function each: what is held against which threshold, and what to do about it.

Sources: Croce & Hein 2020 (arXiv 2003.01690) and the flags of AutoAttack's `checks.py`; Pintor et al. 2022 (arXiv 2106.09947),
"Indicators of Attack Failure"; Carlini et al. 2019 (arXiv 1902.06705).

Of AutoAttack's flags one has no counterpart: `check_dynamic` traces whether the forward pass calls `grad` or `backward`, since in
torch what a model optimises inside itself is cut off from the attack's gradient. In JAX a gradient inside the model is a pure
function like any other, through which the attack differentiates; what does cut it off (`stop_gradient`, a rule of one's own, a
callback) leaves a gradient that is zero or wrong, which the guards of gradients, of the black box and without a bound see.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from robust_vit import errors, losses
from robust_vit.attacks import boundaries, evaluation, inputs, norms, skeleton
from robust_vit.metrics import statistics

VANISHED = 0.01  # Share of images without a usable gradient that is too many.
UNSTABLE = 0.5  # Mean relative change of the margin among neighbours; a CIFAR-10 ViT has 0.18 within 8/255, 0.01 within 0.5/255.
LAST = 10  # The last steps, in which a loss that has converged gains no more than
MOVING = 0.05  # of its whole range (Pintor et al. 2022).
UNFINISHED = 0.1  # Share of unbroken images whose loss may still move.
WEAKER = 0.002  # Accuracy by which a black box may beat the white boxes (AutoAttack's `check_square_sr`).
CHANCE = 0.01  # A comparison of two accuracies on the same images fires below this p-value (exact McNemar).


@dataclasses.dataclass(frozen=True)
class Guard:
    """One look at how an evaluation could be fooled.

    Attributes:
      name: of what it guards against, with the loss or the attack after a slash.
      fired: the sign is there.
      detail: what was seen, in a sentence; where it fired, what to do about it.
      value: the number that was held against a threshold.
    """

    name: str
    fired: bool
    detail: str
    value: float


@dataclasses.dataclass(frozen=True)
class Path:
    """An attack followed step by step.

    Attributes:
      margins: of the iterates before each step and after the last. Not the attack's loss: cross-entropy is an exponential of the
        margin where the model is sure, and moves by per cents of its range long after the margin has come to rest.
      adversarial: whether such an iterate reached the goal in the ball, or the attack says that it met one that did.
      inside: whether such an iterate lies in the attack's ball: Auto-PGD in L1 comes from larger ones.
      result: what the attack returned.
    """

    margins: Float[np.ndarray, "looks batch"]
    adversarial: Bool[np.ndarray, "looks batch"]
    inside: Bool[np.ndarray, "looks batch"]
    result: skeleton.AttackResult


@dataclasses.dataclass(frozen=True)
class Fall:
    """A raw curve that falls: fewer images break in a larger ball than in a smaller one.

    Attributes:
      small: the size of the smaller ball.
      large: that of the larger one.
      images: how many fewer.
      p_value: of the exact McNemar test.
    """

    small: float
    large: float
    images: int
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether it is beyond chance."""
        return self.p_value < CHANCE


def falls(broken: Mapping[float, Bool[np.ndarray, " images"]]) -> list[Fall]:
    """Every pair of sizes between which the raw curve falls, the clearest first. `broken`: which images break, by size."""
    found = []
    for small, large in itertools.combinations(sorted(broken), 2):
        fewer = int(broken[small].sum()) - int(broken[large].sum())
        if fewer > 0:
            found.append(Fall(small, large, fewer, statistics.mcnemar(broken[small], broken[large]).p_value))
    return sorted(found, key=lambda fall: fall.p_value)


def towards_rival(logits: jax.Array, labels: jax.Array) -> Float[jax.Array, " batch"]:
    """The targeted DLR loss towards the most likely other class, which `apgd_t` goes for first."""
    return losses.targeted_dlr(logits, labels, boundaries.most_likely_rivals(logits, labels, 1)[:, 0])


LOSSES = {**skeleton.LOSSES, "targeted_dlr": towards_rival}


def stochastic(logits: np.ndarray, again: np.ndarray) -> Guard:
    """Whether two passes over the same images, of the same draws where a model declares them, differ."""
    value = float(inputs.difference(logits, again).max())
    fired = value > inputs.SAME
    detail = (
        "two passes over the same images differ: give a model with stochastic=True and sample(images, keys), which attacks "
        "average over, or switch dropout off"
        if fired
        else "two passes over the same images agree"
    )
    return Guard("stochastic", fired, detail, value)


def probabilities(logits: np.ndarray) -> Guard:
    """Whether the outputs are probabilities."""
    fired = inputs.are_probabilities(logits)
    detail = (
        "rows are in [0, 1] and sum to one: attack the logits before the softmax" if fired else "outputs are logits"
    )
    return Guard("probabilities", fired, detail, float(np.abs(logits.sum(axis=1) - 1.0).max()))


def gradients(model, keys, images, labels, right, ball: norms.Norm, radius: Any) -> list[Guard]:
    """A guard for each loss: gradients at the image and at a random point of the ball."""
    guards = []
    near = _neighbour(ball, keys, images, radius, 0)
    for name, loss in LOSSES.items():
        try:
            gone = [np.asarray(_vanished(loss, model, keys, points, labels)) for points in (images, near)]
        except errors.UserError:  # A loss that is not defined for so few classes.
            continue
        share = float(np.logical_or(*gone)[right].mean())
        fired = share > VANISHED
        detail = f"{share:.1%} of the images have a gradient that is zero everywhere or not finite"
        remedy = ": a quantised or saturated model; attack it by another loss, through a smooth stand-in, or by queries"
        guards.append(Guard(f"gradient/{name}", fired, detail + remedy * fired, share))
    return guards


def unstable(model, keys, images, labels, right, ball: norms.Norm, radius: Any, neighbours: int) -> Guard:
    """Whether the margin jumps among random neighbours: the mean over images of its relative change, at most 1 each."""
    reference = np.asarray(_margin(model, keys, images, labels), np.float64)
    change = np.zeros_like(reference)
    for index in range(neighbours):
        near = _neighbour(ball, keys, images, radius, index)
        change += np.abs(np.asarray(_margin(model, keys, near, labels), np.float64) - reference)
    relative = change / neighbours / np.maximum(np.abs(reference), 1e-12)
    value = float(np.minimum(relative, 1.0)[right].mean())
    fired = value > UNSTABLE
    detail = f"among {neighbours} random neighbours in the ball the margin changes by {value:.1%} of itself"
    remedy = ": a shattered loss, along which no gradient leads; average it over neighbours (EOT), or attack by queries"
    return Guard("unstable loss", fired, detail + remedy * fired, value)


def silent(name: str, path: Path, right: np.ndarray) -> Guard:
    """Whether a point on the way was adversarial, in the ball, and the one returned is not."""
    lost = path.adversarial.any(axis=0) & ~np.asarray(path.result.success) & right
    detail = f"{lost.sum()} images were adversarial on the way and are not as returned"
    remedy = ": return the best point met, and judge it in the precision that is attacked"
    return Guard(f"silent success/{name}", bool(lost.any()), detail + remedy * bool(lost.any()), float(lost.mean()))


def converged(name: str, attack: skeleton.Attack, path: Path, right: np.ndarray) -> list[Guard]:
    """Whether the margin of what was not broken has come to rest; none for an attack too short to tell."""
    if attack.evaluations <= LAST:
        return []
    unbroken = right & ~np.asarray(path.result.success)
    reached = np.where(path.inside, attack.goal.direction * path.margins.astype(np.float64), -np.inf)
    rising = np.maximum.accumulate(reached, axis=0)
    span = rising[-1] - rising[0]
    moved = (rising[-1] - rising[-1 - LAST]) / np.where(span > 0, span, 1.0)
    share = float((moved[unbroken] > MOVING).mean()) if unbroken.any() else 0.0
    fired = share > UNFINISHED
    detail = f"the margin of {share:.1%} of the {unbroken.sum()} unbroken images still moved in the last {LAST} steps"
    return [Guard(f"budget/{name}", fired, detail + ": give it more steps, or longer ones" * fired, share)]


def inside(name: str, attack: skeleton.Attack, result: skeleton.AttackResult, ball: norms.Norm, radius: float) -> Guard:
    """Whether an attack returned images outside of its ball or of the box."""
    found = np.asarray(result.images)
    outside = ~((found >= 0) & (found <= 1)).all(axis=(1, 2, 3))
    if not attack.minimal:
        outside |= ~norms.within(result.distance, radius)
    detail = f"{outside.sum()} images were returned outside the {ball.name} ball or outside [0, 1]"
    return Guard(
        f"ball/{name}",
        bool(outside.any()),
        detail + ": its successes do not count" * bool(outside.any()),
        float(outside.mean()),
    )


def rising(name: str, at: Mapping[float, np.ndarray]) -> Guard:
    """Whether fewer images break in a larger ball than in a smaller one, beyond chance. `at`: broken images by size."""
    found = falls(at)
    if not found:
        others = ", ".join(f"{size:g}" for size in sorted(at)[1:])
        return Guard(f"rising accuracy/{name}", False, f"no fewer images break at {others} epsilon than below", 0.0)
    worst = found[0]
    detail = f"{worst.images} fewer images break at {worst.large:g} epsilon than at {worst.small:g} (p = {worst.p_value:.2g})"
    remedy = ": the gradient misleads long steps; read the envelope over sizes, and attack by other means"
    share = worst.images / len(at[worst.small])
    return Guard(f"rising accuracy/{name}", worst.is_significant, detail + remedy * worst.is_significant, share)


def unbounded(broken: np.ndarray) -> Guard:
    """Whether attacks that only the box [0, 1] bounds leave images right."""
    left = float((~broken).mean())
    fired = left > 0
    detail = f"without a bound the white boxes leave {left:.1%} of the images right"
    remedy = ", where they should leave none: they are too weak for this model, or it answers the same everywhere"
    return Guard("unbounded", fired, detail + remedy * fired, left)


def black_box(name: str, black: np.ndarray, white: np.ndarray) -> Guard:
    """Whether an attack that asks for logits alone breaks more than all that use gradients, beyond chance."""
    value = float(black.mean() - white.mean())
    fired = value > WEAKER and statistics.mcnemar(white, black).p_value < CHANCE
    detail = f"{name} breaks {black.mean():.1%} of the images without gradients, the white boxes {white.mean():.1%} with them"
    remedy = ": the gradients mislead; adapt the attack to the defence, or give the black box more queries"
    return Guard(f"black box/{name}", fired, detail + remedy * fired, value)


@jax.jit
def _margin(model: skeleton.Model, keys: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    return losses.margin(evaluation.logits(model, images, keys), labels)


@functools.partial(jax.jit, static_argnums=0)
def _vanished(
    loss: Callable, model: skeleton.Model, keys: jax.Array, images: jax.Array, labels: jax.Array
) -> jax.Array:
    found = evaluation.ascent(loss, model, images, keys, labels)
    # Where the model is wrong already no gradient is needed: of three classes, DLR has none where the true one comes last.
    return found.vanished & (jnp.argmax(found.logits, axis=-1) == labels)


@functools.partial(jax.jit, static_argnums=0)
def _neighbour(ball: norms.Norm, keys: jax.Array, images: jax.Array, radius: jax.Array, index: int) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    return ball.project(images + ball.draw(keys, images, radius), images, radius)
