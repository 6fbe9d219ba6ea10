"""Attacks in a ball by gradients that are estimated from logits alone: NES, SPSA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit.attacks import arguments, evaluation, norms, skeleton, threats


@dataclasses.dataclass(frozen=True)
class Rule:
    """How estimates become a step.

    Attributes:
      name: of the rule.
      first: share that the running mean of the estimates keeps in a step.
      second: share that the running mean of their squares keeps; 0 where the rule does not use it.
      move: `(mean, mean of squares, norm) -> direction`, of about length one in the norm.
    """

    name: str
    first: float
    second: float
    move: Callable


def _steepest(mean: jax.Array, squares: jax.Array, norm: norms.Norm) -> jax.Array:
    return norm.ascend(mean)


def _adam(mean: jax.Array, squares: jax.Array, norm: norms.Norm) -> jax.Array:
    # Its steps are of about one in each pixel; where all of them are, the whole is to be of length one.
    return mean / (jnp.sqrt(squares) + 1e-8) / norm.measure(jnp.ones_like(mean))[:, None, None, None]


# Ilyas et al. 2018: signs of a gradient with momentum 0.9. Uesato et al. 2018: Adam (Kingma & Ba 2015, arXiv 1412.6980).
MOMENTUM = Rule("momentum", 0.9, 0.0, _steepest)
ADAM = Rule("adam", 0.9, 0.999, _adam)


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _signs(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.rademacher(key, shape, dtype)


class State(skeleton.State, kw_only=True):
    """Where each example's ascent stands.

    Attributes:
      mean: running mean of the estimated gradients, starting at zero.
      squares: of their squares.
    """

    mean: Float[Array, "batch height width channels"]
    squares: Float[Array, "batch height width channels"]


class EstimatedAscent(skeleton.Attack, kw_only=True):
    """Ascent along finite differences in random directions. `robust_vit.attacks.build("nes", ...)` or `"spsa"` makes one.

    Attributes:
      epsilon: radius of the ball, in pixel units [0, 1].
      step_size: length of a step, in units of epsilon.
      radius: how far from the image the loss is asked: standard deviation of what is added to a pixel.
      directions: `(key, shape, dtype) -> directions`, independent entries of mean 0 and variance 1.
      rule: how estimates become a step.
      samples: antithetic pairs a step.
      steps: at most.
    """

    epsilon: Any
    step_size: Any
    radius: Any
    directions: Callable = flax.struct.field(pytree_node=False, default=_gaussian)
    rule: Rule = flax.struct.field(pytree_node=False, default=MOMENTUM)
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
        zeros = jnp.zeros_like(fields["clean"])
        return State(**fields, mean=zeros, squares=zeros)

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
        mean = self.rule.first * state.mean + (1 - self.rule.first) * estimate
        squares = self.rule.second * state.squares + (1 - self.rule.second) * estimate**2
        return state.replace(
            images=skeleton.select(achieved, state.images, self._move(state, mean, squares)),
            done=state.done | achieved,
            success=state.success | achieved,
            best=skeleton.select(achieved & ~state.success, state.images, state.best),
            vanished=state.vanished + is_flat,
            mean=mean,
            squares=squares,
        )

    def _move(self, state: State, mean: jax.Array, squares: jax.Array) -> jax.Array:
        epsilon = jnp.asarray(self.epsilon, mean.dtype)
        # Running means that started at zero are too small at first.
        taken = (state.count + 1).astype(mean.dtype)[:, None, None, None]
        direction = self.rule.move(
            mean / (1 - self.rule.first**taken), squares / (1 - self.rule.second**taken), self.norm
        )
        size = self.goal.direction * epsilon * jnp.asarray(self.step_size, mean.dtype)
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
    What is asked may lie outside [0, 1] by the radius; what is returned does not. An example is left alone at its first success.

    Cost: `steps * (1 + 2 * samples)` forward passes at most, one that judges, and no backward pass. A step holds
    `batch * (1 + 2 * samples)` images at a time.

    Args:
      epsilon: radius of the ball, in pixel units [0, 1].
      norm: `linf` or `l2`; the maximum norm where neither it nor `threat` is given.
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
        rule=MOMENTUM,
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
        rule=ADAM,
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
    rule: Rule,
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
