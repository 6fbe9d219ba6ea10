"""Traces, diagonals and Frobenius norms from products with random vectors, each with its standard error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from robust_vit import errors, trees
from robust_vit.curvature import bases, estimates, operators, probes

PyTree = Any
METHODS = ("hutchinson", "hutch++", "xtrace")


def trace(
    operator: operators.Operator,
    key: Key[Array, ""],
    *,
    samples: int = 64,
    tolerance: float | None = None,
    method: str = "hutchinson",
    block: int = 8,
) -> estimates.Estimate:
    """The trace: the sum of the eigenvalues.

    `hutchinson` is the mean of `v'Av` over vectors of random signs (Hutchinson 1990): unbiased, with a standard deviation of
    `sqrt(2 / samples)` times the norm of what is off the diagonal. `hutch++` (Meyer et al. 2021, arXiv 2010.09649) takes the
    trace in the span of a third of the samples exactly and estimates the rest: the better, the faster the spectrum falls, and
    exact where its rank is below that. `xtrace` (Epperly, Tropp & Webber 2024, arXiv 2301.07825) takes the span of half of the
    samples and leaves each of them out in turn, so that all of them estimate the rest: the best where the spectrum falls.

    Cost: at most `samples` applications, and the memory of `block` vectors and their products (`hutch++`: of `2 * samples / 3`,
    `xtrace`: of `samples`).

    Args:
      operator: the map.
      key: draws the vectors.
      samples: applications at most; rounded to whole blocks.
      tolerance: stop as soon as the standard error is at most this share of the value, looked at after each block from the
        second on. None takes all samples. A change of the running mean is no error, and no reason to stop.
      method: `hutchinson`, or `hutch++` or `xtrace`, which have no early stop.
      block: vectors multiplied at a time, which share the pass at the parameters.

    Returns:
      The trace and its standard error over samples; `converged` says whether it reached the tolerance.

    Raises:
      UserError: a number below one, an unknown method, or a product that is not finite.
    """
    if method not in METHODS:
        raise errors.unknown("method of the trace", method, METHODS)
    if method != "hutchinson":
        found = (_hutch_plus_plus if method == "hutch++" else _xtrace)(operator, key, samples, block)
        return dataclasses.replace(found, converged=_reaches(found, tolerance))
    values: list[float] = []
    for vectors, images in _products(operator, key, samples, block):
        values += _finite(_row_products(vectors, images))
        found = estimates.over_samples(np.asarray(values), len(values))
        if tolerance is not None and len(values) >= 2 * block and _reaches(found, tolerance):
            break
    return dataclasses.replace(found, converged=_reaches(found, tolerance))


def frobenius(
    operator: operators.Operator, key: Key[Array, ""], *, samples: int = 64, block: int = 8
) -> estimates.Estimate:
    """The root of the sum of the squared eigenvalues, from the mean of `|Av|^2`. Arguments and cost as of `trace`."""
    values: list[float] = []
    for _, images in _products(operator, key, samples, block):
        values += _finite(_row_products(images, images))
    found = estimates.over_samples(np.asarray(values), len(values))
    root = float(np.sqrt(found.value))
    return dataclasses.replace(found, value=root, standard_error=found.standard_error / (2 * root) if root else 0.0)


def diagonal(
    operator: operators.Operator, key: Key[Array, ""], *, samples: int = 64, block: int = 8
) -> tuple[PyTree, PyTree]:
    """The diagonal and its standard error, each like the operator's vectors (Bekas et al. 2007). Arguments as of `trace`.

    An entry's error is `sqrt(1 / samples)` times the norm of its row without itself.
    """
    count, mean, squares = 0, None, None
    for vectors, images in _products(operator, key, samples, block):
        count += block
        mean, squares = _summed(vectors, images, mean, squares)
    _finite([float(jnp.where(trees.all_finite(mean), 0.0, jnp.nan))])
    mean = jax.tree.map(lambda total: total / count, mean)
    spread = jax.tree.map(lambda total, m: jnp.maximum(total / count - m**2, 0.0), squares, mean)
    return mean, jax.tree.map(lambda variance: jnp.sqrt(variance / max(count - 1, 1)), spread)


def _hutch_plus_plus(operator, key, samples: int, block: int) -> estimates.Estimate:
    third = max(1, round(samples / (3 * block))) * block
    sketch_key, rest_key = jax.random.split(key)
    sketch = [images for _, images in _products(operator, sketch_key, third, block)]
    basis = bases.orthonormal(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *sketch))
    exact = 0.0
    for start in range(0, third, block):
        part = jax.tree.map(lambda rows, s=start: rows[s : s + block], basis)
        exact += sum(_finite(_row_products(part, _apply_block(operator, part))))
    values: list[float] = []
    for begin in range(0, third, block):
        vectors = _outside(basis, _signs(jax.random.fold_in(rest_key, begin), operator.like, block))
        values += _finite(_row_products(vectors, _apply_block(operator, vectors)))
    found = estimates.over_samples(np.asarray(values), 3 * third)
    return dataclasses.replace(found, value=exact + found.value)


def _xtrace(operator, key, samples: int, block: int) -> estimates.Estimate:
    half = max(1, min(round(samples / (2 * block)) * block, trees.count(operator.like) // block * block))
    sketches = [images for _, images in _products(operator, key, half, block)]
    sketch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *sketches)
    basis = bases.orthonormal(sketch)
    rows = [slice(begin, begin + block) for begin in range(0, half, block)]
    # In the basis, with a column a sample: its image, itself, and the operator.
    images = [bases.products(basis, jax.tree.map(lambda leaf, r=part: leaf[r], sketch)) for part in rows]
    vectors = [
        bases.products(basis, _signs(jax.random.fold_in(key, part.start), operator.like, block)) for part in rows
    ]
    inside = []
    for part in rows:
        chosen = jax.tree.map(lambda leaf, r=part: leaf[r], basis)
        inside.append(bases.products(basis, _apply_block(operator, chosen)))
    triangle, weights, matrix = (
        np.concatenate([np.asarray(one, np.float64) for one in parts], axis=1) for parts in (images, vectors, inside)
    )
    _finite([np.abs(triangle).max(), np.abs(matrix).max()])
    matrix = (matrix + matrix.T) / 2
    exact = float(np.trace(matrix))
    if not (np.abs(np.diag(triangle)) > 0).all():
        # Fewer dimensions than samples: the span is the range of the operator, and nothing is left outside.
        return estimates.Estimate(exact, 0.0, half, 2 * half)
    # The direction of the span that is there for one sample alone: what leaving it out takes away.
    left_out = np.linalg.inv(triangle).T
    left_out /= np.linalg.norm(left_out, axis=0)
    rest = weights - left_out * (left_out * weights).sum(axis=0)
    removed = ((matrix @ left_out) * left_out).sum(axis=0)
    outside = (
        (weights * triangle).sum(axis=0) - 2 * (rest * triangle).sum(axis=0) + (rest * (matrix @ rest)).sum(axis=0)
    )
    return estimates.over_samples(exact - removed + outside, 2 * half)


def _products(operator, key, samples: int, block: int) -> Iterator[tuple[PyTree, PyTree]]:
    for name, value in (("samples", samples), ("block", block)):
        if value < 1:
            raise errors.UserError(f"{name} is {value}: expected a whole number from 1.")
    for start in range(0, samples, block):
        vectors = _signs(jax.random.fold_in(key, start), operator.like, block)
        yield vectors, _apply_block(operator, vectors)


def _apply_block(operator, vectors: PyTree) -> PyTree:
    return operator.block(vectors) if operators.by_host(operator) else _vmapped(operator, vectors)


def _finite(values) -> list[float]:
    values = [float(value) for value in np.asarray(values, np.float64)]
    if not np.isfinite(values).all():
        raise operators.not_finite()
    return values


def _reaches(found: estimates.Estimate, tolerance: float | None) -> bool:
    return tolerance is None or bool(found.standard_error <= tolerance * abs(found.value))


@jax.jit
def _vmapped(operator: operators.Operator, vectors: PyTree) -> PyTree:
    return jax.vmap(operator)(vectors)


@jax.jit
def _row_products(left: PyTree, right: PyTree) -> jax.Array:
    return jax.vmap(trees.dot)(left, right)


@jax.jit
def _outside(basis: PyTree, vectors: PyTree) -> PyTree:
    return jax.vmap(lambda vector: bases.orthogonalise_twice(basis, vector)[1])(vectors)


@jax.jit
def _summed(vectors: PyTree, images: PyTree, mean: PyTree, squares: PyTree) -> tuple[PyTree, PyTree]:
    """Sums of `v * Av` and of its square over samples, added to those so far."""
    terms = jax.tree.map(lambda v, image: v * image, vectors, images)
    sums = [jax.tree.map(lambda term, p=power: jnp.sum(term**p, axis=0), terms) for power in (1, 2)]
    if mean is None:
        return sums[0], sums[1]
    return trees.add(mean, sums[0]), trees.add(squares, sums[1])


def _signs(key: Key[Array, ""], like: PyTree, count: int) -> PyTree:
    return _sign_block(jax.random.split(key, count), like)


@jax.jit
def _sign_block(keys: Key[Array, " count"], like: PyTree) -> PyTree:
    return jax.vmap(lambda key: probes.signs(key, like))(keys)
