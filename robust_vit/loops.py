"""Loops: the one place that decides between a compiled loop and a host loop over one compiled step.

XLA on CPU compiles the gradient of a convolution inside a loop body 6 to 29 times slower than outside of one (jax#12868;
ResNet-20, batch 16: parameter gradient 43 -> 1,242 ms). So where a step convolves and the backend is a CPU, the loop runs in
Python over one compiled step; everywhere else it is a `lax.scan`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import errors, programs

PyTree = Any

# A convolving loop on a CPU that is part of a larger trace is unrolled up to here: compile time grows with the length.
UNROLL_LIMIT = 64


def repeat(step: Callable, state: PyTree, length: int, *operands: PyTree, donate: bool = False) -> PyTree:
    """The state after `length` applications of `step`.

    Args:
      step: `step(state, index, *operands) -> state`, pure; `index` is an int32 scalar, 0 to `length - 1`. It is part of the
        compiled program's key: pass a named function or a frozen dataclass, the same or an equal one each time.
      state: arrays; its shapes and dtypes stay as they are.
      length: how many times.
      *operands: pytrees handed to every step unchanged; arrays belong here, not in a closure of `step`.
      donate: give up the memory of `state`, whose arrays must be distinct and may not be used again.

    Returns:
      The last state. One compilation for each structure of the arguments; none for new values.
    """
    if length < 1:
        return state
    if not (jax.default_backend() == "cpu" and convolves(step, state, *operands)):
        return (_scan_in_place if donate else _scan)(step, length, state, operands)
    if _is_traced((state, operands)):
        if length > UNROLL_LIMIT:
            return _scan(step, length, state, operands)
        for index in range(length):
            state = _apply(step, state, jnp.int32(index), operands)
        return state
    state = state if donate else jax.tree.map(jnp.copy, state)
    for index in range(length):
        state = _apply_in_place(step, state, np.int32(index), operands)
    return state


def accumulate(function: Callable, batches: PyTree, *operands: PyTree) -> PyTree:
    """The sum over the leading axis of `batches` of `function(batch, *operands)`, in float32 or wider.

    Gradient accumulation and microbatched operators go through here; memory is that of one batch.

    Args:
      function: `function(batch, *operands) -> pytree of sums`; a part of the compiled program's key, as in `repeat`.
      batches: every leaf is `[count, ...]`.
      *operands: handed to every call unchanged.
    """
    count = jax.tree.leaves(batches)[0].shape[0]
    step = _Summing(function)
    first = jax.eval_shape(step.one, jnp.int32(0), batches, *operands)
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    return repeat(step, total, count, batches, *operands)


def concatenate(function: Callable, examples: PyTree, *operands: PyTree, size: int) -> PyTree:
    """`function(examples, *operands)` for a function of each example alone, computed `size` examples at a time.

    The memory of one slice is used again by the next: on a CPU, where fresh memory and full caches cost more than a loop, a
    gradient of many images takes less time so (measured: tests/benchmarks/results/throughput_cpu.md).

    Args:
      function: `function(examples, *operands) -> pytree`, every leaf with a row for each example; a part of the compiled
        program's key, as in `repeat`.
      examples: every leaf is `[batch, ...]`.
      *operands: handed to every call unchanged.
      size: examples at a time; divides the batch.

    Raises:
      errors.UserError: it does not.
    """
    filled = each(function, split(examples, size), *operands)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), filled)


def each(function: Callable, slices: PyTree, *operands: PyTree) -> PyTree:
    """`function(slice, *operands)` of every slice of leaves `[count, size, ...]`, one after the other: leaves `[count, ...]`."""
    step = _Filling(function)
    shapes = jax.eval_shape(step.one, jnp.int32(0), slices, *operands)
    count = jax.tree.leaves(slices)[0].shape[0]
    filled = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), shapes)
    return repeat(step, filled, count, slices, *operands, donate=True)


def split(examples: PyTree, size: int) -> PyTree:
    """`[batch, ...]` as `[batch / size, size, ...]`, what `accumulate` takes.

    Raises:
      errors.UserError: `size` does not divide the batch.
    """
    batch = jax.tree.leaves(examples)[0].shape[0]
    if size < 1 or batch % size:
        raise errors.UserError(f"{batch} examples cannot be taken {size} at a time: choose a divisor of {batch}.")
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), examples)


def plan(step: Callable, state: PyTree, length: int, *operands: PyTree, donate: bool = False) -> programs.Program:
    """The program that `repeat` would run with these arguments, which may be shapes, and how often it would."""
    if length and jax.default_backend() == "cpu" and convolves(step, state, *operands):
        arguments = (state, jax.ShapeDtypeStruct((), jnp.int32), operands)
        return programs.Program("step", _apply_in_place, arguments, times=length, static=(step,), carry=0)
    function = _scan_in_place if donate else _scan
    return programs.Program("loop", function, (state, operands), static=(step, length), carry=0)


def convolves(step: Callable, state: PyTree, *operands: PyTree) -> bool:
    """Whether one step holds a convolution, read off its jaxpr. The trace is the one that running the step reuses."""
    traced = _apply.trace(step, state, jax.ShapeDtypeStruct((), jnp.int32), operands)
    return _holds_convolution(traced.jaxpr.jaxpr)


@dataclasses.dataclass(frozen=True)
class _Summing:
    """A step that adds one batch's share; equal for equal functions, so nothing is traced twice."""

    function: Callable

    def one(self, index: jax.Array, batches: PyTree, *operands: PyTree) -> PyTree:
        return jax.tree.map(_widen, _call(self.function, _row(batches, index), operands))

    def __call__(self, total: PyTree, index: jax.Array, batches: PyTree, *operands: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, total, self.one(index, batches, *operands))


@dataclasses.dataclass(frozen=True)
class _Filling:
    """A step that writes one slice's results to their place; equal for equal functions."""

    function: Callable

    def one(self, index: jax.Array, slices: PyTree, *operands: PyTree) -> PyTree:
        return _call(self.function, _row(slices, index), operands)

    def __call__(self, filled: PyTree, index: jax.Array, slices: PyTree, *operands: PyTree) -> PyTree:
        found = self.one(index, slices, *operands)
        return jax.tree.map(lambda leaf, row: jax.lax.dynamic_update_index_in_dim(leaf, row, index, 0), filled, found)


def _row(tree: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def _widen(leaf: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if is_float else leaf


# The jits are nested on purpose: an inner jit is traced once and its jaxpr reused by the detection, the scan and the host loop.
@functools.partial(jax.jit, static_argnums=0)
def _call(function, batch, operands):
    return function(batch, *operands)


@functools.partial(jax.jit, static_argnums=0)
def _apply(step, state, index, operands):
    return step(state, index, *operands)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _apply_in_place(step, state, index, operands):
    return _apply(step, state, index, operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(step, length, state, operands):
    def body(state, index):
        return _apply(step, state, index, operands), None

    return jax.lax.scan(body, state, jnp.arange(length, dtype=jnp.int32))[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _scan_in_place(step, length, state, operands):
    return _scan(step, length, state, operands)


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=256)
def _holds_convolution(jaxpr) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        if any(_holds_convolution(inner) for inner in programs.inner_jaxprs(equation)):
            return True
    return False
