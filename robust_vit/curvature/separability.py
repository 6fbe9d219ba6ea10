"""Whether a function takes each example for itself: tried on a few forward passes, so that no wrong operator goes unnoticed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import errors

PyTree = Any
# What rounding may make of the sum of four losses; statistics over the batch change a loss by a per cent and more.
_ROUNDING = 1e-4
# Of the examples with which rows are tried, half are replaced.
_ROWS = 8
_WAY_OUT = (
    "Use evaluation mode, so that BatchNorm takes its running statistics and dropout is off (a draw of an example's own is "
    "frozen by a key in the batch); or, if it is meant so, separable=False."
)


def check_mean(loss: Callable, params: PyTree, batch: PyTree, context: tuple, *, microbatch: int | None = None) -> None:
    """Tries whether a scalar loss is a mean over examples, once for each loss and shapes. Four forward passes then.

    Of such a mean the batches (a, b) and (b, a) have the same, and in sum what (a, a) and (b, b) have. A sum over examples has,
    too, and on a whole batch it is as good; of microbatches it is refused, by two more passes.

    Args:
      loss: `loss(params, batch, *context)`.
      params: its parameters.
      batch: the examples.
      context: what else it gets.
      microbatch: how many examples will be differentiated at a time, where that is not all of them.

    Raises:
      UserError: it is none, or not finite.
    """
    passed, size = _record((loss, microbatch), (params, batch, context), batch)
    if passed:
        return
    a, b = _halves(size, size)
    one = np.zeros(size, int)
    rows = [(a, b), (b, a), (a, a), (b, b)] + ([] if microbatch is None else [(one,), (one[:microbatch],)])
    batches = [_taken(batch, *chosen) for chosen in rows]
    found = np.asarray([_value(loss, params, one, context) for one in batches], np.float64)
    if not np.isfinite(found).all():
        raise errors.UserError("the loss is not finite on this batch: its second derivative would be none either.")
    found, repeated = found[:4], found[4:]
    bound = _ROUNDING * np.abs(found).sum()
    if abs(found[0] - found[1]) > bound:
        raise errors.UserError(
            f"the loss depends on the places of the examples: {found[0]:.6g}, and {found[1]:.6g} with the halves exchanged. "
            + _WAY_OUT
        )
    if abs(found[0] + found[1] - found[2] - found[3]) > bound:
        raise errors.UserError(
            f"the loss is no mean over examples: {found[:2].sum() / 2:.6g} over two halves together, {found[2:].sum() / 2:.6g} "
            "over each with itself. " + _WAY_OUT
        )
    if microbatch is not None and abs(repeated[0] - repeated[1]) > _ROUNDING * np.abs(repeated).sum():
        raise errors.UserError(
            f"the loss is no mean over examples: {repeated[0]:.6g} over {size} times the first one, {repeated[1]:.6g} over "
            f"{microbatch} times. Divide a sum by the number of examples; or, if it is meant so, separable=False."
        )
    passed.append(True)


def check_rows(outputs: Callable, params: PyTree, batch: PyTree, context: tuple) -> None:
    """Tries whether an example's outputs depend on its company or its place, once for each function and shapes.

    Two forward passes of at most eight examples then: of (a, b) and of (a, a).

    Raises:
      UserError: they do, or are not finite.
    """
    passed, size = _record(outputs, (params, batch, context), batch)
    if passed:
        return
    a, b = _halves(size, _ROWS)
    together, alone = (
        np.asarray(_value(outputs, params, _taken(batch, *pair), context), np.float64) for pair in ((a, b), (a, a))
    )
    half = len(a)
    _compare("output", together[:half], [alone[:half], alone[half:]])
    passed.append(True)


def check_inputs(loss: Callable, inputs: jax.Array, context: tuple) -> None:
    """Tries whether an example's loss depends on the others' inputs, once for each loss and shapes. Two forward passes then.

    What is not finite is left to the solvers, which name the example.

    Raises:
      UserError: it does.
    """
    passed, size = _record(loss, (inputs, context), inputs)
    if passed:
        return
    a, b = _halves(size, size)
    rows = np.arange(size)
    rows[b] = a
    together, alone = (
        np.asarray(_value(_OfInputs(loss), None, part, context), np.float64) for part in (inputs, _taken(inputs, rows))
    )
    finite = a[np.isfinite(together[a]) & np.isfinite(alone[a])]
    _compare("loss", together[finite], [alone[finite]])
    passed.append(True)


@dataclasses.dataclass(frozen=True)
class _OfInputs:
    """A loss of inputs as one of a batch."""

    loss: Callable

    def __call__(self, params: PyTree, inputs: PyTree, *context: PyTree) -> jax.Array:
        return self.loss(inputs, *context)


def _record(function: Hashable, operands: tuple, examples: PyTree) -> tuple[list[bool], int]:
    """What `_passed` has of a function at these shapes, and how many examples there are; true where nothing can be tried."""
    leaves, structure = jax.tree.flatten(operands)
    size = np.shape(jax.tree.leaves(examples)[0])[0]
    if size < 2 or any(isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) for leaf in leaves):
        return [True], size
    return _passed(function, structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)), size


@functools.lru_cache(maxsize=256)
def _passed(function: Hashable, structure: Any, shapes: tuple) -> list[bool]:
    """Empty until a function has been tried at these shapes and passed."""
    return []


def _halves(size: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first examples, and as many after them."""
    half = min(size, limit) // 2
    return np.arange(half), np.arange(half, 2 * half)


def _taken(batch: PyTree, *rows: np.ndarray) -> PyTree:
    chosen = np.concatenate(rows)
    return jax.tree.map(lambda leaf: leaf[chosen], batch)


def _compare(name: str, wanted: np.ndarray, others: Sequence[np.ndarray]) -> None:
    """Refuses rows that are not the same in another company, or at another place."""
    if not all(np.isfinite(rows).all() for rows in (wanted, *others)):
        raise errors.UserError(f"the {name} is not finite on this batch: its derivatives would be none either.")
    apart = max(np.abs(rows - wanted).max(initial=0.0) for rows in others)
    if apart > _ROUNDING * np.abs(wanted).max(initial=0.0):
        raise errors.UserError(
            f"the {name} of an example depends on the other examples or on its place among them: it moves by {apart:.3g} where "
            f"others take theirs. {_WAY_OUT}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _value(function: Callable, params: PyTree, batch: PyTree, context: tuple) -> jax.Array:
    return function(params, batch, *context)
