"""The worst place near the parameters, by Auto-PGD in coordinates in which the neighbourhood is a ball."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit import trees
from robust_vit.curvature import batches, probes, subsets

PyTree = Any
_MOMENTUM = 0.75
# Auto-PGD: the first window between two looks at the step, by how much each is shorter, the shortest; in shares of the steps.
_WINDOWS = (0.22, 0.03, 0.06)


class Ascent(flax.struct.PyTreeNode):
    """An ascent in scaled coordinates.

    Attributes:
      offset: where it is.
      previous: where it was one step before.
      best: where it found most.
      best_slope: the scaled gradient there.
      most: the loss there.
      checked: `most` at the last look at the step size.
      first: the loss after the first step.
      slope: the dual norm of the scaled gradient at the start.
      size: of a step, in radii.
      rises: steps since the last look that found more.
      halved: the last look halved the step.
    """

    offset: PyTree
    previous: PyTree
    best: PyTree
    best_slope: PyTree
    most: Float[Array, ""]
    checked: Float[Array, ""]
    first: Float[Array, ""]
    slope: Float[Array, ""]
    size: Float[Array, ""]
    rises: Int[Array, ""]
    halved: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Slope:
    """Loss and gradient at a point; equal for equal losses, so nothing is traced twice."""

    loss: Callable

    def __call__(self, batch: PyTree, point: PyTree, params: PyTree, rest: PyTree, context: tuple) -> PyTree:
        del params
        return jax.value_and_grad(lambda chosen: self.loss(subsets.merge(chosen, rest), batch, *context))(point)


@dataclasses.dataclass(frozen=True)
class Height:
    """Loss at a point."""

    loss: Callable

    def __call__(self, batch: PyTree, point: PyTree, params: PyTree, rest: PyTree, context: tuple) -> PyTree:
        del params
        return self.loss(subsets.merge(point, rest), batch, *context)


@dataclasses.dataclass(frozen=True)
class Ascend:
    """A step of Auto-PGD in scaled coordinates: one gradient.

    Attributes:
      norm: of the neighbourhood, `l2` or `linf`.
    """

    norm: str

    def __call__(self, state: Ascent, index, problem, units, radius, windows, looks) -> Ascent:
        with jax.default_matmul_precision("highest"):
            value, gradient = batches.mean(problem, moved(problem.like, units, state.offset))
        slope, value = times(units, gradient), value.astype(state.most.dtype)
        rises = value > state.most
        best, best_slope = (
            _where(rises, new, old) for new, old in ((state.offset, state.best), (slope, state.best_slope))
        )
        most, risen = jnp.where(rises, value, state.most), state.rises + (rises & (index > 0))
        look = looks[index]
        halve = look & ((risen < 0.75 * windows[index]) | (~state.halved & (most == state.checked)))
        size = jnp.where(halve, 0.5 * state.size, state.size)
        here, uphill = _where(halve, best, state.offset), _where(halve, best_slope, slope)
        reach = _project(self.norm, trees.add(here, _direction(self.norm, uphill), size * radius), radius)
        # The first step, and the first one after a return, are whole: the rest keep a part of the step before.
        fresh = (index == 0) | halve
        following = jax.tree.map(
            lambda at, to, before: jnp.where(fresh, to, at + _MOMENTUM * (to - at) + (1 - _MOMENTUM) * (at - before)),
            here,
            reach,
            state.previous,
        )
        return state.replace(
            offset=_project(self.norm, following, radius),
            previous=here,
            best=best,
            best_slope=best_slope,
            most=most,
            checked=jnp.where(look, most, state.checked),
            first=jnp.where(index == 1, value, state.first),
            slope=jnp.where(index == 0, _dual_norm(self.norm, slope), state.slope).astype(state.slope.dtype),
            size=size,
            rises=jnp.where(look, 0, risen),
            halved=jnp.where(look, halve, state.halved),
        )


def checkpoints(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step how many it comes after the last look at the step size, and whether it is a look (Croce & Hein 2020)."""
    window, shorter, least = _WINDOWS
    places, at = [0], window
    while at < 1.0:
        places.append(math.ceil(at * steps))
        window = max(window - shorter, least)
        at += window
    looks, windows, last = np.zeros(steps, bool), np.ones(steps, np.float32), 0
    for place in places[1:]:
        if last < place < steps:
            looks[place], windows[place], last = True, place - last, place
    return windows, looks


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(
    norm: str, placement: tuple[NamedSharding, ...] | None, problem, key: Key[Array, ""] | None, radius
) -> Ascent:
    """An ascent that has not begun: at the parameters, or at a place in the neighbourhood that the key draws."""
    zeros = [trees.zeros_like(problem.like) for _ in range(4)]
    value = jax.eval_shape(lambda: batches.mean(problem, problem.like))[0]
    number = jnp.zeros((), jnp.promote_types(value.dtype, jnp.float32))
    if key is not None:
        draw = probes.draw(key, problem.like)
        # On the sphere, or uniform in the cube.
        factor = radius / (trees.norm(draw) if norm == "l2" else math.sqrt(3.0))
        zeros[0], zeros[1] = trees.scale(factor, draw), trees.scale(factor, draw)
    state = Ascent(
        *zeros,
        most=number - jnp.inf,
        checked=number - jnp.inf,
        first=number,
        slope=number,
        size=number + 2.0,
        rises=jnp.int32(0),
        halved=jnp.bool_(False),
    )
    return state if placement is None else jax.lax.with_sharding_constraint(state, shardings(state, placement))


def shardings(state: Ascent, placement: tuple[NamedSharding, ...]) -> Ascent:
    """What is like the parameters lies as they do, and what is small everywhere."""
    whole = NamedSharding(placement[0].mesh, PartitionSpec())
    vectors = jax.tree.unflatten(jax.tree.structure(state.offset), placement)
    names = ("offset", "previous", "best", "best_slope")
    return jax.tree.map(lambda _: whole, state).replace(**dict.fromkeys(names, vectors))


@jax.jit
def ends(problem: batches.BatchOperator, units: PyTree, state: Ascent) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss at the parameters, at the best place and at the last one, by one program."""
    problem = problem.replace(product=Height(problem.product.loss))
    with jax.default_matmul_precision("highest"):
        places = (problem.like, moved(problem.like, units, state.best), moved(problem.like, units, state.offset))
        base, best, last = (batches.mean(problem, place) for place in places)
    return base, best, last


def moved(params: PyTree, units: PyTree, offset: PyTree, factor: Any = 1.0) -> PyTree:
    """The parameters, moved by an offset in units."""
    return trees.add(params, times(units, offset), factor)


def times(units: PyTree, tree: PyTree) -> PyTree:
    """Each number times its unit; units that are None are one."""
    return tree if units is None else jax.tree.map(lambda unit, leaf: (unit * leaf).astype(leaf.dtype), units, tree)


def _where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _direction(norm: str, slope: PyTree) -> PyTree:
    """The steepest of unit length; zero where there is no slope."""
    if norm == "linf":
        return jax.tree.map(jnp.sign, slope)
    return trees.unit(slope)


def _dual_norm(norm: str, slope: PyTree) -> jax.Array:
    return sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(slope)) if norm == "linf" else trees.norm(slope)


def _project(norm: str, offset: PyTree, radius: jax.Array) -> PyTree:
    if norm == "linf":
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -radius, radius).astype(leaf.dtype), offset)
    length = trees.norm(offset)
    return trees.scale(jnp.where(length > radius, radius / jnp.where(length > 0, length, 1.0), 1.0), offset)
