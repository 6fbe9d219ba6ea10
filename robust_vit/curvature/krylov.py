"""Lanczos with full, two-pass reorthogonalisation on pytrees: eigenvalues with residuals, and no ghosts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import errors, loops, programs, trees
from robust_vit.curvature import bases, operators, probes

PyTree = Any
ORDERS = {
    "magnitude": lambda values: np.argsort(-np.abs(values), kind="stable"),
    "largest": lambda values: np.argsort(-values, kind="stable"),
    "smallest": lambda values: np.argsort(values, kind="stable"),
    "both ends": lambda values: _alternating(np.argsort(-values, kind="stable")),
}


class Krylov(flax.struct.PyTreeNode):
    """A Lanczos decomposition `A Q = Q T + beta[-1] q e'`, as far as it has come.

    Attributes:
      basis: like the vectors with a leading axis `[rank]`; rows from `size` on are zero.
      following: the unit vector that the next step starts from.
      alpha: diagonal of T, `[rank]`.
      beta: couplings, `[rank]`: `beta[j]` between vectors j and j+1; zero where an invariant subspace was complete.
      scale: the largest `|A q|` met: a lower bound of |A|.
      size: steps done.
      broken: the basis spans an invariant subspace, so that no next vector follows from it: further steps do nothing until
        `revive` gives a fresh direction.
      key: of the fresh directions.
    """

    basis: PyTree
    following: PyTree
    alpha: Float[Array, " rank"]
    beta: Float[Array, " rank"]
    scale: Float[Array, ""]
    size: Int[Array, ""]
    broken: Bool[Array, ""]
    key: Key[Array, ""]


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
      weights: `[steps]`: the squared share of the starting vector in each; they sum to one and `sum(weights * ritz)` is the
        quadratic form of the starting vector (the nodes and weights of stochastic Lanczos quadrature).
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


def start(operator: operators.Operator, key: Key[Array, ""], *, rank: int) -> Krylov:
    """An empty decomposition with room for `rank` vectors, whose first is drawn from the key."""
    return _start(operator.like, key, rank, placement_of(operator.like))


def extend(operator: operators.Operator, krylov: Krylov, *, steps: int) -> Krylov:
    """The decomposition after `steps` more steps: one application each. Pure: jits and vmaps.

    Steps beyond the rank, or after an invariant subspace is complete, leave it as it is.
    """
    return loops.repeat(_step, krylov, steps, operator)


@jax.jit
def revive(krylov: Krylov) -> Krylov:
    """The decomposition with a random direction to go on from, orthogonal to all so far; unchanged unless it is broken."""
    following = _fresh(jax.random.fold_in(krylov.key, krylov.size), krylov.basis)
    following = jax.tree.map(lambda new, old: jnp.where(krylov.broken, new, old), following, krylov.following)
    return krylov.replace(following=following, broken=krylov.broken & (trees.norm(following) == 0))


def lanczos(
    operator: operators.Operator,
    key: Key[Array, ""],
    *,
    rank: int = 100,
    top: int = 5,
    which: str = "magnitude",
    tolerance: float = 1e-3,
    check_every: int | None = None,
    verify: bool = False,
    vectors: bool = False,
) -> Eigenvalues:
    """The extreme eigenvalues of a symmetric operator (Lanczos 1950), with residuals.

    Full reorthogonalisation in two passes, so a value appears as often as the operator has it and never as a ghost; a
    complete invariant subspace is followed by a fresh direction, so neither rank deficiency nor multiplicity makes a NaN. The
    small tridiagonal problem is solved in float64 on the host.

    Cost: up to `rank` applications (rounded up to a multiple of `check_every`; after a breakdown, which a real network does
    not see, the rest of the steps until the next look idle), plus `top` with `verify`; memory of `rank + 3` vectors. One
    compilation for each operator structure and rank, none for new batches, parameters or keys.

    Args:
      operator: the map.
      key: draws the starting vector.
      rank: steps at most; no more than the dimension is ever taken.
      top: how many eigenvalues to return; no more than the dimension.
      which: `magnitude`, `largest`, `smallest`, or `both ends`: the largest, the smallest, the second largest, and so on.
      tolerance: relative residual at which a value counts as converged.
      check_every: look every so many steps whether all `top` values have converged, and stop; None takes all steps.
      verify: compute the residuals outright from the Ritz vectors rather than by the Lanczos estimate.
      vectors: return the Ritz vectors too.

    Raises:
      UserError: the operator returned a NaN or an infinity.
    """
    if which not in ORDERS:
        raise errors.unknown("order of eigenvalues", which, ORDERS)
    dimension = trees.count(operator.like)
    top = min(top, dimension)
    if top < 1 or rank < top:
        raise errors.UserError(f"rank is {rank} for {top} eigenvalues: expected at least as many steps as eigenvalues.")
    rank = min(rank, dimension)
    chunk = min(check_every or rank, rank)
    krylov = start(operator, key, rank=rank)
    applications = size = 0
    while size < rank:
        krylov = loops.repeat(_step, krylov, chunk, operator, donate=True)
        applications += chunk
        size = int(krylov.size)
        found, coefficients = solve(krylov, size, top, which, tolerance)
        if size < rank and krylov.broken:
            # The residuals are zero here, and say nothing about the eigenvectors outside of the subspace.
            krylov = revive(krylov)
            if krylov.broken:
                break
        elif check_every and size >= top and found.converged.all():
            break
    if verify or vectors:
        eigenvectors = _ritz_vectors(krylov, size, coefficients)
        if verify:
            residuals = np.asarray(_residuals(operator, eigenvectors, jnp.asarray(found.values)), np.float64)
            applications += top
            converged = residuals <= np.maximum(tolerance * np.abs(found.values), found.noise)
            found = dataclasses.replace(found, residuals=residuals, converged=converged)
        if vectors:
            found = dataclasses.replace(found, vectors=eigenvectors)
    return dataclasses.replace(found, applications=applications)


def planned(operator: operators.Operator, *, rank: int, check_every: int | None = None) -> list[programs.Program]:
    """The compiled programs of `lanczos` with how often each runs at most, for planning; the operator's arrays may be shapes."""
    rank = min(rank, trees.count(operator.like))
    chunk = min(check_every or rank, rank)
    key = jax.eval_shape(lambda: jax.random.key(0))
    placement = placement_of(operator.like)
    krylov = _start.eval_shape(operator.like, key, rank, placement)
    if placement is not None:
        placed = _shardings(krylov, placement)
        krylov = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), krylov, placed)
    step = loops.plan(_step, krylov, chunk, operator, donate=True)
    return [dataclasses.replace(step, times=step.times * -(-rank // chunk))]


def solve(krylov: Krylov, size: int, top: int, which: str, tolerance: float) -> tuple[Eigenvalues, np.ndarray]:
    """The eigenvalues of a decomposition of `size` steps, and the coefficients `[size, top]` of their vectors in its basis.

    Raises:
      UserError: a coefficient is not finite.
    """
    alpha = np.asarray(krylov.alpha, np.float64)[:size]
    beta = np.asarray(krylov.beta, np.float64)[:size]
    scale = float(krylov.scale)
    if not (np.isfinite(alpha).all() and np.isfinite(beta).all() and np.isfinite(scale)):
        step = int(np.argmin(np.isfinite(alpha) & np.isfinite(beta)))
        raise operators.not_finite(step + 1)
    ritz, coefficients = scipy.linalg.eigh_tridiagonal(alpha, beta[:-1])
    order = ORDERS[which](ritz)[:top]
    residuals = np.abs(beta[-1] * coefficients[-1])[order]
    values = ritz[order]
    noise = float(bases.BREAKDOWN * jnp.finfo(krylov.alpha.dtype).eps * scale)
    found = Eigenvalues(
        values=values,
        residuals=residuals,
        converged=residuals <= np.maximum(tolerance * np.abs(values), noise),
        noise=noise,
        applications=size,
        ritz=ritz,
        weights=coefficients[0] ** 2,
    )
    return found, coefficients[:, order]


def _ritz_vectors(krylov: Krylov, size: int, coefficients: np.ndarray) -> PyTree:
    padded = np.pad(coefficients, ((0, krylov.alpha.shape[0] - size), (0, 0)))
    return bases.combine(krylov.basis, jnp.asarray(padded, krylov.alpha.dtype))


def _step(krylov: Krylov, index: jax.Array, operator: operators.Operator) -> Krylov:
    """One step. The vector goes in by its number in the decomposition, so that the run may be cut anywhere."""
    del index
    return advance(
        krylov, operator(jax.tree.map(lambda v, like: v.astype(like.dtype), krylov.following, operator.like))
    )


def advance(krylov: Krylov, image: PyTree) -> Krylov:
    """The decomposition after a step, given what the operator makes of the vector that follows."""
    position = krylov.size
    active = (position < krylov.alpha.shape[0]) & ~krylov.broken
    vector = krylov.following
    # At `position == rank` the writes below fall outside and are dropped; a broken decomposition writes zeros.
    basis = jax.tree.map(lambda rows, v: rows.at[position].set(v, mode="drop"), krylov.basis, vector)
    image = jax.tree.map(lambda w, v: w.astype(v.dtype), image, vector)
    scale = jnp.maximum(krylov.scale, trees.norm(image).astype(krylov.scale.dtype))
    coefficients, image = bases.orthogonalise_twice(basis, image)
    alpha = coefficients.at[position].get(mode="fill", fill_value=0)
    beta = trees.norm(image).astype(alpha.dtype)
    # With `<=` a NaN is no breakdown, so that it is reported; the threshold is zero for the zero operator, hence the second test.
    breaks = (beta <= bases.BREAKDOWN * jnp.finfo(alpha.dtype).eps * scale) | (beta == 0)
    return krylov.replace(
        basis=basis,
        following=trees.scale(jnp.where(breaks, 0.0, 1.0 / jnp.where(breaks, 1.0, beta)), image),
        alpha=krylov.alpha.at[position].set(alpha, mode="drop"),
        beta=krylov.beta.at[position].set(jnp.where(breaks, 0.0, beta), mode="drop"),
        scale=jnp.where(active, scale, krylov.scale),
        size=position + active,
        broken=jnp.where(active, breaks, krylov.broken),
    )


def _fresh(key: jax.Array, basis: PyTree) -> PyTree:
    """A random unit vector orthogonal to the basis; zero where the basis spans everything."""
    draw = probes.draw(key, jax.tree.map(lambda rows: rows[0], basis))
    length = trees.norm(draw)
    _, draw = bases.orthogonalise_twice(basis, draw)
    rest = trees.norm(draw)
    vanishes = rest <= bases.BREAKDOWN * jnp.finfo(length.dtype).eps * length
    draw = trees.scale(jnp.where(vanishes, 0.0, 1.0 / jnp.where(vanishes, 1.0, rest)), draw)
    # Once more at unit length: what is left may be small beside the draw, and its rounding not orthogonal.
    _, draw = bases.orthogonalise(basis, draw)
    rest = trees.norm(draw)
    return trees.scale(jnp.where(rest > 0, 1.0 / jnp.where(rest > 0, rest, 1.0), 0.0), draw)


def _alternating(order: np.ndarray) -> np.ndarray:
    """First, last, second, last but one, and so on."""
    mixed = np.empty_like(order)
    mixed[::2], mixed[1::2] = order[: -(-len(order) // 2)], order[::-1][: len(order) // 2]
    return mixed


def _residual_step(total: jax.Array, index: jax.Array, operator, vectors: PyTree, values: jax.Array) -> jax.Array:
    vector = jax.tree.map(lambda rows: rows[index], vectors)
    image = operator(jax.tree.map(lambda v, like: v.astype(like.dtype), vector, operator.like))
    return total.at[index].set(trees.norm(trees.add(image, vector, -values[index])).astype(total.dtype))


def _residuals(operator: operators.Operator, vectors: PyTree, values: jax.Array) -> jax.Array:
    values = values.astype(jax.tree.leaves(vectors)[0].dtype)
    return loops.repeat(_residual_step, jnp.zeros_like(values), values.shape[0], operator, vectors, values)


def start_like(like: PyTree, key: jax.Array, rank: int) -> Krylov:
    """`start` from the shapes and dtypes of the vectors alone."""
    wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), like)
    draw_key, fresh_key = jax.random.split(key)
    draw = probes.draw(draw_key, wide)
    following = trees.scale(1.0 / trees.norm(draw), draw)
    dtype = jnp.result_type(*jax.tree.leaves(wide))
    return Krylov(
        basis=jax.tree.map(lambda leaf: jnp.zeros((rank, *leaf.shape), leaf.dtype), wide),
        following=following,
        alpha=jnp.zeros(rank, dtype),
        beta=jnp.zeros(rank, dtype),
        scale=jnp.zeros((), dtype),
        size=jnp.int32(0),
        broken=jnp.bool_(False),
        key=fresh_key,
    )


def placement_of(like: PyTree) -> tuple[NamedSharding, ...] | None:
    """Where the leaves of `like` lie, if on a mesh: a vector that started elsewhere than it ends would compile twice."""
    placed = tuple(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(like))
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(like))
    return placed if placed and not traced and all(isinstance(one, NamedSharding) for one in placed) else None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _start(like: PyTree, key: jax.Array, rank: int, placement: tuple[NamedSharding, ...] | None) -> Krylov:
    krylov = start_like(like, key, rank)
    if placement is None:
        return krylov
    return jax.lax.with_sharding_constraint(krylov, _shardings(krylov, placement))


def _shardings(krylov: Krylov, placement: tuple[NamedSharding, ...]) -> Krylov:
    """Vectors lie as the leaves of `like` do, and what is small everywhere."""
    structure = jax.tree.structure(krylov.following)
    whole = NamedSharding(placement[0].mesh, PartitionSpec())
    rows = [NamedSharding(one.mesh, PartitionSpec(None, *one.spec)) for one in placement]
    return jax.tree.map(lambda _: whole, krylov).replace(
        basis=jax.tree.unflatten(structure, rows), following=jax.tree.unflatten(structure, placement)
    )
