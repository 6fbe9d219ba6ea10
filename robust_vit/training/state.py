"""The train state: everything that training needs to go on, as one pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from robust_vit import trees

PyTree = Any


class TrainState(NamedTuple):
    """What a checkpoint holds. With `replicas=n` every leaf but `step` and `window` has a leading axis of n.

    Attributes:
      step: int32 scalar, steps taken.
      params: the trainable parameters, float32.
      model_state: the other variable collections (`batch_stats`); `{}` where there are none.
      optimizer_state: of the Optax transformation.
      average: exponential moving average of `params`; None where it is off.
      window: int32 scalar, steps since the last log line.
      sums: sums of each metric over these, so that a run cut anywhere logs the same numbers.
      first_bad_step: for each metric, the first step at which it was not finite; a large number where it always was.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    optimizer_state: PyTree
    average: PyTree | None
    window: jax.Array
    sums: dict[str, jax.Array]
    first_bad_step: dict[str, jax.Array]


NEVER = jnp.iinfo(jnp.int32).max


def create(
    variables: PyTree, optimizer: optax.GradientTransformation, *, metrics: tuple[str, ...], average: bool
) -> TrainState:
    """A fresh state from initial variables.

    Args:
      variables: Linen variable collections with `params`.
      optimizer: the Optax transformation.
      metrics: names of the metrics that the objective reports.
      average: whether a moving average of the parameters is kept.
    """
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state={name: tree for name, tree in variables.items() if name != "params"},
        optimizer_state=optimizer.init(params),
        # A copy: the step donates its state, and one buffer cannot be donated twice.
        average=jax.tree.map(jnp.copy, params) if average else None,
        window=jnp.int32(0),
        sums={name: jnp.float32(0.0) for name in metrics},
        first_bad_step={name: jnp.int32(NEVER) for name in metrics},
    )


def variables(state: TrainState) -> PyTree:
    """The variable collections to evaluate with: the moving average where there is one."""
    params = state.params if state.average is None else state.average
    return {"params": params, **state.model_state}


def replica(tree: PyTree, index: int) -> PyTree:
    """One seed of a tree whose leaves have a leading axis of seeds."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def reset_sums(state: TrainState) -> TrainState:
    """The state after a log line."""
    return state._replace(window=jnp.int32(0), sums=trees.zeros_like(state.sums))
