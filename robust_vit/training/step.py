"""The training step: one compiled function of state, batch and key, with its state donated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from robust_vit import loops, trees
from robust_vit.training import state as train_state

PyTree = Any
# What the step adds to the metrics of the objective.
STEP_METRICS = ("gradient_norm",)


class Objective(Protocol):
    """What training minimises. Hashable: it is part of the compiled program's key.

    Attributes:
      metrics: names of the per-step metrics, `loss` among them.
    """

    metrics: tuple[str, ...]

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        """The mean loss, and beside it the new model state and the metrics (scalars, means over the batch)."""


@dataclasses.dataclass(frozen=True)
class _AddPart:
    """Adds the gradient and the metrics of one part of a batch."""

    objective: Objective

    def __call__(self, carry: tuple, index: jax.Array, params: PyTree, chunks: PyTree, key: jax.Array) -> tuple:
        gradients, model_state, metrics = carry
        chunk = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), chunks)
        differentiate = jax.value_and_grad(self.objective, has_aux=True)
        (_, (model_state, more)), grown = differentiate(params, model_state, chunk, jax.random.fold_in(key, index))
        return trees.add(gradients, grown), model_state, trees.add(metrics, more)


def build(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    gradient_function: bool = False,
    accumulate: int = 1,
    average_decay: float | None = None,
) -> Callable[[train_state.TrainState, PyTree, jax.Array], train_state.TrainState]:
    """An uncompiled step `(state, batch, key) -> state`; `compile_step` makes it the one program of the loop.

    Args:
      objective: the loss.
      optimizer: the Optax transformation.
      gradient_function: hand the optimiser a gradient function (SAM).
      accumulate: the batch is cut into this many equal parts whose gradients are averaged: less memory, same mean.
        BatchNorm sees one part at a time, every `accumulate`-th row of the batch.
      average_decay: decay of the moving average of the parameters, warmed up as (1 + step) / (10 + step); None keeps none.

    Cost: one forward and one backward pass of the batch; twice that for SAM.
    """

    def gradient(params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array):
        if accumulate == 1:
            (_, aux), gradients = jax.value_and_grad(objective, has_aux=True)(params, model_state, batch, key)
            return gradients, aux

        # Every `accumulate`-th row, whatever the number of devices: each of them has rows of every part, and sends none.
        chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch)
        start = (trees.zeros_like(params), model_state, {name: jnp.float32(0.0) for name in objective.metrics})
        summed = loops.repeat(_AddPart(objective), start, accumulate, params, chunks, key)
        gradients, model_state, metrics = summed
        share = 1.0 / accumulate
        return trees.scale(share, gradients), (model_state, trees.scale(share, metrics))

    def step(state: train_state.TrainState, batch: PyTree, key: jax.Array) -> train_state.TrainState:
        key = jax.random.fold_in(key, state.step)
        gradients, (model_state, metrics) = gradient(state.params, state.model_state, batch, key)
        metrics = {**metrics, "gradient_norm": trees.norm(gradients)}
        extra = {}
        if gradient_function:
            extra["grad_fn"] = lambda params, _: gradient(params, state.model_state, batch, key)[0]
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average_decay is not None:
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(average_decay, (1.0 + count) / (10.0 + count))
            average = optax.incremental_update(params, average, 1.0 - decay)
        bad = {
            name: jnp.minimum(
                state.first_bad_step[name], jnp.where(jnp.isfinite(metrics[name]), train_state.NEVER, state.step + 1)
            )
            for name in metrics
        }
        sums = {name: state.sums[name] + metrics[name] for name in metrics}
        return train_state.TrainState(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            optimizer_state=optimizer_state,
            average=average,
            window=state.window + 1,
            sums=sums,
            first_bad_step=bad,
        )

    return step


def compile_step(
    step: Callable, *, replicas: int | None = None, state_sharding: Any = None, batch_sharding: Any = None
) -> Callable:
    """One jitted step with donated state.

    Args:
      step: what `build` returned.
      replicas: train this many seeds at once: state (but for its counters) and keys have a leading axis, the batch is shared.
      state_sharding: where the state lives, one sharding or a tree of them; None leaves it to JAX.
      batch_sharding: where the batch lives.
    """
    if replicas is not None:
        axes = train_state.TrainState(*(0,) * len(train_state.TrainState._fields))._replace(step=None, window=None)
        step = jax.vmap(step, in_axes=(axes, None, 0), out_axes=axes)
    shardings = {}
    if state_sharding is not None:
        shardings = {"in_shardings": (state_sharding, batch_sharding, None), "out_shardings": state_sharding}
    return jax.jit(step, donate_argnums=0, **shardings)
