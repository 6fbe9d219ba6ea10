"""Operators over a batch: the mean over its examples of a product that is given, one kept for many vectors, many in lock-step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from robust_vit import errors, loops, programs, trees
from robust_vit import mesh as meshes
from robust_vit.curvature import operators, subsets

PyTree = Any


class BatchOperator(flax.struct.PyTreeNode):
    """The mean over the examples of one resident batch of a linear map, and a shift.

    Attributes:
      like: the parameters that are differentiated; None where a leaf is not.
      rest: the others, with None where the first are.
      batch: leaves `[examples, ...]`.
      context: further operands of the loss.
      shift: added multiple of the identity.
      product: `product(batch, vector, like, rest, context) -> like vector`; static, equal for equal losses.
      microbatch: examples differentiated at a time; None is all; static.
      placed: how devices share the examples, so that each microbatch has rows of all of them; None is one device; static.
    """

    like: PyTree
    rest: PyTree
    batch: PyTree
    context: tuple
    shift: jax.Array
    product: Callable = flax.struct.field(pytree_node=False)
    microbatch: int | None = flax.struct.field(pytree_node=False, default=None)
    placed: NamedSharding | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def examples(self) -> int:
        """How many examples the batch has."""
        return jax.tree.leaves(self.batch)[0].shape[0]

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector; `jax.vmap` of it takes a block of them."""
        return _apply(self, vector)


def build(
    product: Callable,
    params: PyTree,
    batch: PyTree,
    context: tuple,
    subset: str | None,
    microbatch: int | None,
    weight_decay: float | jax.Array,
) -> BatchOperator:
    """The operator of these parts, checked: see `BatchOperator` and `robust_vit.curvature.hessian`. No passes.

    Raises:
      UserError: as `robust_vit.curvature.hessian`, but for what the loss is of its examples.
    """
    operator = assemble(product, params, batch, context, subset, microbatch, weight_decay)
    _check_differentiable(operator)
    return operator


def assemble(
    product: Callable,
    params: PyTree,
    batch: PyTree,
    context: tuple,
    subset: str | None,
    microbatch: int | None,
    weight_decay: float | jax.Array = 0.0,
) -> BatchOperator:
    """`build` without a look at whether the product can be formed, so that it need be no linear map: see `mean`."""
    chosen, rest = subsets.select(params, subset)
    subsets.check(chosen)
    placed = meshes.sharing(batch)
    size = meshes.rounded_up(check_examples(batch, microbatch), placed)
    microbatch = None if size >= np.shape(jax.tree.leaves(batch)[0])[0] else size
    shift = weight_decay if isinstance(weight_decay, jax.Array) else np.asarray(weight_decay, jnp.result_type(float))
    return BatchOperator(chosen, rest, batch, context, shift, product=product, microbatch=microbatch, placed=placed)


def check_examples(batch: PyTree, microbatch: int | None) -> int:
    """How many examples of the batch are taken at a time.

    Raises:
      UserError: leaves of several leading sizes, or a microbatch below one.
    """
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise errors.UserError(
            f"the leaves of the batch have leading sizes {sorted(map(str, sizes))}: expected one size, at least 1, for all."
        )
    if microbatch is not None and microbatch < 1:
        raise errors.UserError(
            f"microbatch is {microbatch}: expected a whole number from 1, or None for the whole batch."
        )
    examples = sizes.pop()
    return min(microbatch or examples, examples)


class Linearised(flax.struct.PyTreeNode):
    """An operator with all that does not depend on the vector computed. `linearise` makes it.

    Attributes:
      like: as the operator's.
      linear: the map, with what it keeps.
    """

    like: PyTree
    linear: Callable

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector."""
        return _call(self.linear, vector)


def linearise(operator: operators.Operator) -> Linearised:
    """The operator for many vectors: an application costs 2 gradients in place of 8/3 (Gauss-Newton: 4/3 in place of 5/3).

    It keeps the intermediate values of the pass at the parameters: about three times the memory of a gradient, and what
    rematerialisation saved is there again. So it pays for a small batch and many vectors. A program is compiled for it that
    no other operator uses.

    Args:
      operator: one over a resident batch, without microbatches.

    Raises:
      UserError: the operator is one over a data set, has microbatches, or takes finite differences.
    """
    if operators.by_host(operator):
        raise errors.UserError(
            "the operator reads a data set batch by batch, and nothing is kept between its applications: linearise one over a "
            "resident batch, or apply this one to a block of vectors."
        )
    if getattr(operators.innermost(operator), "microbatch", None) is not None:
        raise errors.UserError(
            "the operator has microbatches: what is kept of each would be all of it; build it without."
        )
    if _mode(operator) == "finite difference":
        raise errors.UserError("finite differences have nothing to keep: build the operator in another mode.")
    return Linearised(operator.like, _linearise(operator))


class Together(flax.struct.PyTreeNode):
    """Operators over batches of equal shapes, each on a vector of its own: one map that mixes none. `together` makes it.

    Attributes:
      like: like the operators' vectors with a leading axis, one for each of them.
      operator: one of them, whose batch has that axis too.
    """

    like: PyTree
    operator: BatchOperator

    def __call__(self, vectors: PyTree) -> PyTree:
        """Each map applied to its vector, `[operators, ...]`."""
        return _apply_each(self.operator, vectors)


def together(operators: Sequence[BatchOperator], *, mesh: Mesh | None = None) -> Together:
    """Independent operators as one, for Lanczos in lock-step (`curvature.example_eigenvalues`): one key and one result for each.

    It pays where one mini-batch does not fill the device, and over several devices, which then share the operators and send
    each other nothing. It does not on a CPU: there a convolutional network takes 2.9 times as long as one by one.

    Args:
      operators: of the same loss, parameters, context, shift and microbatch, over batches of equal shapes; for planning, the
        arrays may be shapes.
      mesh: the devices that share them.

    Raises:
      UserError: there are none, or they differ in more than their batches.
    """
    if not operators:
        raise errors.UserError("there are no operators to take together.")
    first = operators[0]
    shapes = {str(jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), one.batch)) for one in operators}
    same = [
        (one.product, one.microbatch) == (first.product, first.microbatch)
        and _same(one.replace(batch=None), first.replace(batch=None))
        for one in operators
    ]
    if len(shapes) > 1 or not all(same):
        raise errors.UserError(
            "the operators differ in more than their batches' values: take together those of one loss, one set of parameters, "
            "and batches of one shape."
        )
    count, placed = len(operators), None if mesh is None else meshes.examples(mesh, len(operators))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(first.batch)):

        def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *jnp.shape(leaf)), jnp.result_type(leaf), sharding=placed)

        return Together(
            jax.tree.map(stacked, first.like), first.replace(batch=jax.tree.map(stacked, first.batch), placed=None)
        )
    parts = [jax.tree.map(meshes.fetch, one.batch) for one in operators]
    batch = meshes.put_global(mesh, jax.tree.map(lambda *leaves: np.stack(leaves), *parts))
    return Together(_repeated(first.like, count, placed), first.replace(batch=batch, placed=None))


def _check_differentiable(operator: BatchOperator) -> None:
    """Traces one application, whose trace the first call uses again, so that what cannot be differentiated is named at once."""
    try:
        traced = _apply.trace(operator, operator.like)
        if _holds(traced.jaxpr.jaxpr, "custom_lin"):
            traced.lower()  # What JAX says of a kernel that has a gradient and no tangent, it says here.
    except (NotImplementedError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        way_out = ', or take mode="finite difference"; the loss has to be a scalar' if _mode(operator) else ""
        raise errors.UserError(
            f"the product cannot be formed ({reason}): a fused attention kernel has no such derivative, so build the model with "
            f'attention="explicit"{way_out}.'
        ) from error


def _holds(jaxpr: Any, name: str) -> bool:
    return any(
        equation.primitive.name == name or any(_holds(inner, name) for inner in programs.inner_jaxprs(equation))
        for equation in jaxpr.eqns
    )


def _mode(operator: operators.Operator) -> str | None:
    """The mode of the Hessian that an operator is made of; None of one that has none."""
    return getattr(getattr(operators.innermost(operator), "product", None), "mode", None)


@jax.jit
def _apply(operator: BatchOperator, vector: PyTree) -> PyTree:
    # The precision has to be set where the product is traced: f32 products are bf16 on a TPU and TF32 on a GPU otherwise.
    with jax.default_matmul_precision("highest"):
        product = mean(operator, vector)
    return shifted(product, operator.shift, vector)


@jax.jit
def apply_block(operator: BatchOperator, vectors: PyTree) -> PyTree:
    """The map applied to each of a block of vectors, `[block, ...]`."""
    return jax.vmap(_apply, in_axes=(None, 0))(operator, vectors)


def shifted(product: PyTree, shift: jax.Array | float, vector: PyTree) -> PyTree:
    """The product, and a multiple of the vector beside it."""
    return jax.tree.map(lambda hv, v: (hv + jnp.asarray(shift, hv.dtype) * v).astype(v.dtype), product, vector)


def mean(operator: BatchOperator, vector: PyTree) -> PyTree:
    """The mean over the examples, without the shift, microbatch by microbatch; of any pytree of means that the product gives."""
    batch, size, microbatch = operator.batch, operator.examples, operator.microbatch
    operands = vector, operator.like, operator.rest, operator.context
    with operators.model_errors():
        if microbatch is None or microbatch >= size:
            return operator.product(batch, *operands)
        stacked, rest = meshes.parts(batch, microbatch, operator.placed)
        share = size // microbatch * microbatch / size
        total = trees.scale(microbatch / size, loops.accumulate(operator.product, stacked, *operands))
        return total if rest is None else trees.add(total, operator.product(rest, *operands), 1.0 - share)


def rows(operator: BatchOperator, vector: PyTree) -> PyTree:
    """What the product gives of each example, `[examples, ...]` in their order, microbatch by microbatch."""
    batch, size, microbatch = operator.batch, operator.examples, operator.microbatch
    operands = vector, operator.like, operator.rest, operator.context
    with operators.model_errors():
        if microbatch is None or microbatch >= size:
            return operator.product(batch, *operands)
        stacked, rest = meshes.parts(batch, microbatch, operator.placed)
        found = loops.each(operator.product, stacked, *operands)
        return meshes.joined(found, None if rest is None else operator.product(rest, *operands), operator.placed)


@jax.jit
def _linearise(operator: operators.Operator) -> Callable:
    # The map is linear, so its derivative anywhere is itself; what does not depend on the vector is computed here.
    return jax.linearize(operator, trees.zeros_like(operator.like))[1]


def _same(one: BatchOperator, other: BatchOperator) -> bool:
    """Whether two operators hold the same arrays, or equal numbers."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    structures = jax.tree.structure(one) == jax.tree.structure(other)
    return structures and all(a is b or (np.ndim(a) == np.ndim(b) == 0 and a == b) for a, b in pairs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _repeated(like: PyTree, count: int, placed: NamedSharding | None) -> PyTree:
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (count, *leaf.shape)), like)
    return rows if placed is None else jax.lax.with_sharding_constraint(rows, placed)


@jax.jit
def _apply_each(operator: BatchOperator, vectors: PyTree) -> PyTree:
    def one(batch: PyTree, vector: PyTree) -> PyTree:
        return _apply(operator.replace(batch=batch), vector)

    return jax.vmap(one)(operator.batch, vectors)


@jax.jit
def _call(linear: Callable, vector: PyTree) -> PyTree:
    with jax.default_matmul_precision("highest"):
        return linear(vector)
