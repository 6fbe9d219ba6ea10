"""Operators: symmetric linear maps on pytrees, `operator(vector) -> vector`, never ravelled into one array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import errors, loops, trees
from robust_vit.curvature import probes

PyTree = Any


class Operator(Protocol):
    """A symmetric linear map. A frozen pytree, so that it goes through `jax.jit` as an argument.

    Attributes:
      like: a pytree with the structure, shapes, dtypes and sharding of the vectors.
    """

    like: PyTree

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector."""
        ...


class Hessian(flax.struct.PyTreeNode):
    """The Hessian of a mean loss in the parameters, over one resident batch. Made by `hessian`.

    Attributes:
      params: where the second derivative is taken.
      batch: leaves `[examples, ...]`.
      context: further operands of the loss.
      shift: added multiple of the identity.
      loss: `loss(params, batch, *context) -> scalar`, the mean over the batch; static.
      microbatch: examples differentiated at a time; None is all; static.
    """

    params: PyTree
    batch: PyTree
    context: tuple
    shift: jax.Array
    loss: Callable = flax.struct.field(pytree_node=False)
    microbatch: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def like(self) -> PyTree:
        """The parameters: vectors have their structure."""
        return self.params

    def __call__(self, vector: PyTree) -> PyTree:
        """The Hessian times a vector: forward over reverse, 8/3 of the cost of a gradient (Pearlmutter 1994)."""
        return _apply(self, vector)


def hessian(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *context: PyTree,
    microbatch: int | None = None,
    weight_decay: float | jax.Array = 0.0,
) -> Hessian:
    """The Hessian of `loss + weight_decay / 2 * |params|^2` in the parameters, over one batch.

    Cost: nothing now; one application costs 8/3 gradients of the batch (forward over reverse keeps rematerialisation,
    reverse over reverse does not). Rounding: 2e-7 relative to the largest eigenvalue in float32.

    Args:
      loss: `loss(params, batch, *context) -> scalar`: the mean over the examples of the batch. A named function or a frozen
        dataclass, because it is a part of the compiled program's key. Randomness in it has to be frozen (a key in the batch),
        or it is no one linear map; statistics over the batch (BatchNorm in training) make microbatches another loss.
      params: float32 or float64 leaves.
      batch: a pytree whose leaves are `[examples, ...]`. Another batch of the same shapes compiles nothing.
      *context: pytrees handed to the loss as they are, for example a classifier.
      microbatch: examples differentiated at a time, to save memory; the last one may be smaller, and counts by its size.
      weight_decay: added multiple of the identity: L2 shifts every eigenvalue by exactly this.
    """
    for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.dtype(leaf.dtype).itemsize < 4:
            raise errors.UserError(
                f"parameter {path} is {leaf.dtype}: curvature needs float32 or float64 parameters; cast them first."
            )
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise errors.UserError(
            f"the leaves of the batch have leading sizes {sorted(map(str, sizes))}: expected one size, at least 1, for all."
        )
    size = sizes.pop()
    if microbatch is not None and microbatch < 1:
        raise errors.UserError(
            f"microbatch is {microbatch}: expected a whole number from 1, or None for the whole batch."
        )
    if microbatch is not None and microbatch >= size:
        microbatch = None
    shift = weight_decay if isinstance(weight_decay, jax.Array) else np.asarray(weight_decay, jnp.result_type(float))
    return Hessian(params, batch, context, shift, loss=loss, microbatch=microbatch)


@dataclasses.dataclass(frozen=True)
class _Product:
    """The Hessian of one batch's mean loss times a vector; equal for equal losses, so nothing is traced twice."""

    loss: Callable

    def __call__(self, batch: PyTree, vector: PyTree, params: PyTree, context: tuple) -> PyTree:
        def gradient(params):
            return jax.grad(self.loss)(params, batch, *context)

        return jax.jvp(gradient, (params,), (vector,))[1]


@jax.jit
def _apply(operator: Hessian, vector: PyTree) -> PyTree:
    # The precision has to be set where the product is traced: f32 products are bf16 on a TPU and TF32 on a GPU otherwise.
    with jax.default_matmul_precision("highest"):
        product = _mean_product(
            operator.loss, operator.microbatch, operator.batch, vector, operator.params, operator.context
        )
    return jax.tree.map(lambda hv, v: (hv + operator.shift.astype(hv.dtype) * v).astype(v.dtype), product, vector)


def _mean_product(loss, microbatch, batch, vector, params, context):
    product = _Product(loss)
    if microbatch is None:
        return product(batch, vector, params, context)
    size = jax.tree.leaves(batch)[0].shape[0]
    whole = size // microbatch
    stacked = jax.tree.map(lambda leaf: leaf[: whole * microbatch].reshape(whole, microbatch, *leaf.shape[1:]), batch)
    total = trees.scale(microbatch / size, loops.accumulate(product, stacked, vector, params, context))
    if whole * microbatch < size:
        rest = jax.tree.map(lambda leaf: leaf[whole * microbatch :], batch)
        total = trees.add(total, product(rest, vector, params, context), 1.0 - whole * microbatch / size)
    return total


class Symmetric(flax.struct.PyTreeNode):
    """A symmetric matrix as an operator on one vector `[n]`: for tests, and to check a solver against known spectra."""

    matrix: jax.Array

    @property
    def like(self) -> jax.Array:
        """A vector."""
        return self.matrix[0]

    def __call__(self, vector: jax.Array) -> jax.Array:
        """The matrix times the vector."""
        return jnp.matmul(self.matrix, vector, precision="highest")


def asymmetry(operator: Operator, key: jax.Array) -> jax.Array:
    """`|u'Av - v'Au| / (|Au| |v|)` for two random vectors: rounding for a symmetric map, order one for a mistake.

    A mistake may be randomness that is not frozen, or statistics over a batch that was split. Cost: two applications.

    Args:
      operator: any operator.
      key: draws the two vectors.
    """
    return _asymmetry(operator, key)


@jax.jit
def _asymmetry(operator, key):
    left_key, right_key = jax.random.split(key)
    left, right = probes.draw(left_key, operator.like), probes.draw(right_key, operator.like)
    image = operator(left)
    difference = jnp.abs(trees.dot(right, image) - trees.dot(left, operator(right)))
    scale = trees.norm(image) * trees.norm(right)
    return jnp.where(scale > 0, difference / jnp.where(scale > 0, scale, 1.0), 0.0)
