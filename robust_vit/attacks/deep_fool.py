"""DeepFool: step by step to the nearest of the decision boundaries, each made linear."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import losses
from robust_vit.attacks import arguments, boundaries, minimal, norms, skeleton, threats

_PAST_A_TIE = 1e-6  # Added to each step, in pixel units: logits that are equal end no search.


class State(minimal.State, kw_only=True):
    """Where each example's search stands.

    Attributes:
      total: the sum of the steps, without overshoot and box.
    """

    total: Float[Array, "batch height width channels"]


class DeepFool(minimal.MinimalAttack, kw_only=True):
    """Steps to the nearest linear boundary until it is crossed. `robust_vit.attacks.build("deep_fool", ...)` makes one.

    Attributes:
      overshoot: share by which the sum of the steps is exceeded.
      candidates: classes whose boundaries are looked at, the label among them: the most likely ones.
      steps: at most.
    """

    overshoot: Any
    candidates: int = flax.struct.field(pytree_node=False, default=10)
    steps: int = flax.struct.field(pytree_node=False, default=50)

    @property
    def evaluations(self) -> int:
        """Steps of one example at most, the evaluation of the last one's end included."""
        return self.steps + 1

    @property
    def step_passes(self) -> tuple[int, int]:
        """One backward pass for each boundary; a model with fewer classes than `candidates` takes fewer than are counted."""
        return 1, self.candidates - 1

    def init(self, keys: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        """The clean image. No passes."""
        start = minimal.blank(keys, images, labels)
        return State(**start, total=jnp.zeros_like(start["images"]))

    def step(self, model: skeleton.Model, state: State) -> State:
        """Evaluates the images, and moves those that are not over the boundary to the nearest one."""

        def choose(logits):
            return boundaries.most_likely_rivals(logits, state.labels, self.candidates - 1)

        found = boundaries.linearise(model, state.images, state.keys, state.labels, choose, state.count)
        achieved = self.achieves(found.logits, state.labels)
        _, normal, distance = boundaries.nearest(self.norm, found)
        step = (distance + _PAST_A_TIE).astype(normal.dtype)[:, None, None, None] * self.norm.ascend(normal)
        total = state.total + step
        images = jnp.clip(state.clean + (1.0 + jnp.asarray(self.overshoot, total.dtype)) * total, 0.0, 1.0)
        recorded = self.record(state, state.images, achieved)
        return recorded.replace(
            images=images, total=total, done=recorded.done | achieved, vanished=state.vanished + found.vanished
        )


def deep_fool(
    *,
    epsilon: float | jax.Array | None = None,
    norm: str | norms.Norm | None = None,
    threat: str | threats.ThreatModel | None = None,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
) -> skeleton.Attack:
    """DeepFool, L2 or L-infinity (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599, algorithm 2 and equations 11 and 12).

    Untargeted. Departures from the authors' code: the most likely classes are those at the current image, not at the clean
    one, images are clipped to [0, 1], and no 1e-4 is added to each step's length, which in L-infinity is a fortieth of a level.
    Cost: `steps + 1` forward passes and `candidates - 1` times as many backward passes at most, and one forward pass that judges.

    Args:
      epsilon: has no bearing on the search, which ends at its first success.
      norm: `l2` or `linf`.
      threat: a threat model or its name, of which the norm is taken.
      steps: at most.
      overshoot: share by which the sum of the steps is exceeded, above 0.
      candidates: classes whose boundaries are looked at, the label among them: the most likely ones; at least 2.
    """
    epsilon, norm = minimal.ball("deep_fool", epsilon, norm, threat, ("l2", "linf"))
    arguments.counts(steps=steps)
    arguments.counts(least=2, candidates=candidates)
    arguments.positive(overshoot=overshoot)
    return DeepFool(
        epsilon=epsilon,
        norm=norm,
        loss=losses.margin,
        overshoot=arguments.number(overshoot),
        candidates=candidates,
        steps=steps,
    )
