"""Attacks in a ball by gradients that are estimated from logits alone: NES, SPSA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from robust_vit.attacks import arguments, evaluation, moments, norms, skeleton, threats


def momentum(held: moments.Moments, terms: jax.Array, norm: norms.Norm) -> jax.Array:
    """The steepest step along the running mean of the estimates (Ilyas et al. 2018)."""
    del terms
    return norm.ascend(held.mean)


def adam(held: moments.Moments, terms: jax.Array, norm: norms.Norm) -> jax.Array:
    """Adam's step (Uesato et al. 2018): about one in each pixel, and here about of length one as a whole."""
    direction = held.direction(terms, 1e-8)
    return direction / norm.measure(jnp.ones_like(direction))[:, None, None, None]


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _signs(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.rademacher(key, shape, dtype)


class State(skeleton.State, kw_only=True):
    """Where each example's ascent stands.

    Attributes:
      moments: of the estimated gradients.
    """

    moments: moments.Moments


class EstimatedAscent(skeleton.Climb, kw_only=True):
    """Ascent along finite differences in random directions. `robust_vit.attacks.build("nes", ...)` or `"spsa"` makes one.

    Attributes:
      epsilon: radius of the ball, in pixel units [0, 1].
      step_size: length of a step, in units of epsilon.
      radius: how far from the image the loss is asked: standard deviation of what is added to a pixel.
      directions: `(key, shape, dtype) -> directions`, independent entries of mean 0 and variance 1.
      rule: `(moments, terms in them, norm) -> direction` of about length one in the norm: `momentum` or `adam`.
      samples: antithetic pairs a step.
      steps: at most.
    """

    epsilon: Any
    step_size: Any
    radius: Any
    directions: Callable = flax.struct.field(pytree_node=False, default=_gaussian)
    rule: Callable = flax.struct.field(pytree_node=False, default=momentum)
    samples: int = flax.struct.field(pytree_node=False, default=25)
    steps: int = flax.struct.field(pytree_node=False, default=100)

    @property
    def evaluations(self) -> int:
        """One a step."""
        return self.steps

    @property
    def step_passes(self) -> tuple[int, int]:
        """The image itself and its pairs."""
        return 1 + 2 * self.samples, 0

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """At the clean image. No passes."""
        fields = skeleton.blank(keys, images, labels)
        return State(**fields, moments=moments.zeros(fields["clean"]))

    def step(self, model: skeleton.Model, state: State) -> State:
        """Asks about the image and its neighbours in one batch, and moves. `1 + 2 * samples` forward passes."""
        dtype = state.clean.dtype
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
        shape = (self.samples, *state.clean.shape[1:])
        directions = jax.vmap(lambda key: self.directions(key, shape, dtype), out_axes=1)(keys)
        # What is asked may leave [0, 1] by the radius: clipped, the pairs would not be symmetric and the estimate biased.
        apart = jnp.asarray(self.radius, dtype) * directions
        around = state.images[None]
        logits = evaluation.widened(
            model, jnp.concatenate([around, around + apart, around - apart]), state.keys, state.count
        )
        values = jax.vmap(self.loss, in_axes=(0, None))(logits, state.labels)
        slopes = (values[1 : 1 + self.samples] - values[1 + self.samples :]) / (2 * self.radius)
        estimate = jnp.mean(slopes.astype(dtype)[..., None, None, None] * directions, axis=0)
        is_flat = ~jnp.any(slopes != 0.0, axis=0) | ~jnp.all(jnp.isfinite(slopes), axis=0)
        estimate = skeleton.select(is_flat, jnp.zeros_like(estimate), estimate)

        achieved = self.achieves(logits[0], state.labels)
        updated = state.moments.update(estimate)
        moved = self._move(state, updated)
        stop = self.stop_on_success
        return skeleton.follow(state, moved, achieved, is_flat, stop_on_success=stop, moments=updated)

    def _move(self, state: State, updated: moments.Moments) -> jax.Array:
        epsilon = jnp.asarray(self.epsilon, state.clean.dtype)
        direction = self.rule(updated, state.count + 1, self.norm)
        size = self.goal.direction * epsilon * jnp.asarray(self.step_size, epsilon.dtype)
        return self.norm.project(state.images + size * direction, state.clean, epsilon)


def nes(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    samples: int = 25,
    steps: int = 200,
    radius: float = 0.001,
    step_size: float = 0.2,
    loss: str | Callable = "cross_entropy",
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """Natural evolution strategies: ascent along Gaussian finite differences (Ilyas et al. 2018, arXiv 1804.08598).

    The directions are antithetic, the step is steepest in the norm, along estimates with momentum 0.9, as in the paper's code.
    What is asked may lie outside [0, 1] by the radius; what is returned does not. An example is left alone at its first success,
    unless the model draws.

    Cost: `steps * (1 + 2 * samples)` forward passes at most, one that judges, and no backward pass. A step holds
    `batch * (1 + 2 * samples)` images at a time.

    Args:
      epsilon: radius of the ball, in pixel units [0, 1].
      norm: `linf`, `l2` or `l1`, where a step moves a single value; the maximum norm where neither it nor `threat` is given.
      threat: a threat model or its name (`cifar10/linf-8`), in place of `epsilon` and `norm`.
      samples: antithetic pairs a step.
      steps: at most.
      radius: standard deviation of what is added to a pixel, in pixel units.
      step_size: in units of epsilon (the paper: 0.01 at epsilon 0.05).
      loss: `cross_entropy`, `margin`, or a named function `(logits, labels) -> [batch]`.
      goal: `untargeted`, or `targeted`: the labels given to the attack are the classes to reach.
    """
    return _build(
        arguments.ball(epsilon, norm, threat),
        loss,
        goal,
        directions=_gaussian,
        rule=momentum,
        samples=samples,
        steps=steps,
        radius=radius,
        step_size=step_size,
    )


def spsa(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    samples: int = 64,
    steps: int = 100,
    radius: float = 0.01,
    step_size: float = 0.2,
    loss: str | Callable = "margin",
    goal: str | skeleton.Goal = "untargeted",
) -> skeleton.Attack:
    """Simultaneous perturbation: finite differences along random signs, Adam steps (Uesato et al. 2018, arXiv 1802.05666).

    Arguments and cost as in `nes`. The paper takes Adam with steps of 0.01, 100 of them, `radius` 0.01, and a batch of 128 (64
    pairs) up to 8,192 queries a step for the strongest numbers.
    """
    return _build(
        arguments.ball(epsilon, norm, threat),
        loss,
        goal,
        directions=_signs,
        rule=adam,
        samples=samples,
        steps=steps,
        radius=radius,
        step_size=step_size,
    )


def _build(
    ball: tuple[Any, norms.Norm],
    loss: str | Callable,
    goal: str | skeleton.Goal,
    *,
    directions: Callable,
    rule: Callable,
    samples: int,
    steps: int,
    radius: float,
    step_size: float,
) -> EstimatedAscent:
    arguments.counts(samples=samples, steps=steps)
    arguments.positive(radius=radius, step_size=step_size)
    return EstimatedAscent(
        epsilon=ball[0],
        step_size=arguments.number(step_size),
        radius=arguments.number(radius),
        norm=ball[1],
        loss=arguments.find("loss", loss, skeleton.LOSSES),
        goal=arguments.find("goal", goal, skeleton.GOALS),
        directions=directions,
        rule=rule,
        samples=samples,
        steps=steps,
    )
