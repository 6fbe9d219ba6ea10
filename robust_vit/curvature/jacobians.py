"""First derivatives as operators: Jacobian, its transpose, and their product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from robust_vit.curvature import operators, subsets

PyTree = Any


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


class OuterGram(flax.struct.PyTreeNode):
    """`JJ'` as an operator, with the eigenvalues of `J'J` but for zeros: the smaller of the two where the values are few.

    Attributes:
      jacobian: J.
      like: zeros like the function's value.
    """

    jacobian: Jacobian
    like: PyTree

    def __call__(self, vector: PyTree) -> PyTree:
        """`JJ'u`: 5/3 of a gradient."""
        return self.jacobian(self.jacobian.transposed(vector))


def jacobian(function: Callable, point: PyTree, *context: PyTree) -> Jacobian:
    """The derivative of `function(point, *context)` in the point, as `J v`, `J' u` and `J'J v`. No passes now.

    Args:
      function: a named function or a frozen dataclass, as the loss of `hessian`.
      point: float32 or float64 leaves.
      *context: pytrees handed to the function as they are.
    """
    subsets.check(point)
    return Jacobian(point, context, function)


@jax.jit
def _push(jacobian: Jacobian, vector: PyTree) -> PyTree:
    with jax.default_matmul_precision("highest"), operators.model_errors():
        return jax.jvp(lambda point: jacobian.function(point, *jacobian.context), (jacobian.point,), (vector,))[1]


@jax.jit
def _pull(jacobian: Jacobian, vector: PyTree) -> PyTree:
    with jax.default_matmul_precision("highest"), operators.model_errors():
        return jax.vjp(lambda point: jacobian.function(point, *jacobian.context), jacobian.point)[1](vector)[0]
