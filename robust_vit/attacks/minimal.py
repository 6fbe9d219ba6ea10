"""What minimal attacks share: they seek the nearest success at any distance, and keep it."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from robust_vit import errors, losses
from robust_vit.attacks import arguments, evaluation, norms, skeleton, threats

# The nearest success lies on the boundary, where other rounding or a wider type may undo it: it is tried at so many times its
# distance, and the first that holds by more than rounding is returned.
_STRETCHES = (1.0, 1.0003, 1.003, 1.03)
_ROUNDING = 64  # In units of the last place of the largest logit.


class State(skeleton.State, kw_only=True):
    """Where each example's minimal attack stands.

    Attributes:
      nearest: distance of `best` from the clean image; infinite before the first success.
    """

    nearest: Float[Array, " batch"]


class MinimalAttack(skeleton.Attack, kw_only=True):
    """The base of minimal attacks: `best` is the nearest success met, at any distance.

    An image that reaches the goal as it is stays as it is, at distance 0, after one step. On a model that draws, the nearest
    success met is the luckiest draw's, and may be none in the draws that judge: seek in a ball there.

    Attributes:
      epsilon: an example is done as soon as a success at most this far away is met, which saves passes where only the accuracy
        at this size is asked for. None seeks on to the end.
      end_early: False seeks on in spite of epsilon.
    """

    epsilon: Any = None
    end_early: bool = flax.struct.field(pytree_node=False, default=True)

    minimal: ClassVar[bool] = True

    @property
    def judge_passes(self) -> int:
        """Forward passes that judging takes, those that try the nearest success included."""
        return len(_STRETCHES)

    def answer(self, model: skeleton.Model, state: State) -> jax.Array:
        """The nearest success, at the first of a few stretches of its distance that the model takes as one; else the images.

        No stretch takes a success within epsilon out of it.
        """
        last = skeleton.select(state.success, state.best, state.images)
        tried = [last, *(self._stretched(last, state.clean, stretch) for stretch in _STRETCHES[1:])]
        times = len(tried) - 1  # The last one is judged by `finish`.
        keys, labels, counts = (jnp.concatenate([array] * times) for array in (state.keys, state.labels, state.count))
        logits = evaluation.logits(model, jnp.concatenate(tried[:-1]), keys, counts)
        margins = self.goal.direction * losses.margin(logits, labels)
        achieved = margins > _ROUNDING * jnp.finfo(margins.dtype).eps * jnp.max(jnp.abs(logits), axis=-1)
        found = tried[-1]
        for images, holds in reversed(list(zip(tried, jnp.split(achieved, times), strict=False))):
            found = skeleton.select(holds, images, found)
        return skeleton.select(state.success, found, last)

    def _stretched(self, last: jax.Array, clean: jax.Array, stretch: float) -> jax.Array:
        difference = last - clean
        times = jnp.full(len(last), stretch, last.dtype)
        if self.epsilon is not None:
            epsilon, distance = jnp.asarray(self.epsilon, last.dtype), self.norm.measure(difference)
            room = epsilon / jnp.maximum(distance, jnp.finfo(distance.dtype).tiny)
            times = jnp.where(distance <= norms.edge(epsilon), jnp.clip(room, 1.0, times), times)
        stretched = jnp.clip(clean + times[:, None, None, None] * difference, 0.0, 1.0)
        return skeleton.select(times == 1, last, stretched)  # The difference is rounded: once is not the same image.

    def record(self, state: State, images: jax.Array, achieved: Bool[Array, " batch"]) -> State:
        """The state with those of `images` that achieve the goal nearer to the clean image than any before. No passes."""
        distance = self.norm.measure(images - state.clean)
        nearer = achieved & (distance < state.nearest)
        nearest = jnp.where(nearer, distance, state.nearest)
        ends = self.end_early and self.epsilon is not None
        enough = jnp.asarray(self.epsilon if ends else 0.0, nearest.dtype)
        return state.replace(
            done=state.done | (nearest <= enough),
            success=state.success | achieved,
            best=skeleton.select(nearer, images, state.best),
            nearest=nearest,
        )


def blank(keys: jax.Array, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The fields of `State` before any evaluation, for an attack's `init`."""
    start = skeleton.blank(keys, images, labels)
    return {**start, "nearest": jnp.full(len(start["images"]), jnp.inf, start["images"].dtype)}


def slope(norm: norms.Norm, gradients: Float[Array, "batch height width channels"]) -> Float[Array, " batch"]:
    """How fast a linear function can grow along a step of the norm: the dual norm of its gradient."""
    return jnp.sum(gradients * norm.ascend(gradients), axis=tuple(range(1, gradients.ndim)))


def ball(
    attack: str,
    epsilon: float | jax.Array | None,
    norm: str | norms.Norm | None,
    threat: str | threats.ThreatModel | None,
    known: tuple[str, ...],
) -> tuple[Any, norms.Norm]:
    """The size within which an example is done, or None, and the norm that is minimised.

    Args:
      attack: its name, for errors.
      epsilon: size in pixel units, or None.
      norm: its norm or the norm's name; the first of `known` where neither it nor `threat` is given.
      threat: a threat model or its name, in place of both.
      known: names of the norms that the attack minimises.

    Raises:
      errors.UserError: the size is none, or the attack does not minimise the norm.
    """
    if norm is None and threat is None:
        norm = known[0]
    if epsilon is None and threat is None:
        norm = norms.find(norm)
    else:
        epsilon, norm = arguments.ball(epsilon, norm, threat)
    if norm.name not in known:
        raise errors.UserError(
            f"{attack} got the norm {norm.name}: it minimises {' or '.join(known)}; fab and fmn minimise linf, l2 and l1."
        )
    return epsilon, norm
