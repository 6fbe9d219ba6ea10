"""Orthonormal sets of vectors on pytrees: a leading axis on every leaf, and no leaf is ever ravelled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import trees

PyTree = Any
# What is left of a vector below this many units of rounding of its length is zero. The square root of the unit of rounding, a
# common choice, cuts what is true.
BREAKDOWN = 64


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


@jax.jit
def orthonormal(vectors: PyTree) -> PyTree:
    """An orthonormal basis of the span of `[count, ...]`, row by row; a row that the ones before it span is zero."""

    def body(index, basis):
        vector = jax.tree.map(lambda rows: rows[index], vectors)
        length = trees.norm(vector)
        _, vector = orthogonalise_twice(basis, vector)
        rest = trees.norm(vector)
        vanishes = (rest <= BREAKDOWN * jnp.finfo(length.dtype).eps * length) | (rest == 0)
        vector = trees.scale(jnp.where(vanishes, 0.0, 1.0 / jnp.where(vanishes, 1.0, rest)), vector)
        return jax.tree.map(lambda rows, v: rows.at[index].set(v), basis, vector)

    return jax.lax.fori_loop(0, jax.tree.leaves(vectors)[0].shape[0], body, trees.zeros_like(vectors))


def _inner(rows: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.tensordot(rows, vector, axes=vector.ndim, precision="highest") if vector.ndim else rows * vector


def _combine(coefficients: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.tensordot(coefficients.astype(rows.dtype), rows, axes=1, precision="highest")
