"""Extreme eigenvalues by Lanczos and block Lanczos, with residuals, and no ghosts."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Key

from robust_vit import errors, loops, trees
from robust_vit.curvature import bases, growth, krylov, operators

PyTree = Any


def _from_both_ends(values: np.ndarray) -> np.ndarray:
    """The largest, the smallest, the second largest, and so on."""
    ascending = np.argsort(values, kind="stable")
    pairs = np.stack([ascending[::-1], ascending], axis=1).ravel()
    return pairs[: len(values)]


ORDERS = {
    "magnitude": lambda values: np.argsort(-np.abs(values), kind="stable"),
    "largest": lambda values: np.argsort(-values, kind="stable"),
    "smallest": lambda values: np.argsort(values, kind="stable"),
    "both ends": _from_both_ends,
}


@dataclasses.dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of an operator, with what is needed to trust them. Plain NumPy in float64.

    Attributes:
      values: `[top]`, in the order asked for.
      residuals: `[top]`: `|A y - value y|` of each unit Ritz vector, so an eigenvalue of A is no farther away than this; the
        Lanczos estimate `|beta s|`, or computed outright where `verify` was set.
      converged: `[top]`: the residual is within `tolerance * |value|`, or within the rounding of the arithmetic.
      noise: `64 eps |A|`: an eigenvalue nearer to zero than this has no sign.
      applications: of the operator.
      ritz: `[steps]`, every Ritz value, ascending.
      weights: `[steps]`: the squared share of the starting vector in each (of a block, the mean over its vectors); they sum to
        one and `sum(weights * ritz)` is the quadratic form of the starting vector (the nodes and weights of stochastic Lanczos
        quadrature).
      vectors: like the operator's vectors with a leading axis `[top]`, or None.
    """

    values: Float[np.ndarray, " top"]
    residuals: Float[np.ndarray, " top"]
    converged: np.ndarray
    noise: float
    applications: int
    ritz: Float[np.ndarray, " steps"]
    weights: Float[np.ndarray, " steps"]
    vectors: PyTree | None = None


def lanczos(
    operator: operators.Operator,
    key: Key[Array, ""],
    *,
    rank: int = 100,
    top: int = 5,
    which: str = "magnitude",
    tolerance: float = 1e-3,
    check_every: int | None = None,
    block: int = 1,
    verify: bool = False,
    vectors: bool = False,
    first: PyTree | None = None,
    folder: pathlib.Path | str | None = None,
) -> Eigenvalues:
    """The extreme eigenvalues of a symmetric operator (Lanczos 1950; in blocks, Golub & Underwood 1977), with residuals.

    Full reorthogonalisation in two rounds, so a value appears as often as the operator has it and never as a ghost; a
    complete invariant subspace is followed by a fresh direction, so neither rank deficiency nor multiplicity makes a NaN. The
    small projected problem is solved in float64 on the host.

    Cost: up to `rank` applications (rounded up to whole looks and blocks), plus `top` with `verify`, plus a block where a
    folder is gone on with; memory of `rank + 3 block` vectors. One compilation for each operator structure and rank, none for new
    batches, parameters or keys.

    A block costs fewer gradients a vector (`curvature.hessian`), and over a data set one pass of the data for all its vectors; in
    return the Krylov space is of a lower degree, so that more vectors are needed. It pays for data sets, and for clusters.

    Args:
      operator: the map; also one over a data set (`curvature.stream`).
      key: draws the starting vectors.
      rank: vectors at most; no more than the dimension is ever taken.
      top: how many eigenvalues to return; no more than the dimension.
      which: `magnitude`, `largest`, `smallest`, or `both ends`: the largest, the smallest, the second largest, and so on.
      tolerance: relative residual at which a value counts as converged.
      check_every: look every so many applications whether all `top` values have converged, and stop (`settled`); None takes all.
      block: vectors a step.
      verify: compute the residuals outright from the Ritz vectors rather than by the Lanczos estimate.
      vectors: return the Ritz vectors too.
      first: like the operator's vectors with a leading axis `[block]`: what to start from, in place of a draw.
      folder: where the decomposition is saved at each look, or about every ten applications. The same call goes on from what
        is there, to the same bytes.

    Raises:
      UserError: the operator returned a NaN or an infinity; the first vectors are zero or dependent; the folder is that of
        another operator, key, rank or block.
    """
    if which not in ORDERS:
        raise errors.unknown("order of eigenvalues", which, ORDERS)
    top = min(top, trees.count(operator.like))
    if top < 1 or rank < top:
        raise errors.UserError(f"rank is {rank} for {top} eigenvalues: expected at least as many steps as eigenvalues.")
    if block < 1:
        raise errors.UserError(f"block is {block}: expected a whole number of vectors from 1.")
    steps, chunk = krylov.counts(operator, rank, block, check_every, saved=folder is not None)
    state = krylov.start(operator, key, rank=steps * block, block=block, first=first)
    with contextlib.closing(growth.looks(operator, state, steps=chunk, folder=folder)) as looks:
        for look in looks:
            state, applications = look
            found, coefficients, rows = solve(state, top, which, tolerance)
            if check_every and settled(state, found, top, which, tolerance, random=first is None):
                break
    if verify or vectors:
        eigenvectors = krylov.combine(state, rows, coefficients)
        if verify:
            residuals = np.asarray(_residuals(operator, eigenvectors, jnp.asarray(found.values)), np.float64)
            applications += top
            converged = residuals <= np.maximum(tolerance * np.abs(found.values), found.noise)
            found = dataclasses.replace(found, residuals=residuals, converged=converged)
        if vectors:
            found = dataclasses.replace(found, vectors=eigenvectors)
    return dataclasses.replace(found, applications=applications)


def solve(
    state: krylov.Krylov, top: int, which: str, tolerance: float
) -> tuple[Eigenvalues, Float[np.ndarray, "rows top"], np.ndarray]:
    """The eigenvalues of a decomposition, their vectors' coefficients in rows of the basis, and the numbers of these rows.

    Raises:
      UserError: the operator returned a NaN or an infinity.
    """
    matrix, outward, rows = krylov.projected(state)
    ritz, coefficients = scipy.linalg.eigh(matrix)
    order = ORDERS[which](ritz)[:top]
    residuals = np.linalg.norm(outward.T @ coefficients, axis=0)[order]
    values = ritz[order]
    noise = float(bases.BREAKDOWN * jnp.finfo(state.alpha.dtype).eps * float(state.scale))
    found = Eigenvalues(
        values=values,
        residuals=residuals,
        converged=residuals <= np.maximum(tolerance * np.abs(values), noise),
        noise=noise,
        applications=len(rows),
        ritz=ritz,
        weights=(coefficients[: state.block] ** 2).mean(axis=0),
    )
    return found, coefficients[:, order], rows


def settled(
    state: krylov.Krylov, found: Eigenvalues, top: int, which: str, tolerance: float, *, random: bool = True
) -> bool:
    """Whether all values have converged and no further step is known to change them.

    After an invariant subspace was complete, the rows since then are the Krylov space of a fresh direction, and what that has to
    say of the `top` has to have converged too. A complete subspace that holds a random vector holds every eigenvalue of what was
    outside before it; further copies of these are what may be left.

    Args:
      state: a decomposition.
      found: its eigenvalues, as of `solve` with the arguments that follow.
      top: how many were asked for.
      which: the order.
      tolerance: relative residual.
      random: the first block was.
    """
    if len(found.values) < top or not found.converged.all():
        return False
    matrix, outward, rows = krylov.projected(state)
    missing = ~outward.any(axis=0)
    complete = np.flatnonzero(~np.asarray(state.beta)[: int(state.size) - 1].any(axis=(1, 2)))
    since = np.searchsorted(rows, (complete[-1] + 1) * state.block) if len(complete) else 0
    if not since and not missing.any():
        return True
    ritz, coefficients = scipy.linalg.eigh(matrix[since:, since:])
    if missing.all():
        everything = np.concatenate([found.ritz, np.repeat(ritz, top)])
        unmoved = np.abs(everything[ORDERS[which](everything)[:top]] - found.values) <= found.noise
        return bool(unmoved.all()) and (random or since > 0)
    order = ORDERS[which](ritz)[:top]
    residuals = np.linalg.norm(outward[since:].T @ coefficients[:, order], axis=0)
    converged = residuals <= np.maximum(tolerance * np.abs(ritz[order]), found.noise)
    return not missing.any() and len(order) == top and bool(converged.all())


def _residuals(operator: operators.Operator, vectors: PyTree, values: jax.Array) -> jax.Array:
    values = values.astype(jax.tree.leaves(vectors)[0].dtype)
    if operators.by_host(operator):
        return jax.vmap(_distance)(operator.block(vectors), vectors, values)
    return loops.repeat(_residual_step, jnp.zeros_like(values), values.shape[0], operator, vectors, values)


def _residual_step(total: jax.Array, index: jax.Array, operator, vectors: PyTree, values: jax.Array) -> jax.Array:
    vector = jax.tree.map(lambda rows: rows[index], vectors)
    image = operator(jax.tree.map(lambda v, like: v.astype(like.dtype), vector, operator.like))
    return total.at[index].set(_distance(image, vector, values[index]).astype(total.dtype))


def _distance(image: PyTree, vector: PyTree, value: jax.Array) -> jax.Array:
    return bases.length(trees.add(image, vector, -value))
