"""Orthonormal sets of vectors on pytrees: a leading axis on every leaf, and no leaf is ever ravelled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import trees

PyTree = Any
# What is left of a vector below this many units of rounding of its length is zero. The square root of the unit of rounding, a
# common choice, cuts what is true.
BREAKDOWN = 64
# What loses more than this in the second round was the rounding of the first, and would not be orthogonal after it.
_RESIDUE = 0.1


def magnitude(vectors: PyTree) -> jax.Array:
    """A power of two, at most the largest |entry|, or one of zeros: to divide by it costs no digit, and no square underflows."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(vectors)]))
    power = jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1] - 1)
    return jnp.where(jnp.isfinite(largest) & (largest > 0), power, 1)


def shrunk(vectors: PyTree, factor: jax.Array) -> PyTree:
    """The vectors divided by a factor."""
    return jax.tree.map(lambda leaf: leaf / factor.astype(leaf.dtype), vectors)


def length(vector: PyTree) -> jax.Array:
    """The Euclidean norm, also where a square under- or overflows."""
    largest = magnitude(vector)
    return largest * trees.norm(shrunk(vector, largest))


def unit(vector: PyTree) -> PyTree:
    """The vector at length one, also where a square under- or overflows; zero where it has no length."""
    return trees.unit(shrunk(vector, magnitude(vector)))


def orthogonalise_twice(basis: PyTree, vector: PyTree) -> tuple[jax.Array, PyTree]:
    """Two passes of `orthogonalise`: the second takes away what rounding left in the first. A loop, because it compiles once."""

    def body(_, carry):
        total, vector = carry
        coefficients, vector = orthogonalise(basis, vector)
        return total + coefficients, vector

    rows = jax.tree.leaves(basis)[0].shape[0]
    zeros = jnp.zeros(rows, jnp.result_type(*jax.tree.leaves(vector)))
    return jax.lax.fori_loop(0, 2, body, (zeros, vector))


def orthogonalise(basis: PyTree, vector: PyTree) -> tuple[jax.Array, PyTree]:
    """Coefficients `[rank]` of the vector in the basis, and what is left of it: one pass of classical Gram-Schmidt."""
    coefficients = inner(basis, vector)
    return coefficients, jax.tree.map(lambda rows, v: v - _combine(coefficients, rows), basis, vector)


def inner(basis: PyTree, vector: PyTree) -> jax.Array:
    """The inner product of each row with the vector, `[rank]`."""
    return sum(jax.tree.leaves(jax.tree.map(_inner, basis, vector)))


def orthonormalise(
    basis: PyTree,
    vectors: PyTree,
    size: jax.Array,
    *,
    fresh: Callable[[], PyTree] | None = None,
    wanted: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array, PyTree]:
    """A block of vectors `[block, ...]` as a combination of the basis and of an orthonormal block outside of it.

    Block Gram-Schmidt in two rounds (a loop, because it compiles once): the second takes away what rounding left in the first,
    and what dividing by a small rest has made of that. A vector of which nothing is left becomes zero; or, in two more rounds,
    what a fresh one has outside of the basis and of the others, where that is anything.

    Args:
      basis: `[rank, ...]`, orthonormal rows and zeros.
      vectors: `[block, ...]`.
      size: of what the vectors came from: what is below its rounding is nothing.
      fresh: draws vectors of about unit length, `[block, ...]`, to take the places of those of which nothing is left.
      wanted: whether they are.

    Returns:
      Coefficients `[block, rank]` in the basis, coefficients `[block, block]` in the new block, and the new block:
      `vectors = first @ basis + second @ block`. The coefficients of fresh vectors, which come last, are zero.
    """
    leaves = jax.tree.leaves(vectors)
    block, rank = leaves[0].shape[0], jax.tree.leaves(basis)[0].shape[0]
    dtype = jnp.result_type(*leaves)
    floor = BREAKDOWN * jnp.finfo(dtype).eps

    def unfinished(carry):
        index, missing, *_ = carry
        return (index < 2) | ((index < 4) & jnp.any(missing) & (wanted if fresh is not None else False))

    def body(carry):
        index, missing, inside, outside, vectors = carry
        if fresh is not None:
            fill = functools.partial(_fill, fresh, missing)
            outside, vectors = jax.lax.cond(index == 2, fill, lambda *same: same, outside, vectors)
        found = jax.vmap(inner, in_axes=(None, 0))(basis, vectors).astype(dtype)
        vectors = jax.tree.map(lambda rows, v: v - _combine(found, rows), basis, vectors)
        first = floor * jnp.where(index == 0, size.astype(dtype), 1.0)
        lower, vectors = _triangular(vectors, jnp.where(index % 2 == 0, first, _RESIDUE))
        # The rounds after the first two are of fresh vectors, of which nothing is a part of those that were given.
        given = index < 2
        inside = jnp.where(given, inside + jnp.matmul(outside, found, precision="highest"), inside)
        outside = jnp.where(given, jnp.matmul(outside, lower, precision="highest"), outside)
        return index + 1, jnp.diagonal(lower) == 0, inside, outside, vectors

    start = jnp.int32(0), jnp.zeros(block, bool), jnp.zeros((block, rank), dtype), jnp.eye(block, dtype=dtype), vectors
    _, _, inside, outside, vectors = jax.lax.while_loop(unfinished, body, start)
    return inside, outside, vectors


@jax.jit
def products(left: PyTree, right: PyTree) -> jax.Array:
    """The inner product of each row of one set with each of the other, `[left rows, right rows]`."""

    def one(left: jax.Array, right: jax.Array) -> jax.Array:
        inside = tuple(range(1, left.ndim))
        return jnp.tensordot(left, right, axes=(inside, inside), precision="highest")

    return sum(jax.tree.leaves(jax.tree.map(one, left, right)))


@jax.jit
def combine(basis: PyTree, coefficients: jax.Array) -> PyTree:
    """Vectors `[columns, ...]` of the coefficients `[rank, columns]` in the basis."""
    return jax.tree.map(lambda rows: _combine(coefficients.T, rows), basis)


@functools.partial(jax.jit, static_argnames="known")
def orthonormal(vectors: PyTree, known: int = 0) -> PyTree:
    """An orthonormal basis of the span of `[count, ...]`, row by row; a row that the ones before it span is zero.

    The first `known` rows are taken as they are: orthonormal or zero already.
    """

    def body(index, basis):
        vector = jax.tree.map(lambda rows: rows[index], vectors)
        length = trees.norm(vector)
        _, vector = orthogonalise_twice(basis, vector)
        rest = trees.norm(vector)
        vanishes = (rest <= BREAKDOWN * jnp.finfo(length.dtype).eps * length) | (rest == 0)
        vector = trees.scale(jnp.where(vanishes, 0.0, 1.0 / jnp.where(vanishes, 1.0, rest)), vector)
        return jax.tree.map(lambda rows, v: rows.at[index].set(v), basis, vector)

    start = jax.tree.map(lambda rows: rows.at[known:].set(0), vectors)
    return jax.lax.fori_loop(known, jax.tree.leaves(vectors)[0].shape[0], body, start)


def _fill(fresh: Callable[[], PyTree], missing: jax.Array, outside: jax.Array, vectors: PyTree):
    """The block with fresh vectors for those that are missing, after those that are there, so that these stay as they are."""

    def choose(missing: jax.Array, one: PyTree, other: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jnp.where(missing, a, b), one, other)

    vectors = jax.vmap(choose)(missing, fresh(), vectors)
    if len(missing) == 1:
        return outside, vectors
    place = jnp.where(missing, jnp.sum(~missing) + jnp.cumsum(missing), jnp.cumsum(~missing)) - 1
    return outside.at[:, place].set(outside), jax.tree.map(lambda rows: rows.at[place].set(rows), vectors)


def _triangular(vectors: PyTree, floor: jax.Array) -> tuple[jax.Array, PyTree]:
    """`[block, block]`, lower triangular, times orthonormal rows: the vectors. A row with no rest above the floor is zero."""
    block = jax.tree.leaves(vectors)[0].shape[0]
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], vectors) for i in range(block)]
    lower = [[jnp.zeros_like(floor)] * block for _ in range(block)]
    for i in range(block):
        for j in range(i):
            lower[i][j] = trees.dot(rows[i], rows[j]).astype(floor.dtype)
            rows[i] = trees.add(rows[i], rows[j], -lower[i][j])
        rest = trees.norm(rows[i]).astype(floor.dtype)
        # With `<=` a NaN is no breakdown, so that it is reported; the floor is zero for the zero operator, hence the second test.
        vanishes = (rest <= floor) | (rest == 0)
        lower[i][i] = jnp.where(vanishes, 0.0, rest)
        rows[i] = trees.scale(jnp.where(vanishes, 0.0, 1.0 / jnp.where(vanishes, 1.0, rest)), rows[i])
    return jnp.stack([jnp.stack(row) for row in lower]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def _inner(rows: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.tensordot(rows, vector, axes=vector.ndim, precision="highest") if vector.ndim else rows * vector


def _combine(coefficients: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.tensordot(coefficients.astype(rows.dtype), rows, axes=1, precision="highest")
