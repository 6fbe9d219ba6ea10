"""What an operator is: a symmetric linear map on pytrees, `operator(vector) -> vector`, never ravelled into one array."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import flax.errors
import flax.struct
import jax
import jax.numpy as jnp

from robust_vit import errors, trees
from robust_vit.curvature import probes

PyTree = Any


class Operator(Protocol):
    """A symmetric linear map. A frozen pytree, so that it goes through `jax.jit` as an argument.

    `jax.vmap(operator)` is the map of a block of vectors, and computes what does not depend on the vector once. An operator that
    the host applies (`by_host`) has a method `block` for that.

    Attributes:
      like: a pytree with the structure, shapes, dtypes and sharding of the vectors.
    """

    like: PyTree

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector."""
        ...


class Symmetric(flax.struct.PyTreeNode):
    """A symmetric matrix as an operator on one vector `[n]`: for tests, and to check a solver against known spectra."""

    matrix: jax.Array

    @property
    def like(self) -> jax.Array:
        """A vector."""
        return self.matrix[0]

    def __call__(self, vector: jax.Array) -> jax.Array:
        """The matrix times the vector."""
        return jnp.matmul(self.matrix, vector, precision="highest")


def innermost(operator: Operator) -> Operator:
    """What an operator made of another one (`Scaled`, `curvature.within`) is made of in the end; any other itself."""
    while hasattr(operator, "operator"):
        operator = operator.operator
    return operator


def by_host(operator: Operator) -> bool:
    """Whether the host applies the operator, batch by batch, so that it does not go into `jax.jit`."""
    return hasattr(innermost(operator), "block")


class Scaled(flax.struct.PyTreeNode):
    """`S A S` for a diagonal S: the operator in coordinates of which one unit is one `scale`. No cost beyond the operator's.

    With `scale = |parameters|` and a Hessian it is the matrix of adaptive sharpness, whose eigenvalues a rescaling of the
    parameters that leaves the network as it is leaves as they are (`robust_vit.curvature.sharpness`).

    Attributes:
      operator: A.
      scale: the diagonal of S, like the vectors.
    """

    operator: Any
    scale: PyTree

    @property
    def like(self) -> PyTree:
        """The operator's."""
        return self.operator.like

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector."""
        return _multiplied(self.scale, self.operator(_multiplied(self.scale, vector)))

    def block(self, vectors: PyTree) -> PyTree:
        """The map applied to each of a block of vectors, `[block, ...]`, where the host applies the operator."""
        scaled = jax.vmap(_multiplied, in_axes=(None, 0))
        return scaled(self.scale, self.operator.block(scaled(self.scale, vectors)))


def asymmetry(operator: Operator, key: jax.Array) -> jax.Array:
    """`|u'Av - v'Au| / (|Au| |v|)` for two random vectors: rounding for a symmetric map, order one for a mistake.

    A mistake may be randomness that is not frozen, or statistics over a batch that was split. Cost: two applications.

    Args:
      operator: any operator.
      key: draws the two vectors.

    Raises:
      UserError: a product is not finite.
    """
    left_key, right_key = jax.random.split(key)
    left, right = _draw(left_key, operator.like), _draw(right_key, operator.like)
    image = operator(left)
    difference = jnp.abs(trees.dot(right, image) - trees.dot(left, operator(right)))
    return _share(difference, trees.norm(image) * trees.norm(right))


def indeterminism(operator: Operator, key: jax.Array) -> jax.Array:
    """`|Av - Av| / |Av|` of two applications to one random vector: zero, or the operator is no one map. Two applications.

    Args:
      operator: any operator.
      key: draws the vector.

    Raises:
      UserError: a product is not finite.
    """
    vector = _draw(key, operator.like)
    first, second = operator(vector), operator(vector)
    return _share(trees.norm(trees.add(first, second, -1.0)), trees.norm(first))


def not_finite(application: int | None = None, example: int | None = None) -> errors.UserError:
    """The error of a solver whose operator returned a NaN or an infinity, at this application and example, where known."""
    at = "" if application is None else f" at application {application}"
    at += "" if example is None else f" for example {example}"
    return errors.UserError(
        f"the operator returned a value that is not finite{at}: check that the loss and its second derivative are finite at "
        "these parameters and this batch."
    )


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Says in a line what Flax says of a model in training mode."""
    try:
        yield
    except flax.errors.InvalidRngError as error:
        raise _training("draws random numbers (dropout)") from error
    except flax.errors.ModifyScopeVariableError as error:
        raise _training("changes its statistics (BatchNorm)") from error


def _training(what: str) -> errors.UserError:
    return errors.UserError(
        f"the model {what}, as in training, and curvature is of one function that stays: call it in evaluation mode, with "
        "train=False."
    )


_draw = jax.jit(probes.draw)


def _multiplied(scale: PyTree, vector: PyTree) -> PyTree:
    return jax.tree.map(lambda s, v: (s * v).astype(v.dtype), scale, vector)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    share = jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole))
    if not (isinstance(share, jax.core.Tracer) or jnp.isfinite(share)):
        raise not_finite()
    return share
