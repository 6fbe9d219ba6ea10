"""Attacks that are made up for the tests of studies: one that seeks the nearest success, one that has no size at all."""

from __future__ import annotations

from typing import ClassVar

import flax.struct
import jax.numpy as jnp

from robust_vit import losses
from robust_vit.attacks import evaluation, norms, skeleton


class Nearest(skeleton.Attack, kw_only=True):
    """Newton's method on the margin along the steepest direction: of a linear model of two classes, the nearest boundary."""

    minimal: ClassVar[bool] = True
    steps: int = flax.struct.field(pytree_node=False, default=3)

    @property
    def evaluations(self):
        return self.steps + 1

    def step(self, model, state):
        found = evaluation.ascent(losses.margin, model, state.images, state.keys, state.labels)
        achieved = self.achieves(found.logits, state.labels)
        directions = self.norm.ascend(found.gradients)
        slopes = jnp.sum(found.gradients * directions, axis=(1, 2, 3))
        # A little further than the boundary, where float32 still tells the two classes apart.
        lengths = 1.0005 * jnp.maximum(-found.values, 0.0) / jnp.maximum(slopes, 1e-9) + 2e-6
        moved = jnp.clip(state.images + lengths[:, None, None, None] * directions, 0.0, 1.0)
        return state.replace(
            images=skeleton.select(achieved, state.images, moved),
            done=state.done | achieved,
            success=state.success | achieved,
            best=skeleton.select(achieved, state.images, state.best),
        )


class Sizeless(Nearest, kw_only=True):
    """An attack that has neither a ball nor a distance."""

    minimal: ClassVar[bool] = False


def nearest(*, norm="linf", steps=3):
    return Nearest(norm=norms.find(norm), steps=steps)


def sizeless(*, norm="linf"):
    return Sizeless(norm=norms.find(norm))
