"""Second derivatives times a vector: Hessian, Gauss-Newton and Fisher in the parameters, Hessian in the input; never a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import errors, trees
from robust_vit.curvature import batches, separability, subsets

PyTree = Any
MODES = ("forward over reverse", "reverse over reverse", "finite difference")


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
) -> batches.BatchOperator:
    """The Hessian of `loss + weight_decay / 2 * |params|^2` in the parameters, over one batch.

    Cost: four forward passes the first time, two more with a microbatch; one application costs 8/3 gradients of the batch. In
    a block the pass at the parameters is shared: k vectors cost (2 + 6k)/3 gradients (`jax.vmap(operator)`). Rounding: 2e-7
    relative to the largest eigenvalue in float32.

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
        difference` of two gradients, for kernels without a second derivative: 2 gradients, with an error of 1e-4 to 1e-3 in
        float32.
      microbatch: examples differentiated at a time, to save memory; the last one may be smaller, and counts by its size. Of a
        batch that devices share each microbatch has rows of all of them, and is rounded up to a multiple of their number.
      weight_decay: added multiple of the identity: L2 shifts every eigenvalue by exactly this.
      separable: try whether the loss is a mean over examples wherever they stand, which BatchNorm and dropout in training mode
        undo; False leaves that out, for a loss that is known to be one, or for one that is none: a microbatch then has another
        Hessian.

    Raises:
      UserError: parameters that are not float32 or wider, or none; a subset that matches none; a batch of several sizes; a loss
        that is no scalar, not finite, no mean over examples, or that JAX cannot differentiate twice.
    """
    if mode not in MODES:
        raise errors.unknown("mode of the Hessian", mode, MODES)
    operator = batches.build(_Hessian(loss, mode), params, batch, context, subset, microbatch, weight_decay)
    if separable:
        separability.check_mean(loss, params, batch, context, microbatch=operator.microbatch)
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
    separable: bool = True,
) -> batches.BatchOperator:
    """The generalised Gauss-Newton matrix, the mean of `J' H J` with H the Hessian of the loss in the outputs (Schraudolph 2002).

    Positive semidefinite for a convex loss, and the true Fisher information of a softmax classifier. Cost: two forward passes of
    at most eight examples the first time, which try whether an example's outputs depend on it alone (and four of the batch with a
    `loss`); an application 5/3 gradients. Arguments as of `hessian`, and

    Args:
      outputs: `outputs(params, batch, *context) -> [examples, ...]`, such as logits `[examples, classes]`.
      loss: `loss(outputs, batch) -> scalar`, the mean over the examples; None for softmax cross-entropy, analytically: H is then
        `diag(p) - pp'`, whatever the labels and their smoothing are.
    """
    operator = batches.build(_GaussNewton(outputs, loss), params, batch, context, subset, microbatch, weight_decay)
    if separable:
        separability.check_rows(outputs, params, batch, context)
    if separable and loss is not None:
        separability.check_mean(_Composed(outputs, loss), params, batch, context, microbatch=operator.microbatch)
    return operator


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
    separable: bool = True,
) -> batches.BatchOperator:
    """The Fisher information of a softmax classifier: the mean of `g g'`, g an example's gradient of the log-likelihood.

    Cost as of `gauss_newton`; `sampled` takes one forward pass of the batch now, by microbatches. Arguments as of `hessian`, and

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
        options = {"subset": subset, "microbatch": microbatch, "weight_decay": weight_decay, "separable": separable}
        return gauss_newton(logits, params, batch, *context, **options)
    if kind == "sampled":
        labels = jnp.zeros(jnp.shape(jax.tree.leaves(batch)[0])[:1], jnp.int32)  # To be drawn once the rest is checked.
    operator = batches.build(_Scores(logits), params, (batch, labels), context, subset, microbatch, weight_decay)
    if separable:
        separability.check_rows(logits, params, batch, context)
    return operator if kind == "empirical" else operator.replace(batch=(batch, _sample(operator, key)))


def input_hessian(loss: Callable, inputs: jax.Array, *context: PyTree, separable: bool = True) -> batches.BatchOperator:
    """The Hessian of each example's loss in its input: one operator on `[examples, ...]` that mixes no examples.

    Applied to a block of vectors, one an example, it gives each example's product; solvers that work an example at a time run in
    lock-step on it. Cost: two forward passes the first time; an application 8/3 input gradients.

    Args:
      loss: `loss(inputs, *context) -> [examples]`, each of its own input alone.
      inputs: `[examples, ...]`, float32 or float64.
      *context: pytrees handed to the loss as they are, such as labels and a classifier.
      separable: try whether an example's loss depends on the others' inputs, as with BatchNorm in training mode; False leaves
        that out.

    Raises:
      UserError: inputs that are not float32 or wider; no loss for each example; one that is not finite, depends on other
        examples, or that JAX cannot differentiate twice.
    """
    operator = batches.build(_InputHessian(loss), inputs, jnp.zeros(1), context, None, None, 0.0)
    if separable:
        separability.check_inputs(loss, inputs, context)
    return operator


# What a batch's product is. Each is equal for equal functions, so that nothing is traced twice.


@dataclasses.dataclass(frozen=True)
class _Hessian:
    loss: Callable
    mode: str

    def __call__(self, batch: PyTree, vector: PyTree, params: PyTree, rest: PyTree, context: tuple) -> PyTree:
        def gradient(params):
            return jax.grad(lambda chosen: self.loss(subsets.merge(chosen, rest), batch, *context))(params)

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
            return self.outputs(subsets.merge(params, rest), batch, *context)

        found, tangent = jax.jvp(outputs, (params,), (vector,))
        if self.loss is None:
            _check_logits(found)
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
            logits = self.logits(subsets.merge(params, rest), batch, *context)
            _check_logits(logits)
            scores = jax.nn.log_softmax(logits)
            return jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]

        tangent = jax.jvp(likelihoods, (params,), (vector,))[1]
        return jax.vjp(likelihoods, params)[1](tangent / tangent.shape[0])[0]


@dataclasses.dataclass(frozen=True)
class _InputHessian:
    loss: Callable

    def __call__(self, batch: PyTree, vector: PyTree, inputs: PyTree, rest: PyTree, context: tuple) -> PyTree:
        del batch, rest

        def total(inputs):
            each = self.loss(inputs, *context)
            if jnp.shape(each) != inputs.shape[:1]:
                raise errors.UserError(
                    f"the loss has shape {jnp.shape(each)} for {inputs.shape[0]} examples: expected one number for each."
                )
            return each.sum()

        return jax.jvp(jax.grad(total), (inputs,), (vector,))[1]


@dataclasses.dataclass(frozen=True)
class _Composed:
    outputs: Callable
    loss: Callable

    def __call__(self, params: PyTree, batch: PyTree, *context: PyTree) -> jax.Array:
        return self.loss(self.outputs(params, batch, *context), batch)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """A label an example, distributed as the model says, from a key an example."""

    logits: Callable

    def __call__(self, batch: PyTree, vector: PyTree, params: PyTree, rest: PyTree, context: tuple) -> jax.Array:
        del vector
        batch, keys = batch
        found = self.logits(subsets.merge(params, rest), batch, *context)
        return jax.vmap(jax.random.categorical)(keys, found).astype(jnp.int32)


@jax.jit
def _sample(operator: batches.BatchOperator, key: jax.Array) -> jax.Array:
    """`[examples]` labels; an example's depends on the key and its place in the batch alone."""
    batch, _ = operator.batch
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(operator.examples))
    drawing = operator.replace(batch=(batch, keys), product=_Draw(operator.product.logits))
    return batches.rows(drawing, None)


def _check_logits(logits: jax.Array) -> None:
    if jnp.ndim(logits) < 2:
        raise errors.UserError(
            f"the outputs have shape {jnp.shape(logits)}: expected logits [examples, classes], or give `loss` of other outputs."
        )
