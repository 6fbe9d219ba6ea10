"""Universal perturbations: one small change that fools a model on most images."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from robust_vit import errors, losses
from robust_vit.attacks import arguments, evaluation, fitting, norms, skeleton, threats


class Universal(flax.struct.PyTreeNode, kw_only=True):
    """A perturbation of every image; `fit` and `fit_greedy` learn one.

    Attributes:
      perturbation: in pixel units.
    """

    perturbation: Float[Array, "height width channels"]

    def apply(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """The images with the perturbation, in [0, 1]. No passes of a model."""
        return jnp.clip(images + self.perturbation[None], 0.0, 1.0)


def fit(
    model: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    key: Key[Array, ""],
    *,
    epsilon: float | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    target: int | None = None,
    steps: int = 500,
    relative_step: float = 0.1,
    most: float = 9.0,
) -> Universal:
    """Learns a universal perturbation by ascent of the mean loss of batches (Shafahi et al. 2020, arXiv 1811.11304, algorithm 2).

    The cross-entropy of an image counts up to `most` only, so that images that are fooled already do not rule the mean. Each step
    goes along the steepest direction of the norm and back into the ball. Departure: the step shrinks along half a cosine, since
    one of constant length never settles.

    Args:
      model: canonical pixels to logits; a stochastic one too.
      batches: `image` `[n, height, width, channels]` in [0, 1] and `label` `[n]`, `mask` where there is padding; gone through
        again where there are fewer than steps, so a list and not a generator.
      key: the draws of a stochastic model; nothing else is random.
      epsilon: radius, in pixel units [0, 1].
      norm: `linf` or `l2`.
      threat: a threat model or its name, in place of `epsilon` and `norm`.
      target: the class to reach; None to leave the true one.
      steps: one batch, one forward and backward pass each.
      relative_step: length of the first step in units of epsilon.
      most: nats that the loss of one image can add; of a targeted perturbation there is no such bound.
    """
    epsilon, norm = arguments.ball(epsilon, norm, threat)
    arguments.counts(steps=steps)
    arguments.positive(relative_step=relative_step, most=most)
    stream = fitting.Batches(batches, (model,))
    goal = stream.goal(target)
    found = Universal(perturbation=jnp.zeros(stream.image_shape, jnp.float32))
    for step, batch in stream.take(steps, target):
        size = epsilon * relative_step * 0.5 * (1 + np.cos(np.pi * step / steps))
        numbers = {"epsilon": epsilon, "size": arguments.number(size), "most": arguments.number(most)}
        found = _step(found, model, jax.random.fold_in(key, step), batch, numbers, norm, goal)
    return found


def fit_greedy(
    model: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    key: Key[Array, ""],
    *,
    attack: skeleton.Attack,
    epsilon: float | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    rate: float = 0.8,
    passes: int = 5,
) -> Universal:
    """Learns a universal perturbation image by image (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401, algorithm 1).

    Each image that the perturbation does not fool yet is sent over the boundary by the least change that a minimal attack finds,
    and the sum is projected into the ball; until the share of fooled images is `rate`. Fooled means another class than without
    the perturbation, whatever the true one. Departure: images with the perturbation are clipped to [0, 1].

    Args:
      model: canonical pixels to logits.
      batches: as in `fit`; labels are not used.
      key: of the attack's draws.
      attack: a minimal attack, `robust_vit.attacks.build("deep_fool", norm="l2")` in the original.
      epsilon: radius, in pixel units [0, 1].
      norm: `linf` or `l2`.
      threat: a threat model or its name, in place of `epsilon` and `norm`.
      rate: share of fooled images at which to stop, their 1 - delta.
      passes: over the images at most; each image that is not fooled takes the attack's passes, one image at a time.
    """
    epsilon, norm = arguments.ball(epsilon, norm, threat)
    arguments.counts(passes=passes)
    if not getattr(attack, "minimal", False):
        raise errors.UserError(
            f"{type(attack).__name__} is no minimal attack: give one that looks for the least change, such as "
            'robust_vit.attacks.build("deep_fool", norm="l2").'
        )
    stream = fitting.Batches(batches, (model,))
    batches = [batches] if isinstance(batches, Mapping) else batches
    found = Universal(perturbation=jnp.zeros(stream.image_shape, jnp.float32))
    for lap in range(passes):
        for number, batch in enumerate(batches):
            kept = np.asarray(batch["mask"], bool) if "mask" in batch else np.ones(len(batch["label"]), bool)
            for position in np.flatnonzero(kept):
                image = jnp.asarray(batch["image"][position : position + 1], jnp.float32)
                clean, fooled = _fooled(model, found, image, jax.random.split(key, 1))
                if not fooled[0]:
                    draws = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, lap), number), kept.size)
                    moved = found.apply(image)
                    nearest = attack(model, draws[position : position + 1], moved, clean)
                    found = _add(found, nearest.images - moved, epsilon, norm)
        if np.mean(np.concatenate(list(_verdicts(model, found, batches, key)))) >= rate:
            break
    return found


def fooled(
    model: Any, found: Universal, batches: Iterable[Mapping[str, np.ndarray]], key: Key[Array, ""]
) -> Bool[np.ndarray, " examples"]:
    """Whether each image, padding left out, gets another class with the perturbation than without. Two forward passes.

    Its mean over images that were not learned from is the fooling rate of Moosavi-Dezfooli et al. 2017, which no label enters.

    Args:
      model: canonical pixels to logits.
      found: the perturbation.
      batches: as in `fit`.
      key: the draws of a stochastic model.
    """
    return np.concatenate(list(_verdicts(model, found, [batches] if isinstance(batches, Mapping) else batches, key)))


def _verdicts(model, found, batches, key):
    for batch in batches:
        images = jnp.asarray(batch["image"], jnp.float32)
        mask = np.asarray(batch["mask"], bool) if "mask" in batch else np.ones(len(images), bool)
        yield np.asarray(_fooled(model, found, images, jax.random.split(key, len(images)))[1])[mask]


@jax.jit
def _fooled(model: Any, found: Universal, images: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The classes of clean images, and whether the perturbation changes them."""
    clean = jnp.argmax(evaluation.logits(model, images, keys), axis=-1).astype(jnp.int32)
    return clean, clean != jnp.argmax(evaluation.logits(model, found.apply(images), keys), axis=-1)


@functools.partial(jax.jit, static_argnames=("norm", "goal"))
def _step(
    found: Universal,
    model: Any,
    key: jax.Array,
    batch: fitting.Batch,
    numbers: dict,
    norm: norms.Norm,
    goal: skeleton.Goal,
) -> Universal:
    def objective(logits: jax.Array, labels: jax.Array) -> jax.Array:
        loss = losses.cross_entropy(logits, labels)
        return jnp.minimum(loss, numbers["most"]) if goal is skeleton.UNTARGETED else loss

    images = found.apply(batch.images)
    keys = jax.random.split(key, len(images))
    gradients = evaluation.ascent(objective, model, images, keys, batch.labels).gradients
    mean = jnp.sum(batch.weights[:, None, None, None] * gradients, axis=0)[None]
    return _add(found, goal.direction * numbers["size"] * norm.ascend(mean), numbers["epsilon"], norm)


@functools.partial(jax.jit, static_argnames="norm")
def _add(found: Universal, move: jax.Array, epsilon: jax.Array, norm: norms.Norm) -> Universal:
    """The perturbation plus a move, back in the ball."""
    # A ball around mid-grey stays inside [0, 1], to which a norm projects too, when both are made half as large.
    moved = 0.5 * (found.perturbation[None] + move)
    return Universal(perturbation=2.0 * (norm.project(0.5 + moved, jnp.full_like(moved, 0.5), 0.5 * epsilon) - 0.5)[0])
