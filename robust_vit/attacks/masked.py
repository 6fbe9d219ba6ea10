"""Attacks on a part of the image: Adam on the pixels under a mask, which is fixed when an example's attack begins."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from robust_vit.attacks import arguments, moments, norms, skeleton, threats

_TINY = 1e-8


class State(skeleton.State, kw_only=True):
    """Where each example's attack stands.

    Attributes:
      mask: the pixels that may change.
      moments: Adam's, of the directions so far.
    """

    mask: Bool[Array, "batch height width 1"]
    moments: moments.Moments


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
        clean = common["clean"]
        return State(**common, mask=jnp.zeros((*clean.shape[:3], 1), bool), moments=moments.zeros(clean))

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
        updated = state.moments.update(directions)
        moved = skeleton.select(begins, self._start(state), state.images + self._moves(state, updated))
        moved = self.norm.project(jnp.where(fixed["mask"], moved, state.clean), state.clean, self._epsilon(state))
        fields = {**fixed, "moments": updated}
        return skeleton.follow(state, moved, achieved, found.vanished, stop_on_success=self.stop_on_success, **fields)

    def _epsilon(self, state: State) -> jax.Array:
        return jnp.asarray(self.epsilon, state.clean.dtype)

    def _start(self, state: State) -> jax.Array:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(state.keys)
        return state.clean + self.norm.draw(keys, state.clean, self._epsilon(state))

    def _moves(self, state: State, updated: moments.Moments) -> jax.Array:
        dtype = state.clean.dtype
        taken = jnp.maximum(state.count, 1)
        rate = self.learning_rate * self.decay ** ((taken - 1) // self.decay_every).astype(dtype)
        return rate.astype(dtype)[:, None, None, None] * updated.direction(taken, _TINY)


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
