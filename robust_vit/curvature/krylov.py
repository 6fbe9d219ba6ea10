"""Block Lanczos decompositions on pytrees, with full reorthogonalisation: started, extended, projected."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import errors, loops, mesh, programs, trees
from robust_vit.curvature import bases, layouts, operators, probes

PyTree = Any
# Vectors between two saves, where nobody looks for convergence.
SAVE_EVERY = 10
# What rounding, other devices included, makes of one product is far below this share of it.
_SAME = 1e-3


class Krylov(flax.struct.PyTreeNode):
    """A Lanczos decomposition `A Q = Q T + (the following block) beta[-1]'`, as far as it has come. `block` is one or more.

    Where an invariant subspace is complete, no next vector follows from a vector of it: a random direction, orthogonal to all,
    takes its place. Several decompositions in lock-step have one more axis, before all others. Vectors lie as `layout` says.

    Attributes:
      basis: like the vectors with a leading axis `[steps * block]`; orthonormal rows, or zeros: rows to come, and the rest of
        a block where the dimension is used up.
      following: the orthonormal block `[block, ...]` that the next step starts from.
      alpha: diagonal blocks of T, `[steps, block, block]`.
      beta: couplings, `[steps, block, block]`: `beta[j, a, b]` between vector a of block j and vector b of block j+1; zero where
        an invariant subspace was complete.
      kept: `[steps * block]`: which rows of the basis are vectors.
      scale: the largest `|A q|` met: a lower bound of |A|.
      size: steps done.
      broken: there is no room, or no direction is left: further steps do nothing.
      key: of the random directions.
      layout: which leaves of the operator's vectors are members of one array here; static.
    """

    basis: PyTree
    following: PyTree
    alpha: Float[Array, "*lanes steps block block"]
    beta: Float[Array, "*lanes steps block block"]
    kept: Bool[Array, "*lanes rows"]
    scale: Float[Array, "*lanes"]
    size: Int[Array, "*lanes"]
    broken: Bool[Array, "*lanes"]
    key: Key[Array, "*lanes"]
    layout: layouts.Layout = flax.struct.field(pytree_node=False)

    @property
    def steps(self) -> int:
        """How many steps there is room for."""
        return self.alpha.shape[-3]

    @property
    def block(self) -> int:
        """Vectors a step."""
        return self.alpha.shape[-1]

    @property
    def width(self) -> int:
        """Vectors that the operator is applied to in a step: a block of each of those in lock-step."""
        return self.size.size * self.block


def start(
    operator: operators.Operator, key: Key[Array, ""], *, rank: int, block: int = 1, first: PyTree | None = None
) -> Krylov:
    """An empty decomposition with room for `rank` vectors (rounded up to whole blocks), the first of them drawn from the key.

    Args:
      operator: the map.
      key: draws the first block, and fresh directions later; several keys, `[lanes]`, start as many decompositions in lock-step.
      rank: vectors.
      block: vectors a step.
      first: the first block `[block, ...]` in place of the draw; of any length, linearly independent.
    """
    layout = layouts.of(operator.like)
    krylov = _start(operator.like, key, rank, block, layout, placement_of(operator.like))
    if first is None:
        return krylov
    given = jax.tree.map(jnp.shape, first)
    wanted = jax.tree.map(lambda leaf: (block, *jnp.shape(leaf)), operator.like)
    if given != wanted:
        raise errors.UserError(
            f"the first vectors are {given}: expected {wanted}, {block} like the operator's vectors."
        )
    first = layout.together(first, 1)
    krylov = _begin(krylov, jax.tree.map(lambda v, old: jnp.asarray(v, old.dtype), first, krylov.following))
    if not (trees.all_finite(krylov.following) and jnp.all(jax.vmap(trees.norm)(krylov.following) > 0)):
        raise errors.UserError(
            "the first vectors are zero, not finite, or not linearly independent: give others, or none."
        )
    return krylov


def extend(operator: operators.Operator, krylov: Krylov, *, steps: int, donate: bool = False) -> Krylov:
    """The decomposition after `steps` more steps: one application to all its following vectors each. Pure: jits and vmaps.

    Steps beyond the room that there is leave it as it is.

    Args:
      operator: the map. One over a data set (`curvature.stream`) is applied by the host, one pass over the data a step.
      krylov: the decomposition, or several in lock-step.
      steps: how many.
      donate: give up the memory of `krylov`, which may not be used again.
    """
    if operators.by_host(operator):
        for _ in range(steps):
            krylov = _absorb_in_place(krylov, image(operator, krylov))
        return krylov
    return loops.repeat(_step, krylov, steps, operator, donate=donate)


def projected(krylov: Krylov) -> tuple[Float[np.ndarray, "rows rows"], Float[np.ndarray, "rows block"], np.ndarray]:
    """The operator in the basis, on the host in float64.

    Returns:
      T, symmetric, over the rows that are vectors; each row's coupling with the block to come; and the numbers of these rows.

    Raises:
      UserError: the operator returned a NaN or an infinity.
    """
    size, block = int(krylov.size), krylov.block
    alpha = np.asarray(krylov.alpha, np.float64)[:size]
    beta = np.asarray(krylov.beta, np.float64)[:size]
    finite = np.isfinite(alpha).all(axis=(1, 2)) & np.isfinite(beta).all(axis=(1, 2))
    if not (finite.all() and np.isfinite(float(krylov.scale))):
        raise operators.not_finite(int(np.argmin(finite)) * block + 1)
    matrix = np.zeros((size * block, size * block))
    for step in range(size):
        here = slice(step * block, (step + 1) * block)
        # Rounding makes the block unsymmetric.
        matrix[here, here] = (alpha[step] + alpha[step].T) / 2
        if step + 1 < size:
            after = slice((step + 1) * block, (step + 2) * block)
            matrix[here, after], matrix[after, here] = beta[step], beta[step].T
    outward = np.zeros((size * block, block))
    outward[(size - 1) * block :] = beta[-1]
    rows = np.flatnonzero(np.asarray(krylov.kept)[: size * block])
    return matrix[np.ix_(rows, rows)], outward[rows], rows


def lanes(krylov: Krylov) -> list[Krylov]:
    """Each of those in lock-step, or the one, on the host and without its vectors: what `projected` needs."""
    small = mesh.fetch(krylov.replace(basis=None, following=None, key=None))
    if not krylov.size.ndim:
        return [small]
    return [jax.tree.map(lambda leaf, lane=lane: leaf[lane], small) for lane in range(len(small.size))]


def combine(krylov: Krylov, rows: np.ndarray, coefficients: Float[np.ndarray, "rows count"]) -> PyTree:
    """Vectors `[count, ...]`, like the operator's, of the coefficients in these rows of the basis."""
    padded = np.zeros((krylov.kept.shape[0], coefficients.shape[1]))
    padded[rows] = coefficients
    return krylov.layout.apart(bases.combine(krylov.basis, jnp.asarray(padded, krylov.alpha.dtype)), 1)


def planned(
    operator: operators.Operator, *, rank: int, block: int = 1, check_every: int | None = None
) -> list[programs.Program]:
    """The compiled programs of `lanczos` with how often each runs at most, for planning; the operator's arrays may be shapes."""
    steps, chunk = counts(operator, rank, block, check_every)
    key = jax.eval_shape(lambda: jax.random.key(0))
    layout, placement = layouts.of(operator.like), placement_of(operator.like)
    krylov = _start.eval_shape(operator.like, key, steps * block, block, layout, placement)
    if placement is not None:
        placed = _shardings(krylov, placement)
        krylov = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), krylov, placed)
    step = loops.plan(_step, krylov, chunk, operator, donate=True)
    return [dataclasses.replace(step, times=step.times * -(-steps // chunk))]


def counts(
    operator: operators.Operator, rank: int, block: int, check_every: int | None, *, saved: bool = False
) -> tuple[int, int]:
    """Steps for `rank` vectors, no more than the dimension has, and the steps between two looks.

    Args:
      operator: the map.
      rank: vectors.
      block: vectors a step.
      check_every: vectors between two looks; None has one look at the end, or, where it is saved, some of equal distance.
      saved: whether what there is at a look is saved.
    """
    steps = -(-min(rank, trees.count(operator.like)) // block)
    if check_every is None:
        return steps, -(-steps // max(1, -(-steps * block // SAVE_EVERY))) if saved else steps
    return steps, max(1, min(steps, check_every // block))


def _step(krylov: Krylov, index: jax.Array, operator: operators.Operator) -> Krylov:
    """One step. The vector goes in by its number in the decomposition, so that the run may be cut anywhere."""
    del index
    return _absorb(krylov, _images(operator, krylov))


def image(operator: operators.Operator, krylov: Krylov) -> PyTree:
    """What the operator makes of the vectors that follow, in the decomposition's layout, outside of a program."""
    return _images(operator, krylov) if operators.by_host(operator) else _images_at_once(operator, krylov)


def _images(operator: operators.Operator, krylov: Krylov) -> PyTree:
    def flat(vectors: jax.Array, like: jax.Array) -> jax.Array:
        return vectors.reshape(krylov.width, *like.shape).astype(like.dtype)

    axis = krylov.size.ndim + 1
    following = krylov.layout.apart(krylov.following, axis)
    vectors = jax.tree.map(flat, following, operator.like)
    if operators.by_host(operator):
        images = operator.block(vectors)
    elif krylov.width == 1:
        images = jax.tree.map(lambda leaf: leaf[None], operator(jax.tree.map(lambda leaf: leaf[0], vectors)))
    else:
        images = jax.vmap(operator)(vectors)
    images = jax.tree.map(lambda image, v: image.reshape(v.shape), images, following)
    return krylov.layout.together(images, axis)


_images_at_once = jax.jit(_images)


def absorb(krylov: Krylov, images: PyTree) -> Krylov:
    """The decomposition after a step, given what the operator makes of the block that follows, in the same layout."""
    block = krylov.block
    active = (krylov.size < krylov.steps) & ~krylov.broken
    # Where nothing is to be done the writes fall outside and are dropped.
    position = jnp.where(active, krylov.size, krylov.steps)
    rows = position * block + jnp.arange(block)
    following = krylov.following
    basis = jax.tree.map(lambda all_rows, v: all_rows.at[rows].set(v, mode="drop"), krylov.basis, following)
    images = jax.tree.map(lambda w, v: w.astype(v.dtype), images, following)
    dtype = krylov.alpha.dtype
    # In units in which no square under- or overflows.
    unit = bases.magnitude(images).astype(dtype)
    images = bases.shrunk(images, unit)
    scale = jnp.maximum(krylov.scale, unit * jnp.max(jax.vmap(trees.norm)(images)).astype(dtype))
    like = jax.tree.map(lambda all_rows: all_rows[0], basis)

    def fresh() -> PyTree:
        drawn = jax.vmap(lambda number: probes.draw_again(krylov.key, number, like))(rows)
        return trees.scale(1.0 / np.sqrt(trees.count(like)), drawn)

    # The last of all needs none to follow it.
    wanted = active & (krylov.size + 1 < krylov.steps)
    inside, beta, images = bases.orthonormalise(basis, images, scale / unit, fresh=fresh, wanted=wanted)
    alpha = inside.at[:, rows].get(mode="fill", fill_value=0)
    return krylov.replace(
        basis=basis,
        following=_choose(active, images, following),
        alpha=krylov.alpha.at[position].set(unit * alpha.astype(dtype), mode="drop"),
        beta=krylov.beta.at[position].set(unit * beta.astype(dtype), mode="drop"),
        # A NaN is no zero, so that it is reported.
        kept=krylov.kept.at[rows].set(jax.vmap(trees.norm)(following) != 0, mode="drop"),
        scale=jnp.where(active, scale, krylov.scale),
        size=krylov.size + active,
        broken=jnp.where(active, trees.norm(images) == 0, krylov.broken),
    )


def _absorb(krylov: Krylov, images: PyTree) -> Krylov:
    return jax.vmap(absorb)(krylov, images) if krylov.size.ndim else absorb(krylov, images)


@jax.jit
def ended(krylov: Krylov) -> jax.Array:
    return jnp.all((krylov.size == krylov.steps) | krylov.broken)


@jax.jit
def is_of(krylov: Krylov, images: PyTree) -> jax.Array:
    """Whether these are the images of the first block."""
    if krylov.size.ndim:
        return jax.vmap(is_of)(krylov, images)
    block = krylov.block
    first = jax.tree.map(lambda rows: rows[:block], krylov.basis)
    second = krylov.following
    if krylov.steps > 1:
        rows = jax.tree.map(lambda rows: rows[block : 2 * block], krylov.basis)
        second = _choose(krylov.size > 1, rows, second)
    saved = trees.add(bases.combine(first, krylov.alpha[0].T), bases.combine(second, krylov.beta[0].T))
    # A NaN is no difference, so that it is reported as what it is.
    return ~(bases.length(trees.add(saved, images, -1.0)) > _SAME * bases.length(images))


@jax.jit
def _begin(krylov: Krylov, first: PyTree) -> Krylov:
    unit = jax.vmap(bases.unit)(first)
    _, _, unit = bases.orthonormalise(krylov.basis, unit, jnp.ones_like(krylov.scale))
    return krylov.replace(following=unit)


_absorb_in_place = jax.jit(_absorb, donate_argnums=0)


def _choose(condition: jax.Array, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _draw(key: jax.Array, like: PyTree, block: int) -> PyTree:
    """Random unit vectors `[block, ...]`; the first is the same for every size of the block."""
    draws = [probes.draw(jax.random.fold_in(key, i) if i else key, like) for i in range(block)]
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(trees.scale(1.0 / trees.norm(each), each) for each in draws)
    )


def start_like(like: PyTree, key: jax.Array, rank: int, layout: layouts.Layout, block: int = 1) -> Krylov:
    """`start` from the shapes and dtypes of the vectors alone, and their layout."""
    wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), like)
    wide = layout.together(wide)
    steps = -(-rank // block)
    draw_key, fresh_key = jax.random.split(key)
    dtype = jnp.result_type(*jax.tree.leaves(wide))
    basis = jax.tree.map(lambda leaf: jnp.zeros((steps * block, *leaf.shape), leaf.dtype), wide)
    following = _draw(draw_key, wide, block)
    if block > 1:
        _, _, following = bases.orthonormalise(basis, following, jnp.ones((), dtype))
    return Krylov(
        basis=basis,
        following=following,
        alpha=jnp.zeros((steps, block, block), dtype),
        beta=jnp.zeros((steps, block, block), dtype),
        kept=jnp.zeros(steps * block, bool),
        scale=jnp.zeros((), dtype),
        size=jnp.int32(0),
        broken=jnp.bool_(False),
        key=fresh_key,
        layout=layout,
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _start(
    like: PyTree,
    key: jax.Array,
    rank: int,
    block: int,
    layout: layouts.Layout,
    placement: tuple[NamedSharding, ...] | None,
) -> Krylov:
    begin = functools.partial(start_like, like, rank=rank, layout=layout, block=block)
    krylov = jax.vmap(begin)(key) if key.ndim else begin(key)
    if placement is None:
        return krylov
    return jax.lax.with_sharding_constraint(krylov, _shardings(krylov, placement))


def placement_of(like: PyTree) -> tuple[NamedSharding, ...] | None:
    """Where the leaves of `like` lie, if on a mesh: a vector that started elsewhere than it ends would compile twice."""
    placed = tuple(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(like))
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(like))
    return placed if placed and not traced and all(isinstance(one, NamedSharding) for one in placed) else None


def _shardings(krylov: Krylov, placement: tuple[NamedSharding, ...]) -> Krylov:
    """Vectors lie as the leaves of `like` do, and what is small everywhere."""
    structure = jax.tree.structure(krylov.following)
    whole = NamedSharding(placement[0].mesh, PartitionSpec())
    before = [None] * (krylov.size.ndim + 1)
    placed = krylov.layout.shardings(placement)
    rows = jax.tree.unflatten(structure, [NamedSharding(one.mesh, PartitionSpec(*before, *one.spec)) for one in placed])
    return jax.tree.map(lambda _: whole, krylov).replace(basis=rows, following=rows)
