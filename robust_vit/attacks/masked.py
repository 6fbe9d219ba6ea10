"""Attacks on a part of the image: Adam on the pixels under a mask, which is fixed when an example's attack begins."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from robust_vit.attacks import arguments, norms, skeleton, threats

_MOMENTS = (0.9, 0.999)
_TINY = 1e-8


class State(skeleton.State, kw_only=True):
    """Where each example's attack stands.

    Attributes:
      mask: the pixels that may change.
      first: Adam's mean of gradients.
      second: its mean of their squares.
    """

    mask: Bool[Array, "batch height width 1"]
    first: Float[Array, "batch height width channels"]
    second: Float[Array, "batch height width channels"]


class Look(NamedTuple):
    """What an attack found at the current images.

    Attributes:
      directions: which way the images should go; scaled by Adam.
      logits: of the images.
      vanished: the gradient of the loss is zero everywhere or not finite.
      fixed: fields of the state that are set for good where these are the clean images: `mask` at least.
    """

    directions: Float[Array, "batch height width channels"]
    logits: Float[Array, "batch classes"]
    vanished: Bool[Array, " batch"]
    fixed: dict[str, jax.Array]


class MaskedAscent(skeleton.Climb, kw_only=True):
    """Adam from a random start under a mask, in a ball. A subclass defines `look`.

    The first evaluation is of the clean image; a success there ends the attack of an untouched image.

    Attributes:
      epsilon: radius of the ball, in pixel units; 1 in the maximum norm leaves only the mask as a bound.
      learning_rate: of Adam, in pixel units.
      decay: factor of the rate every `decay_every` steps.
      decay_every: static.
      steps: of Adam.
    """

    epsilon: Any
    learning_rate: Any
    decay: Any
    decay_every: int = flax.struct.field(pytree_node=False, default=10)
    steps: int = flax.struct.field(pytree_node=False, default=250)

    @property
    def evaluations(self) -> int:
        """The clean image, and the images before each step."""
        return self.steps + 1

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The state before any evaluation. No passes."""
        common = skeleton.blank(keys, images, labels)
        zeros = jnp.zeros_like(common["clean"])
        return State(**common, mask=jnp.zeros((*zeros.shape[:3], 1), bool), first=zeros, second=zeros)

    def look(self, model: skeleton.Model, state: State) -> Look:
        """What the model says of the current images; its passes are those of a step."""
        raise TypeError(f"{type(self).__name__} does not define look")

    def step(self, model: skeleton.Model, state: State) -> State:
        """Evaluates the current images and moves them; of the clean ones it makes the start."""
        found = self.look(model, state)
        begins = state.count == 0
        fixed = {name: skeleton.select(begins, new, getattr(state, name)) for name, new in found.fixed.items()}
        achieved = self.achieves(found.logits, state.labels)
        directions = jnp.where(fixed["mask"] & ~begins[:, None, None, None], found.directions, 0.0)
        first = _MOMENTS[0] * state.first + (1 - _MOMENTS[0]) * directions
        second = _MOMENTS[1] * state.second + (1 - _MOMENTS[1]) * jnp.square(directions)
        moved = skeleton.select(begins, self._start(state), state.images + self._moves(state, first, second))
        moved = self.norm.project(jnp.where(fixed["mask"], moved, state.clean), state.clean, self._epsilon(state))
        fields = {**fixed, "first": first, "second": second}
        return skeleton.follow(state, moved, achieved, found.vanished, stop_on_success=self.stop_on_success, **fields)

    def _epsilon(self, state: State) -> jax.Array:
        return jnp.asarray(self.epsilon, state.clean.dtype)

    def _start(self, state: State) -> jax.Array:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(state.keys)
        return state.clean + self.norm.draw(keys, state.clean, self._epsilon(state))

    def _moves(self, state: State, first: jax.Array, second: jax.Array) -> jax.Array:
        taken = jnp.maximum(state.count, 1).astype(first.dtype)
        rate = self.learning_rate * self.decay ** ((taken - 1) // self.decay_every)
        first_share, second_share = (1 - jnp.power(jnp.asarray(m, first.dtype), taken) for m in _MOMENTS)
        scaled = (first / first_share[:, None, None, None]) / (
            jnp.sqrt(second / second_share[:, None, None, None]) + _TINY
        )
        return rate.astype(first.dtype)[:, None, None, None] * scaled


def settings(
    *,
    epsilon: float | jax.Array | None,
    norm: str | norms.Norm | None,
    threat: str | threats.ThreatModel | None,
    learning_rate: float,
    decay: float,
    decay_every: int,
    steps: int,
    loss: Any,
    goal: Any,
    stop_on_success: bool,
) -> dict[str, Any]:
    """The checked fields that all attacks under a mask share; without a ball, the mask alone is the bound."""
    if epsilon is None and norm is None and threat is None:
        epsilon = 1.0
    epsilon, norm = arguments.ball(epsilon, norm, threat)
    arguments.counts(steps=steps, decay_every=decay_every)
    arguments.positive(learning_rate=learning_rate, decay=decay)
    return {
        "epsilon": epsilon,
        "norm": norm,
        "learning_rate": arguments.number(learning_rate),
        "decay": arguments.number(decay),
        "decay_every": decay_every,
        "steps": steps,
        "loss": arguments.find("loss", loss, skeleton.LOSSES),
        "goal": arguments.find("goal", goal, skeleton.GOALS),
        "stop_on_success": bool(stop_on_success),
    }
