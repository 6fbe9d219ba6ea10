"""The loss over a line or a plane through the weights: one compiled step for all of its points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from robust_vit import errors, loops, programs
from robust_vit import mesh as meshes
from robust_vit.curvature import bases
from robust_vit.curvature import batches as batches_lib
from robust_vit.curvature import directions as directions_lib

PyTree = Any


def grid(*axes: Float[np.ndarray, " offsets"]) -> Float[np.ndarray, "points axes"]:
    """The points of a line or of a plane, the last axis fastest: what `landscape` takes as coordinates."""
    return np.stack([each.ravel() for each in np.meshgrid(*axes, indexing="ij")], axis=1)


def offsets(low: float, high: float, points: int) -> Float[np.ndarray, " points"]:
    """Equal steps from `low` or less to `high` or more, with zero among them, exactly: the weights themselves.

    Raises:
      UserError: fewer than 3 points, or zero does not lie between.
    """
    if points < 3 or not low < 0 < high or not (math.isfinite(low) and math.isfinite(high)):
        raise errors.UserError(
            f"{points} points from {low:g} to {high:g}: expected at least 3, and zero, the weights themselves, between the ends."
        )
    # The smallest step that reaches both ends, of the two ways to put zero on the grid.
    share = (points - 1) * -low / (high - low)
    places = {min(max(place, 1), points - 2) for place in (math.floor(share), math.ceil(share))}
    step, before = min((max(-low / place, high / (points - 1 - place)), place) for place in places)
    return step * np.arange(-before, points - before)


def landscape(
    loss: Callable,
    params: PyTree,
    directions: PyTree,
    coordinates: Float[np.ndarray, "points axes"],
    batch: PyTree,
    *context: PyTree,
    microbatch: int | None = None,
    mesh: Mesh | None = None,
) -> PyTree:
    """A loss at `params + sum(coordinates[p, a] * directions[a])` for each point p (Li et al. 2018, arXiv 1712.09913).

    Where the coordinates are zero, that is the weights themselves, to the bit. Cost: a forward pass of the batch a point; memory
    of `axes + 2` times the parameters. One compilation for each number of points and shapes, none for other directions,
    coordinates, parameters or examples; a second one where `microbatch` does not divide the batch.

    Args:
      loss: `loss(params, batch, *context) -> pytree`. A leaf that is a scalar is the mean over the batch; one of shape
        `[examples, ...]` is of each example. A named function or a frozen dataclass, as that of `hessian`.
      params: the weights.
      directions: like the parameters, with a leading axis `[axes]`: of `curvature.random_directions`, the vectors of
        `curvature.lanczos(..., vectors=True)`, or of `curvature.trajectory`.
      coordinates: `[points, axes]`, of `curvature.grid` or any others.
      batch: a pytree whose leaves are `[examples, ...]`.
      *context: pytrees handed to the loss as they are, for example a classifier.
      microbatch: examples at a time, to save memory; every example has the same weight, those of a smaller last one too.
      mesh: devices that take a point each, with parameters, directions and batch whole on each of them; results do not depend
        on how many. Where the mesh splits the parameters, all devices work on one point, each on its part of the batch.

    Returns:
      Like what the loss returns, in NumPy, with a leading axis `[points]`: float64 `[points]` for a scalar, else `[points,
      examples, ...]` in the loss's own dtype. A loss that is not finite at a point is returned as it is.

    Raises:
      UserError: directions or coordinates that do not fit, a batch of several sizes, a loss of neither shape.
    """
    sweeps = _sweeps(loss, params, directions, coordinates, batch, context, microbatch, mesh)
    points = len(coordinates)
    parts = []
    for sweep in sweeps:
        values = loops.repeat(sweep.step, sweep.start(), sweep.length, *sweep.operands, donate=True)
        parts.append(jax.tree.map(lambda leaf: leaf[:points], meshes.fetch(values)))
    sizes = np.concatenate([np.full(sweep.count, sweep.size) for sweep in sweeps])

    def join(*leaves: np.ndarray) -> np.ndarray:
        if leaves[0].ndim == 2:
            return np.concatenate(leaves, axis=1).astype(np.float64) @ (sizes / sizes.sum())
        return np.concatenate([leaf.reshape(points, -1, *leaf.shape[3:]) for leaf in leaves], axis=1)

    return jax.tree.map(join, *parts)


def planned(
    loss: Callable,
    params: PyTree,
    directions: PyTree,
    points: int,
    batch: PyTree,
    *context: PyTree,
    microbatch: int | None = None,
    mesh: Mesh | None = None,
) -> list[programs.Program]:
    """The compiled programs of `landscape` over so many points, for planning; all arrays may be shapes."""
    count = directions_lib.check(directions, params)
    sweeps = _sweeps(loss, params, directions, np.zeros((points, count)), batch, context, microbatch, mesh)
    return [loops.plan(sweep.step, sweep.state, sweep.length, *sweep.operands, donate=True) for sweep in sweeps]


def squared_norms(
    params: PyTree, directions: PyTree, coordinates: Float[np.ndarray, "points axes"]
) -> Float[np.ndarray, " points"]:
    """`|params + sum(coordinates[p, a] * directions[a])|^2` of each point, by the inner products alone, in float64. No passes.

    Times half the weight decay it is the L2 term of the objective, exactly.
    """
    directions_lib.check(directions, params)
    inner = np.asarray(_inner_products(params, directions), np.float64)
    points = np.concatenate([np.ones((len(coordinates), 1)), np.asarray(coordinates, np.float64)], axis=1)
    return np.einsum("pa,ab,pb->p", points, inner, points)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One point and one microbatch; equal for equal losses and meshes, so that nothing is traced twice."""

    loss: Callable
    mesh: Mesh | None

    def __call__(
        self,
        values: PyTree,
        index: jax.Array,
        coordinates: jax.Array,
        params: PyTree,
        directions: PyTree,
        batches: PyTree,
        context: tuple,
    ) -> PyTree:
        rows, operands = (values, coordinates), (index, params, directions, batches, context)
        if self.mesh is None:
            return self._evaluate(rows, *operands)
        if not _spreads(self.mesh):
            whole = meshes.replicated(self.mesh)
            return jax.lax.with_sharding_constraint(self._evaluate(rows, *operands), whole)
        return meshes.Apart(self._evaluate, meshes.batched(self.mesh))(rows, *operands)

    def _evaluate(self, rows, index, params, directions, batches, context):
        values, coordinates = rows
        count = jax.tree.leaves(batches)[0].shape[0]
        point, part = index // count, index % count
        batch = jax.tree.map(lambda leaf: leaf[part], batches)
        with jax.default_matmul_precision("highest"):
            found = self.loss(_moved(params, directions, coordinates[point]), batch, *context)
        return jax.tree.map(
            lambda rows, new: rows.at[point, part].set(jnp.asarray(new).astype(rows.dtype)), values, found
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Sweep:
    """What `loops.repeat` is given for the microbatches of one size."""

    step: _Step
    state: PyTree
    length: int
    operands: tuple
    count: int
    size: int

    def start(self) -> PyTree:
        """Room for the results."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), self.state)


def _sweeps(
    loss: Callable,
    params: PyTree,
    directions: PyTree,
    coordinates: np.ndarray,
    batch: PyTree,
    context: tuple,
    microbatch: int | None,
    mesh: Mesh | None,
) -> list[_Sweep]:
    axes = directions_lib.check(directions, params)
    coordinates = np.asarray(coordinates, np.float64)
    if coordinates.ndim != 2 or coordinates.shape[1] != axes or not len(coordinates):
        raise errors.UserError(
            f"coordinates have shape {list(coordinates.shape)} for {axes} directions: expected [points, {axes}]."
        )
    if not np.isfinite(coordinates).all():
        raise errors.UserError("a coordinate is not finite: the weights have no such place.")
    size = batches_lib.check_examples(batch, microbatch)
    step = _Step(loss, mesh)
    devices = mesh.size if mesh is not None and _spreads(mesh) else 1
    rounds = -(-len(coordinates) // devices)
    padded = np.zeros((devices * rounds, axes))
    padded[: len(coordinates)] = coordinates
    dtype = jnp.result_type(*jax.tree.leaves(params))
    placed = _place(mesh, padded.astype(dtype), split=True)
    if mesh is not None:
        batch = _place_batch(mesh, batch)
    found = []
    for part in _microbatches(batch, size, _sharding(mesh, split=False) if devices > 1 else None):
        leaf = jax.tree.leaves(part)[0]
        count, examples = leaf.shape[:2]
        state = _state(loss, params, part, context, rows=devices * rounds, count=count, examples=examples, mesh=mesh)
        operands = placed, params, directions, part, context
        found.append(_Sweep(step, state, rounds * count, operands, count, examples))
    return found


def _microbatches(batch: PyTree, size: int, sharding: NamedSharding | None) -> Sequence[PyTree]:
    """The batch as `[count, size, ...]`, and what is left as `[1, rest, ...]`; of shapes, shapes that lie as `sharding` says."""
    examples = np.shape(jax.tree.leaves(batch)[0])[0]
    cuts = [(0, examples // size, size)]
    if examples % size:
        cuts.append((examples - examples % size, 1, examples % size))

    def cut(leaf: Any, start: int, count: int, length: int) -> Any:
        shape = (count, length, *leaf.shape[1:])
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
        return leaf[start : start + count * length].reshape(shape)

    return [jax.tree.map(lambda leaf, each=each: cut(leaf, *each), batch) for each in cuts]


def _state(
    loss: Callable,
    params: PyTree,
    batches: PyTree,
    context: tuple,
    *,
    rows: int,
    count: int,
    examples: int,
    mesh: Mesh | None,
) -> PyTree:
    """The shapes of the results of all points, `[rows, count, ...]`."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
    found = jax.eval_shape(loss, params, one, *context)
    if not jax.tree.leaves(found) or any(leaf.ndim and leaf.shape[0] != examples for leaf in jax.tree.leaves(found)):
        shapes = [list(leaf.shape) for leaf in jax.tree.leaves(found)]
        raise errors.UserError(
            f"the loss returns shapes {shapes} for {examples} examples: expected a scalar, their mean, or [{examples}, ...]."
        )
    sharding = _sharding(mesh, split=True)

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32) if floating else leaf.dtype
        return jax.ShapeDtypeStruct((rows, count, *leaf.shape), dtype, sharding=sharding)

    return jax.tree.map(shape, found)


def _moved(params: PyTree, directions: PyTree, coordinates: jax.Array) -> PyTree:
    def one(leaf: jax.Array, rows: jax.Array) -> jax.Array:
        for axis in range(rows.shape[0]):
            leaf = leaf + (coordinates[axis].astype(rows.dtype) * rows[axis]).astype(leaf.dtype)
        return leaf

    return jax.tree.map(one, params, directions)


def _spreads(mesh: Mesh) -> bool:
    """Whether each device has all of the parameters, and takes points of its own."""
    return mesh.shape[meshes.AXES[1]] == 1


def _sharding(mesh: Mesh | None, *, split: bool) -> NamedSharding | None:
    if mesh is None:
        return None
    return meshes.batched(mesh) if split and _spreads(mesh) else meshes.replicated(mesh)


def _place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Whole on each device where each takes points of its own, else split over them."""
    if _spreads(mesh):
        return jax.tree.map(lambda leaf: _place(mesh, leaf, split=False), batch)
    arrays = any(isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(batch))
    return batch if arrays else meshes.put_global(mesh, batch)


def _place(mesh: Mesh | None, leaf: Any, *, split: bool) -> Any:
    sharding = _sharding(mesh, split=split)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf if sharding is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jnp.asarray(leaf) if sharding is None else meshes.put(leaf, sharding)


@jax.jit
def _inner_products(params: PyTree, directions: PyTree) -> jax.Array:
    """Of the parameters and each direction with each other, `[1 + axes, 1 + axes]`."""
    rows = jax.tree.map(lambda leaf, rows: jnp.concatenate([leaf[None].astype(rows.dtype), rows]), params, directions)
    return bases.products(rows, rows)
