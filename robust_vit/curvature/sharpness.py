"""Sharpness: how far the loss rises when the parameters are moved a little; at worst or on average, in their own scale or not."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from robust_vit import errors, loops, programs, trees
from robust_vit.curvature import ascents, batches, estimates, krylov, probes

PyTree = Any
NORMS = ("l2", "linf")
SCALES = ("elementwise", "tensor", "global")


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """The largest loss found in a neighbourhood of the parameters. Python floats; sharpness is a lower bound of the true one.

    Attributes:
      sharpness: the loss there minus the loss at the parameters; from 0.
      one_step: of the first step alone, the estimate of SAM; below 0 where the loss is concave enough along it.
      loss: at the parameters.
      slope: the dual norm of the gradient in the scaled coordinates, so that `radius * slope` is the first-order term; where it
        is zero no step says anything, and a key is needed to start elsewhere.
      gradients: how many were taken of the batch.
      perturbation: where it is, like the parameters, in their own coordinates.
    """

    sharpness: float
    one_step: float
    loss: float
    slope: float
    gradients: int
    perturbation: PyTree


def scales(params: PyTree, kind: str | None = "elementwise", *, stabiliser: float = 0.0) -> PyTree:
    """The unit of each parameter: what a perturbation is measured in, like the parameters.

    Args:
      params: the parameters.
      kind: `elementwise`, the absolute value of each (Kwon et al. 2021, arXiv 2102.11600): a rescaling of a ReLU network's
        neurons or layers that leaves the function as it is changes no sharpness in these units; `tensor`, the norm of the
        tensor, with that property for layers; `global`, the norm of all, which makes `S A S` the familiar `|w|^2 A`, for a
        network that any common factor leaves as it is; None is one.
      stabiliser: added to each unit, the eta of Kwon et al.; above zero it ends the invariance.

    Raises:
      UserError: an unknown kind.
    """
    if kind is not None and kind not in SCALES:
        raise errors.unknown("kind of scale", kind, SCALES)
    if kind is None:
        return jax.tree.map(jnp.ones_like, params)
    if kind == "elementwise":
        units = jax.tree.map(jnp.abs, params)
    elif kind == "tensor":
        units = jax.tree.map(lambda leaf: jnp.full_like(leaf, trees.norm(leaf)), params)
    else:
        units = jax.tree.map(lambda leaf: jnp.full_like(leaf, trees.norm(params)), params)
    return jax.tree.map(lambda unit: unit + stabiliser, units) if stabiliser else units


def worst_case(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *context: PyTree,
    radius: float,
    norm: str = "l2",
    adaptive: str | None = None,
    stabiliser: float = 0.0,
    steps: int = 20,
    key: Key[Array, ""] | None = None,
    subset: str | None = None,
    microbatch: int | None = None,
) -> WorstCase:
    """The worst-case sharpness: `max L(w + d) - L(w)` over `|d / T|_p <= radius`, by projected gradient ascent.

    One step is SAM's estimate, `d = radius g / |g|` (Foret et al. 2021, arXiv 2010.01412), in units T of the parameters that of
    ASAM, `radius T^2 g / |T g|` (Kwon et al. 2021, arXiv 2102.11600). More steps are Auto-PGD (Croce & Hein 2020, arXiv
    2003.01690) on the mini-batch, as Andriushchenko et al. 2023 (arXiv 2302.07011) measure: first step twice the radius, momentum
    0.75, halved at the published checkpoints where fewer than three steps in four found more. Here the ascent is in `d / T`,
    where the neighbourhood is a ball: there the steepest direction and the projection are those of the metric, in closed form.
    (Their code steps along `T g / |g|` in `d` and projects to the ellipsoid by bisection: the same neighbourhood, another path.)

    Cost: `steps` gradients and 3 forward passes of the batch; memory of six copies of the parameters. A new radius, batch or
    parameters compile nothing; a new number of steps does.

    Args:
      loss: `loss(params, batch, *context) -> scalar`: the mean over the examples, as of `robust_vit.curvature.hessian`.
      params: the parameters; those that move are float32 or float64.
      batch: a pytree whose leaves are `[examples, ...]`.
      *context: pytrees handed to the loss as they are.
      radius: of the neighbourhood, in units of the parameters or, where adaptive, relative to their scale.
      norm: `l2` or `linf`.
      adaptive: None for the raw sharpness, or a kind of `scales`.
      stabiliser: of `scales`.
      steps: of the ascent.
      key: draws a start within the neighbourhood; None starts at the parameters, as published. At an exact minimum only a key
        leads away.
      subset: regular expression: only the parameters whose path matches move.
      microbatch: examples differentiated at a time, to save memory.

    Raises:
      UserError: an unknown norm or scale, a radius below zero, fewer steps than one, a loss that is not finite, and what
        `hessian` says of parameters, subsets and batches.
    """
    if norm not in NORMS:
        raise errors.unknown("norm", norm, NORMS)
    _check(radius, "steps", steps)
    problem = _problem(loss, params, batch, context, subset, microbatch)
    units = _units(problem.like, adaptive, stabiliser)
    reach = np.asarray(radius, jnp.result_type(float))
    state = ascents.start(norm, krylov.placement_of(problem.like), problem, key, reach)
    state = loops.repeat(
        ascents.Ascend(norm), state, steps, problem, units, reach, *ascents.checkpoints(steps), donate=True
    )
    ends = ascents.ends(problem, units, state)
    base, best, last = (float(value) for value in ends)
    if not np.isfinite([base, best]).all():
        raise errors.UserError("the loss is not finite at these parameters or near them: take a smaller radius.")
    found = (trees.zeros_like(state.best) if base >= best else state.best) if best >= last else state.offset
    first = last if steps == 1 else float(state.first)
    return WorstCase(
        sharpness=max(best, last, base) - base,
        one_step=first - base,
        loss=base,
        slope=float(state.slope),
        gradients=steps,
        perturbation=ascents.times(units, found),
    )


def m_sharpness(
    loss: Callable, params: PyTree, batch: PyTree, *context: PyTree, group: int, radius: float, **options: Any
) -> estimates.Estimate:
    """The mean over groups of m examples of each group's own worst case, with its standard error over groups.

    Foret et al. 2021, section 4: each group moves the parameters for itself, so the smaller m, the larger the value, and the
    closer it was found to go with generalisation. Cost: as `worst_case` on the whole batch, in `examples / group` calls of
    one compilation.

    Args:
      loss: as of `worst_case`; so are the other arguments and options.
      params: the parameters.
      batch: `[examples, ...]`.
      *context: handed to the loss.
      group: m; divides the examples.
      radius: of each group's neighbourhood.
      **options: of `worst_case`; a key is folded with the group's number.

    Raises:
      UserError: m does not divide the batch, and as `worst_case`.
    """
    groups = loops.split(batch, group)
    key, values = options.pop("key", None), []
    for index in range(jax.tree.leaves(groups)[0].shape[0]):
        part = jax.tree.map(lambda leaf, i=index: leaf[i], groups)
        own = None if key is None else jax.random.fold_in(key, index)
        values.append(worst_case(loss, params, part, *context, radius=radius, key=own, **options).sharpness)
    return estimates.over_samples(np.asarray(values), len(values) * options.get("steps", 20))


def average_case(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *context: PyTree,
    key: Key[Array, ""],
    radius: float,
    norm: str = "l2",
    adaptive: str | None = None,
    stabiliser: float = 0.0,
    pairs: int = 10,
    subset: str | None = None,
    microbatch: int | None = None,
) -> estimates.Estimate:
    """The average-case sharpness: the mean of `L(w + d) - L(w)` over random d, with its standard error over draws.

    For `l2`, d is Gaussian with `E|d / T|^2 = radius^2`, so that a radius means the same as of `worst_case`; for `linf`, uniform
    in the cube. To second order it is `radius^2 tr(T H T) / 2n`, and a third of `radius^2 tr(T H T) / 2`. (Andriushchenko et al.
    2023 scale each of the n entries with rho itself: their rho is `radius / sqrt(n)`.) Draws come in pairs d and -d, so that the
    gradient's term, which averages to zero, adds no noise. Rounding: of the order of 1e-7 of the loss.

    Cost: `2 pairs + 1` forward passes.

    Args:
      loss: as of `worst_case`; so are the other arguments.
      params: the parameters.
      batch: `[examples, ...]`.
      *context: handed to the loss.
      key: draws the perturbations.
      radius: see above.
      norm: `l2` or `linf`.
      adaptive: None, or a kind of `scales`.
      stabiliser: of `scales`.
      pairs: of draws; two at least for a standard error.
      subset: as of `worst_case`.
      microbatch: likewise.

    Raises:
      UserError: as `worst_case`.
    """
    if norm not in NORMS:
        raise errors.unknown("norm", norm, NORMS)
    _check(radius, "pairs", pairs)
    problem = _problem(loss, params, batch, context, subset, microbatch)
    units = _units(problem.like, adaptive, stabiliser)
    length = radius / math.sqrt(trees.count(problem.like)) if norm == "l2" else radius
    # The first, of no length, is the loss at the parameters by the same program.
    lengths = np.asarray([0.0] + [length] * pairs)
    found = [
        float(_pair(norm, problem, units, jax.random.fold_in(key, index), size))
        for index, size in enumerate(lengths.astype(jnp.result_type(float)))
    ]
    if not np.isfinite(found).all():
        raise errors.UserError("the loss is not finite at these parameters or near them: take a smaller radius.")
    return estimates.over_samples(np.asarray(found[1:]) - found[0], 2 * pairs + 1)


def planned(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *context: PyTree,
    norm: str = "l2",
    adaptive: str | None = None,
    steps: int = 20,
    pairs: int = 10,
    microbatch: int | None = None,
) -> list[programs.Program]:
    """The compiled programs of one `worst_case` and one `average_case`, for planning; arrays may be shapes."""
    problem = _problem(loss, params, batch, context, None, microbatch)
    units = None if adaptive is None else problem.like
    number = np.zeros((), jnp.result_type(float))
    placement = krylov.placement_of(problem.like)
    state = ascents.start.eval_shape(norm, placement, problem, None, number)
    if placement is not None:
        shardings = ascents.shardings(state, placement)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return [
        loops.plan(
            ascents.Ascend(norm), state, steps, problem, units, number, *ascents.checkpoints(steps), donate=True
        ),
        programs.Program("ends", ascents.ends, (problem, units, state)),
        programs.Program("pair", _pair, (problem, units, key, number), times=pairs + 1, static=(norm,)),
    ]


def _problem(
    loss: Callable, params: PyTree, batch: PyTree, context: tuple, subset, microbatch
) -> batches.BatchOperator:
    return batches.assemble(ascents.Slope(loss), params, batch, context, subset, microbatch)


def _units(params: PyTree, adaptive: str | None, stabiliser: float) -> PyTree:
    """None for units of one, which are never multiplied by."""
    return None if adaptive is None else scales(params, adaptive, stabiliser=stabiliser)


def _check(radius: float, name: str, count: int) -> None:
    if not radius >= 0 or not math.isfinite(radius):
        raise errors.UserError(f"radius is {radius}: expected a number from 0.")
    if count < 1:
        raise errors.UserError(f"{name} is {count}: expected a whole number from 1.")


@functools.partial(jax.jit, static_argnums=0)
def _pair(norm: str, problem: batches.BatchOperator, units: PyTree, key: Key[Array, ""], length) -> jax.Array:
    """The mean loss at the two ends of a random line through the parameters."""
    problem = problem.replace(product=ascents.Height(problem.product.loss))
    uniform = jax.tree.map(lambda leaf: leaf / math.sqrt(3.0), probes.draw(key, problem.like))
    draw = uniform if norm == "linf" else jax.tree.map(lambda u: math.sqrt(2.0) * jax.lax.erf_inv(u), uniform)
    with jax.default_matmul_precision("highest"):
        ends = [batches.mean(problem, ascents.moved(problem.like, units, draw, sign * length)) for sign in (1.0, -1.0)]
    return 0.5 * (ends[0] + ends[1])
