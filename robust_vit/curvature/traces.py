"""Traces, diagonals and Frobenius norms from products with random vectors, each with its standard error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
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
    `xtrace`: of `samples`). With a tolerance `hutch++` takes up to a third more: what is outside of a larger span is drawn anew.

    Args:
      operator: the map.
      key: draws the vectors.
      samples: applications at most; rounded to whole blocks.
      tolerance: stop as soon as the standard error is at most this share of the value. `hutchinson` looks after each block from
        the second on; `hutch++` and `xtrace` begin with a span of two or three blocks and double it. None takes all samples. A
        change of the running mean is no error, and no reason to stop.
      method: `hutchinson`, `hutch++` or `xtrace`.
      block: vectors multiplied at a time, which share the pass at the parameters.

    Returns:
      The trace and its standard error over samples; `converged` says whether it reached the tolerance.

    Raises:
      UserError: a number below one, an unknown method, or a product that is not finite.
    """
    if method not in METHODS:
        raise errors.unknown("method of the trace", method, METHODS)
    _check(samples, block)
    if method != "hutchinson":
        return (_hutch_plus_plus if method == "hutch++" else _xtrace)(operator, key, samples, block, tolerance)
    return _mean(operator, key, samples, block, tolerance, _row_products)


def frobenius(
    operator: operators.Operator,
    key: Key[Array, ""],
    *,
    samples: int = 64,
    tolerance: float | None = None,
    block: int = 8,
) -> estimates.Estimate:
    """The root of the sum of the squared eigenvalues, from the mean of `|Av|^2`. Arguments and cost as of `trace`."""
    _check(samples, block)
    # The root's standard error is half as large a share of it as the square's.
    squared = None if tolerance is None else 2 * tolerance
    found = _mean(operator, key, samples, block, squared, lambda _, images: _row_products(images, images))
    root = float(np.sqrt(found.value))
    return dataclasses.replace(found, value=root, standard_error=found.standard_error / (2 * root) if root else 0.0)


def diagonal(
    operator: operators.Operator,
    key: Key[Array, ""],
    *,
    samples: int = 64,
    tolerance: float | None = None,
    block: int = 8,
) -> tuple[PyTree, PyTree]:
    """The diagonal and its standard error, each like the operator's vectors (Bekas et al. 2007).

    An entry's error is `sqrt(1 / samples)` times the norm of its row without itself. Arguments as of `trace`, but for

    Args:
      tolerance: stop as soon as the norm of all errors is at most this share of the norm of the diagonal.
    """
    _check(samples, block)
    count, sums = 0, None
    for vectors, images in _products(operator, key, samples, block):
        count += block
        sums = _summed(vectors, images, sums)
        values, error, sizes = _moments(*sums, count)
        size, spread = _finite(sizes)
        if tolerance is not None and count >= 2 * block and spread <= tolerance * size:
            break
    return values, error


def _mean(operator, key, samples: int, block: int, tolerance: float | None, of: Callable) -> estimates.Estimate:
    """The mean of what `of(vectors, images)` makes of each vector of signs and its image."""
    values: list[float] = []
    for vectors, images in _products(operator, key, samples, block):
        values += _finite(of(vectors, images))
        found = estimates.over_samples(np.asarray(values), len(values))
        if tolerance is not None and len(values) >= 2 * block and _reaches(found, tolerance):
            break
    return dataclasses.replace(found, converged=_reaches(found, tolerance))


def _hutch_plus_plus(operator, key, samples: int, block: int, tolerance: float | None) -> estimates.Estimate:
    sketch_key, rest_key = jax.random.split(key)
    span, applications = _Span(operator, sketch_key, block), 0
    for third in _sizes(samples, 3 * block, block, tolerance):
        span.extend(third)
        values: list[float] = []
        for begin in range(0, third, block):
            vectors = _outside(span.basis, _signs(jax.random.fold_in(rest_key, begin), operator.like, block))
            values += _finite(_row_products(vectors, _apply_block(operator, vectors)))
        applications += third
        found = estimates.over_samples(np.asarray(values), applications + 2 * third)
        found = _settled(found, span.trace, span.rounding * float(np.abs(np.diag(span.matrix)).sum()), tolerance)
        if tolerance is not None and found.converged:
            break
    return found


def _xtrace(operator, key, samples: int, block: int, tolerance: float | None) -> estimates.Estimate:
    span = _Span(operator, key, block)
    # No more samples than dimensions, rounded up to a block.
    most = min(samples, 2 * block * max(1, trees.count(operator.like) // block))
    for half in _sizes(most, 2 * block, block, tolerance):
        span.extend(half)
        values, rounding = _left_out(span)
        found = _settled(estimates.over_samples(values, 2 * half), 0.0, rounding, tolerance)
        if tolerance is not None and found.converged:
            break
    return found


def _settled(found: estimates.Estimate, exact: float, rounding: float, tolerance: float | None) -> estimates.Estimate:
    """An estimate and what is known beside it; the rounding of either is a part of the error."""
    error = float(np.hypot(found.standard_error, rounding))
    found = dataclasses.replace(found, value=exact + found.value, standard_error=error)
    return dataclasses.replace(found, converged=_reaches(found, tolerance))


def _sizes(samples: int, share: int, block: int, tolerance: float | None) -> list[int]:
    """Sizes of the span in vectors: what the samples are enough for; with a tolerance halves of it first, from two blocks."""
    sizes = [max(1, round(samples / share)) * block]
    while tolerance is not None and sizes[0] >= 4 * block:
        sizes.insert(0, sizes[0] // (2 * block) * block)
    return sizes


class _Span:
    """The span of an operator's images of vectors of signs, extended block by block; what is done is not done again.

    Attributes:
      basis: `[size, ...]`, orthonormal rows; zero where the rows before span a row's image.
      matrix: `[size, size]`, the operator in the basis.
      forms: `[size]`: of each sample with its image.
    """

    def __init__(self, operator: operators.Operator, key: Key[Array, ""], block: int):
        self._operator, self._key, self._block, self._count = operator, key, block, 0
        self._sketch = self.basis = None
        self.forms = np.zeros(0)
        self.matrix = np.zeros((0, 0))

    @property
    def rounding(self) -> float:
        """The unit of rounding of the arithmetic."""
        return float(jnp.finfo(jnp.result_type(*jax.tree.leaves(self.basis))).eps)

    @property
    def trace(self) -> float:
        """The operator's trace in the span."""
        return float(np.trace(self.matrix))

    def extend(self, size: int) -> None:
        """Grows to so many samples; two applications for each new one."""
        known, forms, sketches = self._count, [], [] if self._sketch is None else [self._sketch]
        for vectors, images in _products(self._operator, self._key, size, self._block, start=known):
            forms += _finite(_row_products(vectors, images))
            sketches.append(images)
        self._sketch = _concatenated(sketches)
        fresh = jax.tree.map(lambda rows: rows[known:], self._sketch)
        self.basis = bases.orthonormal(_concatenated([self.basis, fresh] if known else [fresh]), known=known)
        self.forms, self._count = np.concatenate([self.forms, forms]), size
        matrix = np.zeros((size, size))
        matrix[:known, :known] = self.matrix
        for begin in range(known, size, self._block):
            part = slice(begin, begin + self._block)
            matrix[:, part] = bases.products(self.basis, _apply_block(self._operator, _rows(self.basis, part)))
        matrix[known:, :known] = matrix[:known, known:].T
        _finite(np.abs(matrix).max(axis=0))
        self.matrix = (matrix + matrix.T) / 2

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """In the basis, with a column a sample: its image, and itself."""
        parts = [slice(begin, begin + self._block) for begin in range(0, self._count, self._block)]
        images = [bases.products(self.basis, _rows(self._sketch, part)) for part in parts]
        samples = (
            _signs(jax.random.fold_in(self._key, part.start), self._operator.like, self._block) for part in parts
        )
        vectors = [bases.products(self.basis, one) for one in samples]
        return tuple(
            np.concatenate([np.asarray(one, np.float64) for one in each], axis=1) for each in (images, vectors)
        )


def _left_out(span: _Span) -> tuple[np.ndarray, float]:
    """For each sample the trace in the span of the others, and its own form outside of that; and the rounding of their mean."""
    images, vectors = span.coefficients()
    matrix, exact = span.matrix, span.trace
    if (np.abs(np.diag(images)) > 0).all():
        # The direction of the span that is there for one sample alone: what leaving it out takes away.
        left_out = np.linalg.inv(images).T
        left_out /= np.linalg.norm(left_out, axis=0)
        rest = vectors - left_out * (left_out * vectors).sum(axis=0)
        removed = ((matrix @ left_out) * left_out).sum(axis=0)
        forms = (vectors * images).sum(axis=0)
    else:
        # Some samples' images are in the span of the others, to rounding: leaving out one of them takes nothing away. What is
        # left may be many small eigenvalues.
        rest, removed, forms = vectors, 0.0, span.forms
    terms = forms, -2 * (rest * images).sum(axis=0), (rest * (matrix @ rest)).sum(axis=0)
    return exact - removed + sum(terms), span.rounding * float(np.mean(np.abs(terms).sum(axis=0)))


def _check(samples: int, block: int) -> None:
    for name, value in (("samples", samples), ("block", block)):
        if value < 1:
            raise errors.UserError(f"{name} is {value}: expected a whole number from 1.")


def _products(operator, key, samples: int, block: int, start: int = 0) -> Iterator[tuple[PyTree, PyTree]]:
    for begin in range(start, samples, block):
        vectors = _signs(jax.random.fold_in(key, begin), operator.like, block)
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
def _summed(vectors: PyTree, images: PyTree, sums: tuple[PyTree, PyTree] | None) -> tuple[PyTree, PyTree]:
    """Sums of `v * Av` and of its square over samples, added to those so far."""
    terms = jax.tree.map(lambda v, image: v * image, vectors, images)
    found = tuple(jax.tree.map(lambda term, p=power: jnp.sum(term**p, axis=0), terms) for power in (1, 2))
    return found if sums is None else trees.add(sums, found)


@jax.jit
def _moments(total: PyTree, squares: PyTree, count: int) -> tuple[PyTree, PyTree, jax.Array]:
    """The means, their standard errors, and the norms of both."""
    mean = jax.tree.map(lambda leaf: leaf / count, total)
    spread = jax.tree.map(lambda leaf, m: jnp.maximum(leaf / count - m**2, 0.0), squares, mean)
    error = jax.tree.map(lambda variance: jnp.sqrt(variance / (count - 1)), spread)
    return mean, error, jnp.stack([trees.norm(mean), jnp.where(count > 1, trees.norm(error), 0.0)])


def _rows(tree: PyTree, part: slice) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[part], tree)


def _concatenated(trees_of_rows: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees_of_rows)


def _signs(key: Key[Array, ""], like: PyTree, count: int) -> PyTree:
    return _sign_block(jax.random.split(key, count), like)


@jax.jit
def _sign_block(keys: Key[Array, " count"], like: PyTree) -> PyTree:
    return jax.vmap(lambda key: probes.signs(key, like))(keys)
