"""Directions in the space of the parameters: random ones at the scale of the filters, and those of a training trajectory."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from robust_vit import errors, trees
from robust_vit.curvature import bases, probes, subsets

PyTree = Any
NORMALISATIONS = ("li2018", "park2022", "none")
VECTORS = ("zero", "scale", "copy")
POSITIONS = "position|pos_emb"
"""Parameters that Park & Kim leave where they are: tables of positions."""

_TABLE = re.compile(r"(position|pos_emb|class_token|cls|probe)[^/]*$")
_VECTOR = re.compile(r"(^|/)(bias|scale)[^/]*$")
_EMBEDDING = re.compile(r"(^|/)embedding$")
_ATTENTION_INPUT = re.compile(r"(^|/)(query|key|value)/kernel$")
_STACKED = re.compile(r"(^|/)blocks/")


class Axes(NamedTuple):
    """What the axes of a parameter are.

    Attributes:
      inputs: the axes that one filter extends over: one output's weights for all inputs.
      outputs: the axes that number the outputs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def axes(path: str, leaf: Any) -> Axes | None:
    """The axes of a parameter of this library, or of a usual Flax module, by its name and rank; None for a vector.

    - Kernels have their outputs last: dense `[inputs, outputs]`, convolution `[height, width, inputs, outputs]`, the output
      projection of Flax's attention `[heads, depth, outputs]`.
    - Its query, key and value kernels `[inputs, heads, depth]` have two output axes; this library's are dense.
    - `nn.Embed` has a filter a row.
    - Tables that are added or attended with (positions, class token, probe) are one filter, as in torch's layout `[1, ...]`.
    - Biases and scales are vectors whatever their rank, as is all of rank 0 and 1.
    - In `blocks/`, where this library stacks parameters for a scan, the leading axis belongs to neither: each is as if alone.
    """
    first = 1 if _STACKED.search(path) else 0
    inside = tuple(range(first, leaf.ndim))
    if len(inside) < 2 or _VECTOR.search(path):
        return None
    if _TABLE.search(path):
        outputs = ()
    elif _EMBEDDING.search(path):
        outputs = inside[:1]
    elif _ATTENTION_INPUT.search(path) and len(inside) == 3:
        outputs = inside[1:]
    else:
        outputs = inside[-1:]
    return Axes(tuple(axis for axis in inside if axis not in outputs), outputs)


def random(
    key: Key[Array, ""],
    params: PyTree,
    *,
    count: int = 2,
    normalisation: str = "li2018",
    vectors: str = "zero",
    still: str | None = None,
    orthogonal: bool = False,
    axes: Callable[[str, Any], Axes | None] = axes,
) -> PyTree:
    """Random Gaussian directions, normalised as published: a plane to look at a loss in. No passes.

    A leaf's draw depends on the key, the direction's number, and the leaf's path and shape alone: not on its sharding, which
    is that of the parameters.

    Args:
      key: of the draws.
      params: the weights that the directions start from; float32 or float64.
      count: how many directions.
      normalisation: see `normalise`; `none` leaves the draws as they are: mean zero, variance one.
      vectors: see `normalise`.
      still: see `normalise`.
      orthogonal: take from each direction, at the end, its part along the ones before it, and give it back its length; as
        published they are left as they are, which in many dimensions is nearly the same.
      axes: see `normalise`.

    Returns:
      Like the parameters, with a leading axis `[count]`.

    Raises:
      UserError: as `normalise`; a count below 1.
    """
    if count < 1:
        raise errors.UserError(f"count is {count}: expected at least 1 direction.")
    _check(params, normalisation, vectors, still)
    rule = _Rule(normalisation, vectors, still, axes)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count, dtype=jnp.uint32))
    leaves, structure = jax.tree.flatten(params)
    placed = _placement(params) or (None,) * len(leaves)
    seeds = jax.vmap(probes.seeds, in_axes=(0, None), out_axes=1)(keys, params)
    pieces = zip(trees.paths(params), leaves, seeds, placed, strict=True)
    found = [_drawn(seed, leaf, rule(path, leaf), sharding) for path, leaf, seed, sharding in pieces]
    found = jax.tree.unflatten(structure, found)
    return _orthogonal(found) if orthogonal else found


def shapes(params: PyTree, count: int) -> PyTree:
    """The shapes of so many directions, and where they lie, for planning; the parameters may be shapes."""
    leaves, structure = jax.tree.flatten(params)
    placed = _placement(params) or (None,) * len(leaves)
    rows = [
        jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, placed, strict=True)
    ]
    return jax.tree.unflatten(structure, rows)


def normalise(
    directions: PyTree,
    params: PyTree,
    *,
    normalisation: str = "li2018",
    vectors: str = "zero",
    still: str | None = None,
    axes: Callable[[str, Any], Axes | None] = axes,
) -> PyTree:
    """Directions scaled to the weights that they start from, so that networks of other scales can be compared.

    - `li2018`: each filter of the direction, one output's weights for all inputs, gets the norm of that filter of the weights
      (Li et al. 2018, arXiv 1712.09913, section 4). Of a ReLU network whose layers are multiplied by c and 1 / c, which is the
      same function, the landscape is then the same.
    - `park2022`: `torch.norm(dim=0)` of how-do-vits-work (Park & Kim 2022, arXiv 2202.06709, `ops/loss_landscapes.py`). It is
      another object than its name there, filter normalisation, says: axis 0 of a torch kernel numbers the outputs, so the norms
      are those of each *input's* weights over all outputs (for a convolution, of each input and place in the kernel). Vectors
      are set to zero there, after a normalisation that had given them the weights' norm; of the class token, whose axis 0 is
      one long, each number is a norm by itself. The 1e-7 that it adds to the norms is left out: zero is caught.
    - `none`: as they are.

    Args:
      directions: like the parameters, with a leading axis `[count]`.
      params: the weights.
      normalisation: one of `NORMALISATIONS`.
      vectors: what becomes of biases and norms' scales: `zero`, they do not move, as in both papers' figures; `scale`, each is
        one filter; `copy`, the direction is the weights themselves, as in Li et al.'s code without `ignore=biasbn`. `none` leaves
        them as they are.
      still: regular expression of further parameters that do not move: `directions.POSITIONS` for Park & Kim's figures.
      axes: what the axes of a parameter are, from its path and an array: a named function; for layouts other than Flax's.

    Raises:
      UserError: an unknown normalisation or way with vectors, a regular expression that is none or matches nothing, parameters
        that are not float32 or float64, directions that do not fit them.
    """
    _check(params, normalisation, vectors, still)
    check(directions, params)
    rule = _Rule(normalisation, vectors, still, axes)
    how = trees.map_with_path(rule, params)
    return jax.tree.map(lambda leaf, rows, how: _scaled(rows, leaf, how), params, directions, how)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The plane of a training trajectory. `trajectory` makes it.

    Attributes:
      directions: like the parameters, with a leading axis `[count]`: unit length, orthogonal. The signs are such that the first
        point's coordinates are not negative.
      coordinates: `[points, count]`: of each point in the plane, relative to the final weights, in distance in the weights.
      distances: `[points]`: of each point from the final weights.
      explained: shares of the variance that the principal components explain, largest first; all of them, summing to one.
    """

    directions: PyTree
    coordinates: Float[np.ndarray, "points count"]
    distances: Float[np.ndarray, " points"]
    explained: Float[np.ndarray, " components"]


def trajectory(points: Sequence[PyTree], final: PyTree, *, count: int = 2, centred: bool = True) -> Trajectory:
    """The principal components of a training trajectory about its final weights (Li et al. 2018, arXiv 1712.09913, section 7).

    PCA of the rows `[θ_0 - θ_n, ..., θ_{n-1} - θ_n, 0]` by their Gram matrix, whose eigenproblem is solved in float64 on the
    host; no row is ever ravelled. Memory of two rows a point.

    Args:
      points: the weights along the way, `[θ_0, ..., θ_{n-1}]`, in order.
      final: θ_n, where the plane is looked at from.
      count: how many components.
      centred: subtract the mean of the rows first, as PCA does and the published code with it; False gives the plane through the
        final weights that is nearest to the points.

    Raises:
      UserError: the points span fewer dimensions than `count`, or are of another structure than the final weights.
    """
    subsets.check(final)
    for point in points:
        check(jax.tree.map(lambda leaf: leaf[None], point), final)
    rows = _differences(tuple(points), final)
    about = _centre(rows) if centred else rows
    gram = np.asarray(bases.products(about, about), np.float64)
    variances, vectors = np.linalg.eigh(gram)
    variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
    # The Gram matrix squares what rounding leaves of a component.
    rank = int((variances > 64 * np.finfo(np.float32).eps * max(variances[0], 1e-300)).sum()) if variances[0] > 0 else 0
    if rank < count:
        raise errors.UserError(
            f"{len(points)} points beside the final weights span {rank} dimensions, and {count} were asked for: keep more "
            "checkpoints, at different places."
        )
    scaled = jnp.asarray(vectors[:, :count] / np.sqrt(variances[:count]), jnp.result_type(*jax.tree.leaves(rows)))
    directions = bases.orthonormal(bases.combine(about, scaled))
    coordinates = np.asarray(bases.products(rows, directions), np.float64)
    signs = np.where(coordinates[0] < 0, -1.0, 1.0)
    distances = np.sqrt(np.maximum(np.diag(np.asarray(bases.products(rows, rows), np.float64)), 0.0))
    return Trajectory(
        directions=_signed(directions, jnp.asarray(signs, scaled.dtype)),
        coordinates=(coordinates * signs)[:-1],
        distances=distances[:-1],
        explained=variances / variances.sum(),
    )


def check(directions: PyTree, params: PyTree) -> int:
    """How many directions there are, each like the parameters.

    Raises:
      UserError: they are not like the parameters, with one leading axis for all.
    """
    same = jax.tree.structure(directions) == jax.tree.structure(params)
    counts = set()
    if same:
        for path, rows, leaf in zip(
            trees.paths(params), jax.tree.leaves(directions), jax.tree.leaves(params), strict=True
        ):
            if np.ndim(rows) < 1 or np.shape(rows)[1:] != np.shape(leaf):
                raise errors.UserError(
                    f"of the directions, {path or 'the array'} has shape {list(np.shape(rows))}: expected [count, *parameter's] "
                    f"with the parameter's shape {list(np.shape(leaf))}."
                )
            counts.add(np.shape(rows)[0])
    if len(counts) != 1:
        raise errors.UserError(
            "the directions are not like the parameters: expected the same pytree, every leaf with one leading axis [count]."
        )
    return counts.pop()


# What becomes of a parameter's direction: at rest, as it is, the weights themselves, or scaled by the norms over these axes.
_REST, _KEEP, _COPY = "rest", "keep", "copy"


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How each leaf of a direction is scaled."""

    normalisation: str
    vectors: str
    still: str | None
    axes: Callable[[str, Any], Axes | None]

    def __call__(self, path: str, leaf: Any) -> str | tuple[int, ...]:
        if self.still is not None and re.search(self.still, path):
            return _REST
        if self.normalisation == "none":
            return _KEEP
        found = self.axes(path, leaf)
        if found is not None:
            return tuple(found.inputs if self.normalisation == "li2018" else found.outputs)
        if self.vectors == "scale":
            return tuple(range(1 if _STACKED.search(path) else 0, leaf.ndim))
        return _REST if self.vectors == "zero" else _COPY


# One leaf at a time: a model has few shapes beside its many leaves, and each is compiled once.


@functools.partial(jax.jit, static_argnums=2)
def _scaled(rows: jax.Array, leaf: jax.Array, how: str | tuple[int, ...]) -> jax.Array:
    """The rows `[count, *leaf]` as the rule says."""
    if how == _REST:
        return jnp.zeros_like(rows)
    if how == _KEEP:
        return rows
    if how == _COPY:
        return jnp.broadcast_to(leaf[None].astype(rows.dtype), rows.shape)
    lengths = _norm(rows, tuple(axis + 1 for axis in how))
    return (rows * (_norm(leaf, how)[None] / jnp.where(lengths > 0, lengths, 1.0))).astype(rows.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _drawn(seeds: jax.Array, leaf: jax.Array, how: str | tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    """Normal rows `[count, *leaf]` of the seeds `[count, 2]`, as the rule says."""
    rows = _scaled(jax.vmap(probes.normal, in_axes=(0, None))(seeds, leaf), leaf, how)
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)


def _norm(leaf: jax.Array, over: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=over, keepdims=True))


def _check(params: PyTree, normalisation: str, vectors: str, still: str | None) -> None:
    if normalisation not in NORMALISATIONS:
        raise errors.unknown("normalisation", normalisation, NORMALISATIONS)
    if vectors not in VECTORS:
        raise errors.unknown("way with vectors", vectors, VECTORS)
    subsets.check(params)
    if still is not None:
        subsets.select(params, still)


def _placement(params: PyTree) -> tuple[NamedSharding, ...] | None:
    """Where rows lie whose parameters lie on a mesh: as these, with the leading axis whole."""
    placed = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    if not all(isinstance(one, NamedSharding) for one in placed):
        return None
    return tuple(NamedSharding(one.mesh, PartitionSpec(None, *one.spec)) for one in placed)


@jax.jit
def _orthogonal(rows: PyTree) -> PyTree:
    lengths = jnp.sqrt(jnp.diag(bases.products(rows, rows)))
    return _signed(bases.orthonormal(rows), lengths)


@jax.jit
def _signed(rows: PyTree, factors: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf * factors.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1)), rows)


@jax.jit
def _differences(points: tuple[PyTree, ...], final: PyTree) -> PyTree:
    """One row a point, and the final weights' own, which is zero."""
    return jax.tree.map(
        lambda last, *others: jnp.stack([jnp.asarray(other, last.dtype) - last for other in others] + [last - last]),
        final,
        *points,
    )


@jax.jit
def _centre(rows: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf - jnp.mean(leaf, axis=0, keepdims=True), rows)
