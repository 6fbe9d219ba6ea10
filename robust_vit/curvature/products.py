"""Matrix-vector products: Hessian, Gauss-Newton, Fisher, input Hessian and Jacobian, of a batch or of a whole data set.

Each is an operator on the pytree of the parameters, or of those whose path matches a regular expression; none is ever a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import errors, loops, trees
from robust_vit.curvature import operators

PyTree = Any
MODES = ("forward over reverse", "reverse over reverse", "finite difference")
# What rounding may make of the sum of four losses; statistics over the batch change a loss by a per cent and more.
_SEPARABLE = 1e-4


class BatchOperator(flax.struct.PyTreeNode):
    """The mean over the examples of one resident batch of a linear map, and a shift. The builders below make it.

    Attributes:
      like: the parameters that are differentiated; None where a leaf is not.
      rest: the others, with None where the first are.
      batch: leaves `[examples, ...]`.
      context: further operands of the loss.
      shift: added multiple of the identity.
      product: `product(batch, vector, like, rest, context) -> like vector`; static, equal for equal losses.
      microbatch: examples differentiated at a time; None is all; static.
    """

    like: PyTree
    rest: PyTree
    batch: PyTree
    context: tuple
    shift: jax.Array
    product: Callable = flax.struct.field(pytree_node=False)
    microbatch: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def examples(self) -> int:
        """How many examples the batch has."""
        return jax.tree.leaves(self.batch)[0].shape[0]

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector; `jax.vmap` of it takes a block of them."""
        return _apply(self, vector)


def hessian(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *context: PyTree,
    subset: str | None = None,
    mode: str = "forward over reverse",
    microbatch: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    separable: bool = True,
) -> BatchOperator:
    """The Hessian of `loss + weight_decay / 2 * |params|^2` in the parameters, over one batch.

    Cost: four forward passes now; one application costs 8/3 gradients of the batch. In a block the pass at the parameters is
    shared: k vectors cost (2 + 6k)/3 gradients (`jax.vmap(operator)`). Rounding: 2e-7 relative to the largest eigenvalue in
    float32.

    Args:
      loss: `loss(params, batch, *context) -> scalar`: the mean over the examples of the batch. A named function or a frozen
        dataclass, because it is a part of the compiled program's key. Randomness in it has to be frozen (a key in the batch),
        or it is no one linear map.
      params: the leaves that are differentiated are float32 or float64.
      batch: a pytree whose leaves are `[examples, ...]`. Another batch of the same shapes compiles nothing.
      *context: pytrees handed to the loss as they are, for example a classifier.
      subset: regular expression searched in each parameter's path (`block03/mlp`): the Hessian in those alone. Vectors have
        None in the places of the others.
      mode: `forward over reverse`, which keeps rematerialisation; `reverse over reverse`, which does not; or `finite
        difference` of two gradients, for kernels without a second derivative: 2 gradients, with an error of about 1e-4.
      microbatch: examples differentiated at a time, to save memory; the last one may be smaller, and counts by its size.
      weight_decay: added multiple of the identity: L2 shifts every eigenvalue by exactly this.
      separable: try whether the loss is a mean over examples, which BatchNorm in training mode undoes; False leaves that out,
        for a loss that is known to be one, or for one that is none: a microbatch then has another Hessian.

    Raises:
      UserError: parameters that are not float32 or wider, or none; a subset that matches none; a batch of several sizes; a loss
        that is no scalar, not finite, no mean over examples, or that JAX cannot differentiate twice.
    """
    if mode not in MODES:
        raise errors.unknown("mode of the Hessian", mode, MODES)
    operator = _build(_Hessian(loss, mode), params, batch, context, subset, microbatch, weight_decay)
    if separable:
        _check_separable(loss, params, batch, context)
    return operator


def gauss_newton(
    outputs: Callable,
    params: PyTree,
    batch: PyTree,
    *context: PyTree,
    loss: Callable | None = None,
    subset: str | None = None,
    microbatch: int | None = None,
    weight_decay: float | jax.Array = 0.0,
) -> BatchOperator:
    """The generalised Gauss-Newton matrix, the mean of `J' H J` with H the Hessian of the loss in the outputs (Schraudolph 2002).

    Positive semidefinite for a convex loss, and the true Fisher information of a softmax classifier. Cost of an application: 5/3
    gradients. Arguments as of `hessian`, and

    Args:
      outputs: `outputs(params, batch, *context) -> [examples, ...]`, such as logits `[examples, classes]`.
      loss: `loss(outputs, batch) -> scalar`, the mean over the examples; None for softmax cross-entropy, analytically: H is then
        `diag(p) - pp'`, whatever the labels and their smoothing are.
    """
    return _build(_GaussNewton(outputs, loss), params, batch, context, subset, microbatch, weight_decay)


def fisher(
    logits: Callable,
    params: PyTree,
    batch: PyTree,
    *context: PyTree,
    kind: str = "true",
    labels: jax.Array | None = None,
    key: jax.Array | None = None,
    subset: str | None = None,
    microbatch: int | None = None,
    weight_decay: float | jax.Array = 0.0,
) -> BatchOperator:
    """The Fisher information of a softmax classifier: the mean of `g g'`, g an example's gradient of the log-likelihood.

    Cost of an application: 5/3 gradients; `sampled` takes one forward pass of the batch now. Arguments as of `hessian`, and

    Args:
      logits: `logits(params, batch, *context) -> [examples, classes]`.
      kind: `true`: labels distributed as the model says, exactly: the Gauss-Newton matrix; `sampled`: one such draw an example;
        `empirical`: the data's labels, which makes it another matrix (Kunstner et al. 2019, arXiv 1905.12558).
      labels: `[examples]`, for `empirical`.
      key: draws the labels, for `sampled`; an example's draw depends on the key and its place in the batch.

    Raises:
      UserError: as `hessian`; an unknown kind; `labels` or `key` missing, or given where they do not belong.
    """
    kinds = ("true", "sampled", "empirical")
    if kind not in kinds:
        raise errors.unknown("kind of Fisher information", kind, kinds)
    for name, value, needs in (("labels", labels, "empirical"), ("key", key, "sampled")):
        if (value is not None) != (kind == needs):
            wanted = "needs" if kind == needs else "takes no"
            raise errors.UserError(f"kind={kind!r} {wanted} `{name}`: `{name}` belongs to kind={needs!r}.")
    if kind == "true":
        options = {"subset": subset, "microbatch": microbatch, "weight_decay": weight_decay}
        return gauss_newton(logits, params, batch, *context, **options)
    if kind == "sampled":
        labels = _sample(logits, params, batch, context, key)
    return _build(_Scores(logits), params, (batch, labels), context, subset, microbatch, weight_decay)


def input_hessian(loss: Callable, inputs: jax.Array, *context: PyTree) -> BatchOperator:
    """The Hessian of each example's loss in its input: one operator on `[examples, ...]` that mixes no examples.

    Applied to a block of vectors, one an example, it gives each example's product; solvers that work an example at a time run in
    lock-step on it. Cost of an application: 8/3 input gradients.

    Args:
      loss: `loss(inputs, *context) -> [examples]`, each of its own input alone.
      inputs: `[examples, ...]`, float32 or float64.
      *context: pytrees handed to the loss as they are, such as labels and a classifier.
    """
    return _build(_InputHessian(loss), inputs, jnp.zeros(1), context, None, None, 0.0)


class Jacobian(flax.struct.PyTreeNode):
    """The derivative of a function at a point. `jacobian` makes it.

    Attributes:
      point: where.
      context: further operands of the function.
      function: `function(point, *context)`; static.
    """

    point: PyTree
    context: tuple
    function: Callable = flax.struct.field(pytree_node=False)

    def __call__(self, vector: PyTree) -> PyTree:
        """`J v`, like the function's value. One forward pass and its tangent."""
        return _push(self, vector)

    def transposed(self, vector: PyTree) -> PyTree:
        """`J' u`, like the point: a gradient's cost."""
        return _pull(self, vector)

    def gram(self) -> Gram:
        """`J'J`, whose largest eigenvalue is the square of J's largest singular value."""
        return Gram(self)


class Gram(flax.struct.PyTreeNode):
    """`J'J` as an operator."""

    jacobian: Jacobian

    @property
    def like(self) -> PyTree:
        """The point."""
        return self.jacobian.point

    def __call__(self, vector: PyTree) -> PyTree:
        """`J'J v`: 5/3 of a gradient."""
        return self.jacobian.transposed(self.jacobian(vector))


def jacobian(function: Callable, point: PyTree, *context: PyTree) -> Jacobian:
    """The derivative of `function(point, *context)` in the point, as `J v`, `J' u` and `J'J v`. No passes now.

    Args:
      function: a named function or a frozen dataclass, as the loss of `hessian`.
      point: float32 or float64 leaves.
      *context: pytrees handed to the function as they are.
    """
    _check_dtypes(point)
    return Jacobian(point, context, function)


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
      UserError: the operator has microbatches, or takes finite differences.
    """
    if getattr(operator, "microbatch", None) is not None:
        raise errors.UserError(
            "the operator has microbatches: what is kept of each would be all of it; build it without."
        )
    if getattr(getattr(operator, "product", None), "mode", None) == "finite difference":
        raise errors.UserError("finite differences have nothing to keep: build the operator in another mode.")
    return Linearised(operator.like, _linearise(operator))


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The mean over a data set of operators over its batches, applied one after the other by the host. `stream` makes it.

    Attributes:
      build: an operator over one batch.
      batches: iterable again and again.
      like: as the operators'.
      shift: added multiple of the identity.
    """

    build: Callable[[PyTree], BatchOperator]
    batches: Iterable[PyTree]
    like: PyTree
    shift: float

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector: one pass over the data. A block `[block, ...]` by `block`."""
        return self._sum(_apply, vector)

    def block(self, vectors: PyTree) -> PyTree:
        """The map applied to each of a block of vectors, `[block, ...]`, in one pass over the data."""
        return self._sum(_apply_block, vectors)

    def _sum(self, apply: Callable, vector: PyTree) -> PyTree:
        total, examples = None, 0
        for batch in self.batches:
            operator = self.build(batch)
            part = trees.scale(float(operator.examples), apply(operator, vector))
            total, examples = part if total is None else _add(total, part), examples + operator.examples
        return _shifted(trees.scale(1.0 / examples, total), self.shift, vector)


def stream(
    build: Callable[[PyTree], BatchOperator], batches: Iterable[PyTree], *, weight_decay: float = 0.0
) -> Streamed:
    """The operator over a data set that is read batch by batch, every example with the same weight, the last batch's too.

    A batch smaller than the others costs one more compilation. It is a loop of the host, so that it does not go into `jax.jit`.

    Args:
      build: makes the operator over one batch: `functools.partial(curvature.hessian, loss, params)`.
      batches: an iterable that starts anew each time, such as a list or `data.Stream`; not a generator.
      weight_decay: added multiple of the identity.

    Raises:
      UserError: there are no batches, or they can be read once only.
    """
    if iter(batches) is batches:
        raise errors.UserError(
            "the batches can be read only once, and every application reads them: give a list or a data set."
        )
    first = next(iter(batches), None)
    if first is None:
        raise errors.UserError("there are no batches: the data set is empty.")
    return Streamed(build, batches, build(first).like, float(weight_decay))


# What a batch's product is. Each is equal for equal functions, so that nothing is traced twice.


@dataclasses.dataclass(frozen=True)
class _Hessian:
    loss: Callable
    mode: str

    def __call__(self, batch: PyTree, vector: PyTree, params: PyTree, rest: PyTree, context: tuple) -> PyTree:
        def gradient(params):
            return jax.grad(lambda chosen: self.loss(_merge(chosen, rest), batch, *context))(params)

        if self.mode == "forward over reverse":
            return jax.jvp(gradient, (params,), (vector,))[1]
        if self.mode == "reverse over reverse":
            return jax.grad(lambda params: trees.dot(gradient(params), jax.lax.stop_gradient(vector)))(params)
        # The best step balances the third derivative with rounding: the cube root of the unit of rounding, of what moves.
        length = trees.norm(vector)
        step = jnp.cbrt(jnp.finfo(length.dtype).eps) * jnp.maximum(trees.norm(params), 1.0)
        step = step / jnp.where(length > 0, length, 1.0)
        ahead, behind = (gradient(trees.add(params, vector, sign * step)) for sign in (1.0, -1.0))
        return trees.scale(0.5 / step, trees.add(ahead, behind, -1.0))


@dataclasses.dataclass(frozen=True)
class _GaussNewton:
    outputs: Callable
    loss: Callable | None

    def __call__(self, batch: PyTree, vector: PyTree, params: PyTree, rest: PyTree, context: tuple) -> PyTree:
        def outputs(params):
            return self.outputs(_merge(params, rest), batch, *context)

        found, tangent = jax.jvp(outputs, (params,), (vector,))
        if self.loss is None:
            probabilities = jax.nn.softmax(found)
            centred = tangent - jnp.sum(probabilities * tangent, axis=-1, keepdims=True)
            image = probabilities * centred / found.shape[0]
        else:
            image = jax.jvp(lambda found: jax.grad(self.loss)(found, batch), (found,), (tangent,))[1]
        return jax.vjp(outputs, params)[1](image)[0]


@dataclasses.dataclass(frozen=True)
class _Scores:
    """`J'J / n` of the examples' log-likelihoods."""

    logits: Callable

    def __call__(self, batch: PyTree, vector: PyTree, params: PyTree, rest: PyTree, context: tuple) -> PyTree:
        batch, labels = batch

        def likelihoods(params):
            scores = jax.nn.log_softmax(self.logits(_merge(params, rest), batch, *context))
            return jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]

        tangent = jax.jvp(likelihoods, (params,), (vector,))[1]
        return jax.vjp(likelihoods, params)[1](tangent / tangent.shape[0])[0]


@dataclasses.dataclass(frozen=True)
class _InputHessian:
    loss: Callable

    def __call__(self, batch: PyTree, vector: PyTree, inputs: PyTree, rest: PyTree, context: tuple) -> PyTree:
        del batch, rest
        return jax.jvp(jax.grad(lambda inputs: self.loss(inputs, *context).sum()), (inputs,), (vector,))[1]


def _build(product, params, batch, context, subset, microbatch, weight_decay) -> BatchOperator:
    chosen, rest = _select(params, subset)
    _check_dtypes(chosen)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise errors.UserError(
            f"the leaves of the batch have leading sizes {sorted(map(str, sizes))}: expected one size, at least 1, for all."
        )
    if microbatch is not None and microbatch < 1:
        raise errors.UserError(
            f"microbatch is {microbatch}: expected a whole number from 1, or None for the whole batch."
        )
    if microbatch is not None and microbatch >= sizes.pop():
        microbatch = None
    shift = weight_decay if isinstance(weight_decay, jax.Array) else np.asarray(weight_decay, jnp.result_type(float))
    operator = BatchOperator(chosen, rest, batch, context, shift, product=product, microbatch=microbatch)
    _check_differentiable(operator)
    return operator


def _select(params: PyTree, subset: str | None) -> tuple[PyTree, PyTree]:
    """The parameters whose path matches, and the others: None where a leaf belongs to the other."""
    if subset is None:
        return params, None
    try:
        chosen = trees.mask(params, subset)
    except re.error as error:
        raise errors.UserError(f"subset={subset!r} is no regular expression ({error}).") from None
    if not any(jax.tree.leaves(chosen)):
        examples = ", ".join(trees.paths(params)[:3])
        raise errors.UserError(f"subset={subset!r} matches no parameter; paths look like {examples}.")
    selected = jax.tree.map(lambda keep, leaf: leaf if keep else None, chosen, params)
    return selected, jax.tree.map(lambda keep, leaf: None if keep else leaf, chosen, params)


def _merge(chosen: PyTree, rest: PyTree) -> PyTree:
    if rest is None:
        return chosen
    return jax.tree.map(
        lambda one, other: other if one is None else one, chosen, rest, is_leaf=lambda leaf: leaf is None
    )


def _check_dtypes(params: PyTree) -> None:
    if not jax.tree.leaves(params):
        raise errors.UserError("there are no parameters to differentiate in: the pytree is empty.")
    for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 4:
            raise errors.UserError(
                f"parameter {path or 'given'} is {dtype}: curvature needs float32 or float64 parameters; cast it, or leave it "
                "out with `subset`."
            )


def _check_differentiable(operator: BatchOperator) -> None:
    """Traces one application, whose trace the first call uses again, so that what cannot be differentiated is named at once."""
    try:
        _apply.eval_shape(operator, operator.like)
    except (NotImplementedError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise errors.UserError(
            f"the second derivative cannot be formed ({reason}): a fused attention kernel has none, so build the model with "
            'attention="xla", or take mode="finite difference"; the loss has to be a scalar.'
        ) from error


@jax.jit
def _apply(operator: BatchOperator, vector: PyTree) -> PyTree:
    # The precision has to be set where the product is traced: f32 products are bf16 on a TPU and TF32 on a GPU otherwise.
    with jax.default_matmul_precision("highest"):
        product = _mean(operator, vector)
    return _shifted(product, operator.shift, vector)


@jax.jit
def _apply_block(operator: BatchOperator, vectors: PyTree) -> PyTree:
    return jax.vmap(_apply, in_axes=(None, 0))(operator, vectors)


def _shifted(product: PyTree, shift, vector: PyTree) -> PyTree:
    return jax.tree.map(lambda hv, v: (hv + jnp.asarray(shift, hv.dtype) * v).astype(v.dtype), product, vector)


def _mean(operator: BatchOperator, vector: PyTree) -> PyTree:
    batch, size, microbatch = operator.batch, operator.examples, operator.microbatch
    operands = vector, operator.like, operator.rest, operator.context
    if microbatch is None:
        return operator.product(batch, *operands)
    whole = size // microbatch
    stacked = jax.tree.map(lambda leaf: leaf[: whole * microbatch].reshape(whole, microbatch, *leaf.shape[1:]), batch)
    total = trees.scale(microbatch / size, loops.accumulate(operator.product, stacked, *operands))
    if whole * microbatch < size:
        rest = jax.tree.map(lambda leaf: leaf[whole * microbatch :], batch)
        total = trees.add(total, operator.product(rest, *operands), 1.0 - whole * microbatch / size)
    return total


@jax.jit
def _linearise(operator: operators.Operator) -> Callable:
    # The map is linear, so its derivative anywhere is itself; what does not depend on the vector is computed here.
    return jax.linearize(operator, trees.zeros_like(operator.like))[1]


@jax.jit
def _call(linear: Callable, vector: PyTree) -> PyTree:
    with jax.default_matmul_precision("highest"):
        return linear(vector)


@jax.jit
def _push(jacobian: Jacobian, vector: PyTree) -> PyTree:
    with jax.default_matmul_precision("highest"):
        return jax.jvp(lambda point: jacobian.function(point, *jacobian.context), (jacobian.point,), (vector,))[1]


@jax.jit
def _pull(jacobian: Jacobian, vector: PyTree) -> PyTree:
    with jax.default_matmul_precision("highest"):
        return jax.vjp(lambda point: jacobian.function(point, *jacobian.context), jacobian.point)[1](vector)[0]


_add = jax.jit(trees.add, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _sample(logits: Callable, params: PyTree, batch: PyTree, context: tuple, key: jax.Array) -> jax.Array:
    """A label an example, distributed as the model says."""
    found = logits(params, batch, *context)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(found.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, found)


@functools.partial(jax.jit, static_argnums=0)
def _value(loss: Callable, params: PyTree, batch: PyTree, context: tuple) -> jax.Array:
    return loss(params, batch, *context)


def _check_separable(loss: Callable, params: PyTree, batch: PyTree, context: tuple) -> None:
    """Of a mean over examples, (a, b) and (b, a) have in sum what (a, a) and (b, b) have."""
    leaves = jax.tree.leaves((params, batch, context))
    concrete = not any(isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) for leaf in leaves)
    if not concrete or np.shape(jax.tree.leaves(batch)[0])[0] < 2:
        return
    half = np.shape(jax.tree.leaves(batch)[0])[0] // 2
    a, b = np.arange(half), np.arange(half, 2 * half)
    rows = [np.concatenate(pair) for pair in ((a, b), (b, a), (a, a), (b, b))]
    parts = [jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], batch) for chosen in rows]
    found = np.asarray([_value(loss, params, part, context) for part in parts], np.float64)
    if not np.isfinite(found).all():
        raise errors.UserError("the loss is not finite on this batch: its second derivative would be none either.")
    if abs(found[0] + found[1] - found[2] - found[3]) > _SEPARABLE * np.abs(found).sum():
        raise errors.UserError(
            f"the loss is no mean over examples: {found[:2].sum() / 2:.6g} over two halves together, {found[2:].sum() / 2:.6g} "
            "over each with itself. Use evaluation mode, so that BatchNorm takes its running statistics and dropout is off; or, "
            "if it is meant so, separable=False."
        )
