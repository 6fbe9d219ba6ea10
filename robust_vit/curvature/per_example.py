"""Eigenvalues and singular values of every example of a batch at once: Lanczos in lock-step over a block-diagonal operator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Key

from robust_vit import errors, loops, mesh, programs, trees
from robust_vit.curvature import bases, eigenvalues, jacobians, krylov, layouts, operators, subsets

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ExampleValues:
    """Eigenvalues or singular values of each example, with what is needed to trust them. Plain NumPy in float64.

    Attributes:
      values: `[batch, top]`, in the order asked for.
      residuals: `[batch, top]`: the example's operator has an eigenvalue (a Jacobian a singular value) no farther away than this.
      converged: `[batch, top]`: the residual is within `tolerance * |value|`, or within the rounding of the arithmetic.
      noise: `[batch]`: a value nearer to zero than this is not told from zero: `64 eps` of the example's largest eigenvalue; of
        singular values the root of that, because squaring takes half of the digits of small ones.
      steps: `[batch]`: steps until the example had what was asked for; what it has is from then.
      applications: of the operator, each to all examples.
      vectors: of unit length, like the operator's vectors with an axis `[top]` after the first, or None.
    """

    values: Float[np.ndarray, "batch top"]
    residuals: Float[np.ndarray, "batch top"]
    converged: Bool[np.ndarray, "batch top"]
    noise: Float[np.ndarray, " batch"]
    steps: Int[np.ndarray, " batch"]
    applications: int
    vectors: PyTree | None = None

    def of(self, example: int) -> eigenvalues.Eigenvalues:
        """What was found for one example, as `robust_vit.curvature.lanczos` returns it; without Ritz values and weights."""
        vectors = None if self.vectors is None else jax.tree.map(lambda rows: rows[example], self.vectors)
        return eigenvalues.Eigenvalues(
            values=self.values[example],
            residuals=self.residuals[example],
            converged=self.converged[example],
            noise=float(self.noise[example]),
            applications=int(self.steps[example]),
            ritz=np.zeros(0),
            weights=np.zeros(0),
            vectors=vectors,
        )


def lanczos(
    operator: operators.Operator,
    keys: Key[jax.Array, " batch"],
    *,
    rank: int = 30,
    top: int = 1,
    which: str = "magnitude",
    tolerance: float = 1e-3,
    check_every: int | None = None,
    verify: bool = False,
    vectors: bool = False,
) -> ExampleValues:
    """The extreme eigenvalues of each block of an operator that mixes no examples, such as `input_hessian`, with residuals.

    `robust_vit.curvature.lanczos` for every example at the same time: one application serves them all, and each has a basis,
    a tridiagonal matrix and a convergence of its own. An example's result depends on its own block and key alone: it is taken
    when the example has converged, whatever the others do after that.

    Cost: up to `rank` applications, rounded up to a multiple of `check_every`, plus `top` with `verify`; memory of `rank + 3`
    batches of vectors. One compilation for each operator structure, batch size and rank.

    Args:
      operator: vectors have leaves `[batch, ...]`; block-diagonal over the first axis.
      keys: one an example: draws its starting vector.
      rank: steps at most; no more than an example's dimension.
      top: how many eigenvalues of each example; no more than its dimension.
      which: `magnitude`, `largest`, `smallest`, or `both ends`: the largest, the smallest, the second largest, and so on.
      tolerance: relative residual at which a value counts as converged.
      check_every: look every so many steps which examples have converged (`eigenvalues.settled`), and stop when all have; None
        takes all steps.
      verify: compute the residuals outright from the Ritz vectors rather than by the Lanczos estimate.
      vectors: return the Ritz vectors too.

    Raises:
      UserError: the operator returned a NaN or an infinity for an example, which is named; fewer steps than eigenvalues; not one
        key for each example.
    """
    if which not in eigenvalues.ORDERS:
        raise errors.unknown("order of eigenvalues", which, eigenvalues.ORDERS)
    batch = _batch(operator.like)
    if jnp.shape(keys) != (batch,):
        raise errors.UserError(
            f"keys have shape {jnp.shape(keys)} for {batch} examples: give one typed key an example."
        )
    dimension = trees.count(operator.like) // batch
    top = min(top, dimension)
    if top < 1 or rank < top:
        raise errors.UserError(f"rank is {rank} for {top} eigenvalues: expected at least as many steps as eigenvalues.")
    rank = min(rank, dimension)
    chunk = min(check_every or rank, rank)
    state = _start(operator.like, keys, rank, _layout(operator.like), _placement(operator.like))
    found: list[eigenvalues.Eigenvalues | None] = [None] * batch
    coefficients = np.zeros((batch, rank, top))
    applications = 0
    while True:
        state = loops.repeat(_step, state, chunk, operator, donate=True)
        applications += chunk
        examples = krylov.lanes(state)
        for example in [index for index, one in enumerate(found) if one is None]:
            one = examples[example]
            size = int(one.size)
            if not (np.isfinite(one.alpha[:size]).all() and np.isfinite(one.scale)):
                raise operators.not_finite(example=example)
            result, parts, rows = eigenvalues.solve(one, top, which, tolerance)
            spent = size == rank or one.broken
            if spent or (check_every and eigenvalues.settled(one, result, top, which, tolerance)):
                found[example], coefficients[example, rows] = result, parts
        if all(one is not None for one in found):
            break
    chosen = [one for one in found if one is not None]
    values = np.stack([one.values for one in chosen])
    residuals, noise = np.stack([one.residuals for one in chosen]), np.asarray([one.noise for one in chosen])
    eigenvectors = None
    if verify or vectors:
        eigenvectors = _combine(state.basis, jnp.asarray(coefficients, state.alpha.dtype))
        eigenvectors = state.layout.apart(eigenvectors, 2)
        if verify:
            residuals = np.asarray(mesh.fetch(_residuals(operator, eigenvectors, values)), np.float64)
            applications += top
    return ExampleValues(
        values=values,
        residuals=residuals,
        converged=residuals <= np.maximum(tolerance * np.abs(values), noise[:, None]),
        noise=noise,
        steps=np.asarray([one.applications for one in chosen]),
        applications=applications,
        vectors=eigenvectors if vectors else None,
    )


def singular_values(
    function: Callable,
    inputs: PyTree,
    *context: PyTree,
    keys: Key[jax.Array, " batch"],
    rank: int = 30,
    top: int = 1,
    tolerance: float = 1e-3,
    check_every: int | None = None,
    vectors: bool = False,
) -> ExampleValues:
    """The largest singular values of each example's Jacobian in its input: of logits, or of any feature.

    Lanczos on `JJ'` or `J'J`, whichever is smaller: of the logits of ten classes the former, complete after ten steps. A largest
    singular value has all its digits so; below `noise`, 3e-3 of the largest in float32, one is not told from zero, because
    squaring takes half of the digits there.

    Cost: an application is one forward pass, its tangent and a backward pass, 5/3 of an input gradient; up to `rank` of them, and
    `top` backward passes with `vectors`.

    Args:
      function: `function(inputs, *context) -> [batch, ...]`, each row of its own input alone; a named function or a frozen
        dataclass, as the loss of `hessian`.
      inputs: leaves `[batch, ...]`, float32 or float64.
      *context: pytrees handed to the function as they are.
      keys: one an example: draws its starting vector.
      rank: steps at most.
      top: how many of each example; no more than the smaller dimension.
      tolerance: relative residual of the square at which a value counts as converged.
      check_every: as of `lanczos`.
      vectors: return the right singular vectors, like the inputs: what change of the input moves the function most.

    Raises:
      UserError: as `lanczos`; a function without a row for each example.
    """
    operator = _gram(function, inputs, context)
    options = {"rank": rank, "top": top, "tolerance": tolerance, "check_every": check_every}
    found = lanczos(operator, keys, which="largest", vectors=vectors, **options)
    squares = np.maximum(found.values, 0.0)
    values = np.sqrt(squares)
    # |s^2 - v^2| <= r means |s - v| <= r / (s + v), and never more than the root of r.
    residuals = np.minimum(np.sqrt(found.residuals), found.residuals / np.maximum(values, 1e-300))
    patterns = found.vectors
    if vectors and isinstance(operator, jacobians.OuterGram):
        patterns = _patterns(operator.jacobian, patterns)
    return dataclasses.replace(found, values=values, residuals=residuals, noise=np.sqrt(found.noise), vectors=patterns)


@functools.partial(jax.jit, static_argnums=0)
def gradient_norms(loss: Callable, inputs: PyTree, *context: PyTree) -> Float[jax.Array, " batch"]:
    """The Euclidean norm of each example's gradient in its input, `[batch]`. One gradient; arguments as of `input_hessian`."""
    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(lambda inputs: loss(inputs, *context).sum())(inputs)
    return jax.vmap(trees.norm)(gradient)


def planned(
    operator: operators.Operator, keys: Any, *, rank: int, check_every: int | None = None
) -> list[programs.Program]:
    """The compiled programs of `lanczos` with how often each runs at most, for planning; arrays may be shapes."""
    rank = min(rank, trees.count(operator.like) // _batch(operator.like))
    chunk = min(check_every or rank, rank)
    placement = _placement(operator.like)
    state = _start.eval_shape(operator.like, keys, rank, _layout(operator.like), placement)
    if placement is not None:
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), state)
    step = loops.plan(_step, state, chunk, operator, donate=True)
    return [dataclasses.replace(step, times=step.times * -(-rank // chunk))]


def planned_singular_values(
    function: Callable, inputs: PyTree, *context: PyTree, keys: Any, rank: int, check_every: int | None = None
) -> list[programs.Program]:
    """The compiled programs of `singular_values`, likewise."""
    return planned(_gram(function, inputs, context), keys, rank=rank, check_every=check_every)


def _gram(function: Callable, inputs: PyTree, context: tuple) -> jacobians.Gram | jacobians.OuterGram:
    subsets.check(inputs)
    jacobian = jacobians.Jacobian(inputs, context, function)
    value = jax.eval_shape(lambda inputs, context: function(inputs, *context), inputs, context)
    batch = _batch(inputs)
    for leaf in jax.tree.leaves(value):
        if not leaf.shape or leaf.shape[0] != batch:
            raise errors.UserError(
                f"the function gives {tuple(leaf.shape)} for {batch} examples: expected a row for each example, [{batch}, ...]."
            )
    if trees.count(value) >= trees.count(inputs):
        return jacobian.gram()
    planning = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(inputs))
    placement = _placement(inputs)
    make = jax.ShapeDtypeStruct if planning else functools.partial(jnp.zeros, device=placement)
    like = jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), value)
    if planning:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), like)
    return jacobians.OuterGram(jacobian, like)


def _batch(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _placement(like: PyTree) -> NamedSharding | None:
    """Where a row for each example lies, if on a mesh."""
    placed = getattr(jax.tree.leaves(like)[0], "sharding", None)
    if not isinstance(placed, NamedSharding):
        return None
    return NamedSharding(placed.mesh, PartitionSpec(*placed.spec[:1]))


def _step(state: krylov.Krylov, index: jax.Array, operator: operators.Operator) -> krylov.Krylov:
    """One step of all examples: the operator takes them together, and all else is of each alone."""
    del index
    following = state.layout.apart(state.following, 2)
    images = operator(jax.tree.map(lambda v, like: v[:, 0].astype(like.dtype), following, operator.like))
    images = state.layout.together(jax.tree.map(lambda image: image[:, None], images), 2)
    return jax.vmap(krylov.absorb)(state, images)


def _layout(like: PyTree) -> layouts.Layout:
    """Of an example's vectors, all of which lie on the same devices."""
    return layouts.of(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), like))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _start(
    like: PyTree, keys: jax.Array, rank: int, layout: layouts.Layout, placement: NamedSharding | None
) -> krylov.Krylov:
    state = jax.vmap(lambda one, key: krylov.start_like(one, key, rank, layout))(like, keys)
    if placement is None:
        return state
    return jax.lax.with_sharding_constraint(state, jax.tree.map(lambda _: placement, state))


_combine = jax.jit(jax.vmap(bases.combine))


def _residual_step(total: jax.Array, index: jax.Array, operator, vectors: PyTree, values: jax.Array) -> jax.Array:
    vector = jax.tree.map(lambda rows: rows[:, index], vectors)
    image = operator(jax.tree.map(lambda v, like: v.astype(like.dtype), vector, operator.like))
    norms = jax.vmap(lambda image, v, value: bases.length(trees.add(image, v, -value)))(image, vector, values[:, index])
    return total.at[:, index].set(norms.astype(total.dtype))


def _residuals(operator: operators.Operator, vectors: PyTree, values: np.ndarray) -> jax.Array:
    values = jnp.asarray(values, jax.tree.leaves(vectors)[0].dtype)
    return loops.repeat(_residual_step, jnp.zeros_like(values), values.shape[1], operator, vectors, values)


@jax.jit
def _patterns(jacobian: jacobians.Jacobian, vectors: PyTree) -> PyTree:
    """`J'u` of unit length for each of `[batch, top, ...]`; zero where the singular value is."""
    pulled = jax.vmap(jacobian.transposed, in_axes=1, out_axes=1)(vectors)
    return jax.vmap(jax.vmap(trees.unit))(pulled)
