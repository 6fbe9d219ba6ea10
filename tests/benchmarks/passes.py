"""What is timed, on our side: the passes over a model, the work that is in them, and a clock."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

PyTree = Any
PASSES = ("forward", "input_gradient", "parameter_gradient", "hvp")


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass as a pure function of a batch; equal ones are one compiled program.

    Attributes:
      module: the model.
      name: one of `PASSES`. The loss is the sum of the cross-entropies.
    """

    module: nn.Module
    name: str

    def __call__(self, batch: tuple, variables: PyTree, vector: PyTree) -> PyTree:
        """Logits, the gradient in the images, the gradient in the parameters, or the Hessian times `vector`."""
        images, labels = batch

        def loss(params, images):
            logits, _ = self.module.apply({**variables, "params": params}, images)
            return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

        params = variables["params"]
        if self.name == "forward":
            return self.module.apply(variables, images)[0]
        if self.name == "input_gradient":
            return jax.grad(loss, argnums=1)(params, images)
        gradient = jax.grad(loss)
        if self.name == "parameter_gradient":
            return gradient(params, images)
        return jax.jvp(lambda params: gradient(params, images), (params,), (vector,))[1]


def like(tree: PyTree, seed: int = 0) -> PyTree:
    """Standard normal arrays of the same shapes and dtypes."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape), leaf.dtype), tree)


def seconds(function: Callable[[], Any], calls: int) -> list[float]:
    """How long each of several calls takes, results waited for."""
    found = []
    for _ in range(calls):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - begin)
    return found


def summary(values: list[float]) -> str:
    """Least and median, in milliseconds."""
    return f"{1e3 * min(values):,.0f} / {1e3 * statistics.median(values):,.0f}"


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution of a program.

    Attributes:
      primitive: JAX's, with its parameters.
      parameters: of the primitive, as sorted pairs.
      shapes: of the operands.
      dtypes: of the operands.
      flops: multiplications and additions; zeros that a transposed convolution inserts are not counted.
    """

    primitive: Any
    parameters: tuple
    shapes: tuple
    dtypes: tuple
    flops: int

    def run(self, *operands: jax.Array) -> jax.Array:
        """The product alone."""
        return self.primitive.bind(*operands, **dict(self.parameters))


def products(function: Callable, *arguments: PyTree) -> Counter:
    """The products that a function's result needs, each with how often it runs (loops counted by their length)."""
    needed, _ = partial_eval.dce_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr, True)
    return Counter(dict(_count(needed)))


def _count(jaxpr) -> Counter:
    found: Counter = Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            found[_product(equation)] += 1
        times = equation.params["length"] if name == "scan" else 1
        for inner in _inner(equation.params):
            for product, count in _count(inner).items():
                found[product] += times * count
    return found


def _inner(parameters: dict) -> Iterator:
    for value in parameters.values():
        for each in value if isinstance(value, list | tuple) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _product(equation) -> Product:
    left, right = (variable.aval for variable in equation.invars)
    out = equation.outvars[0].aval
    parameters = tuple(sorted(equation.params.items(), key=lambda item: item[0]))
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(left.shape[axis] for axis in contracted)
    else:
        kernel = equation.params["dimension_numbers"].rhs_spec
        inner = math.prod(right.shape[axis] for axis in kernel[1:]) / math.prod(equation.params["lhs_dilation"])
    flops = int(2 * out.size * inner)
    return Product(equation.primitive, parameters, (left.shape, right.shape), (left.dtype, right.dtype), flops)


def flops(function: Callable, *arguments: PyTree) -> int:
    """Multiplications and additions of all products of a function's program."""
    return sum(product.flops * count for product, count in products(function, *arguments).items())


def floor(function: Callable, *arguments: PyTree, calls: int = 4) -> float:
    """Seconds of the products alone: each distinct one timed by itself (the least of some calls), times how often it runs."""
    total = 0.0
    for product, count in products(function, *arguments).items():
        operands = [
            like(jax.ShapeDtypeStruct(shape, dtype), seed=index)
            for index, (shape, dtype) in enumerate(zip(product.shapes, product.dtypes, strict=True))
        ]
        compiled = jax.jit(product.run).lower(*operands).compile()
        total += count * min(seconds(lambda run=compiled, given=operands: run(*given), calls + 1)[1:])
    return total
