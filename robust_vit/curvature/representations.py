"""Bent representations: how the direction of a model's features changes while its input moves along a straight line.

An input moves by x + t d, and its features move by z(t). Kim et al. 2022 (arXiv 2210.05742) ask how far z(t) is from a line:
`direction_change` measures the angles between its successive steps, as published, `sweep` does so over many directions of many
images in one compilation, and `turning` and `tangent_change` differentiate in t and so have no step, or no difference, to
round. Features are any function `features(inputs, *context) -> [examples, dim]` of each example alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from robust_vit import errors, programs
from robust_vit import mesh as meshes
from robust_vit.curvature import bends

PyTree = Any


class Turning(NamedTuple):
    """The exact bend of z(t) at t = 0.

    Attributes:
      speed: |z'|, features for a unit of t.
      rate: dθ/dt = |z''⊥|/|z'| with z''⊥ the part of z'' across z', in radians for a unit of t. Discrete angles of step Δ are
        Δ times this for small Δ. Zero where z' is.
      curvature: |z''⊥|/|z'|², one over the radius of the circle that z(t) follows; 1 / features.
    """

    speed: Float[Array, " examples"]
    rate: Float[Array, " examples"]
    curvature: Float[Array, " examples"]


def direction_change(
    features: Callable,
    inputs: Float[Array, "examples ..."],
    directions: Float[Array, "examples ..."],
    *context: PyTree,
    span: float,
    steps: int,
    clip: bool = False,
) -> bends.Bend:
    """The angles θ(n) between successive steps of the features while each input moves from x to x + span · d.

    θ(n) is the angle between z(n+1) - z(n) and z(n) - z(n-1), with z(n) the features of x + n · (span / steps) · d; Kim et al.
    2022, arXiv 2210.05742, figure 5. It is computed as 2 atan2(|a - b|, |a + b|), which keeps all digits of small angles, where
    the arc cosine loses half. Differences cancel, so `noise` says what of an angle is rounding. Cost: steps + 1 forward passes an
    example, at once.

    Args:
      features: `features(inputs, *context) -> [examples, dim]`, in float32 or float64. A named function or a frozen dataclass: it
        is a part of the compiled program's key.
      inputs: where the paths start.
      directions: d, one an input; with ||d||₂ = √D (`line_directions`) t is the root mean square change of a pixel.
      *context: pytrees handed to the features as they are, for example a classifier.
      span: t at the end. Another one compiles nothing.
      steps: of the path, at least 2.
      clip: put moved inputs back into [0, 1]. Not in the paper's measure of bends: a path that is clipped is itself bent.

    Raises:
      errors.UserError: fewer than two steps, no positive span, directions of another shape, or features that are no
        `[examples, dim]` in float32 or wider.
    """
    check(features, inputs, directions, *context, span=span, steps=steps)
    return _measure(features, steps, clip, inputs, directions, jnp.asarray(span, inputs.dtype), context)


def sweep(
    features: Callable,
    inputs: Float[Array, "examples ..."],
    keys: Key[Array, " examples"],
    *context: PyTree,
    directions: int,
    span: float,
    steps: int,
    clip: bool = False,
    batch: int = 16,
    mesh: Mesh | None = None,
) -> bends.Bend:
    """`direction_change` along many random directions of each input: NumPy arrays `[examples, directions, ...]`.

    Statistics over 1,000 directions of 10 images are Kim et al.'s figure 5. One compilation; a host loop calls it for `batch`
    paths at a time, and the last call is filled up with paths that are dropped. Directions are drawn where they are used:
    those of `line_directions(inputs, keys, count=directions)`. Cost: steps + 1 forward passes a path.

    Args:
      features: as in `direction_change`, as are `inputs`, `context`, `span`, `steps` and `clip`.
      inputs: where the paths start.
      keys: one typed key an input. A direction depends on its input's key and on its own number, and on nothing else.
      *context: handed to the features.
      directions: of each input.
      span: t at the end.
      steps: of a path.
      clip: put moved inputs back into [0, 1].
      batch: paths of a call: batch · (steps + 1) inputs go through the features at once.
      mesh: the devices that share the paths of a call.
    """
    check(features, inputs, inputs, *context, span=span, steps=steps)
    if directions < 1 or batch < 1:
        raise errors.UserError(f"directions={directions} and batch={batch}: expected whole numbers from 1.")
    pairs = np.stack(np.divmod(np.arange(len(inputs) * directions, dtype=np.int32), np.int32(directions)), axis=1)
    span, parts = jnp.asarray(span, inputs.dtype), []
    for start in range(0, len(pairs), batch):
        chosen = pairs[np.minimum(np.arange(start, start + batch), len(pairs) - 1)]
        placed = meshes.put_global(mesh, chosen)
        parts.append(_measure_drawn(features, steps, clip, inputs, keys, placed, span, context))
    # Fetched at the end, so that the device has the next call while the host asks for it.
    found = jax.tree.map(lambda *leaves: np.concatenate([meshes.fetch(leaf) for leaf in leaves])[: len(pairs)], *parts)
    return jax.tree.map(lambda leaf: leaf.reshape(len(inputs), directions, *leaf.shape[1:]), found)


def program_of_sweep(
    features: Callable,
    inputs: jax.ShapeDtypeStruct,
    *context: PyTree,
    directions: int,
    steps: int,
    clip: bool,
    batch: int,
    mesh: Mesh | None = None,
) -> programs.Program:
    """The compiled program of `sweep` and how often it runs, for planning; arrays may be shapes."""
    sharding = None if mesh is None else meshes.examples(mesh, batch)
    pairs = jax.ShapeDtypeStruct((batch, 2), jnp.int32, sharding=sharding)
    keys = jax.ShapeDtypeStruct(inputs.shape[:1], jax.eval_shape(lambda: jax.random.key(0)).dtype)
    arguments = (inputs, keys, pairs, _scalar(inputs), context)
    times = -(-inputs.shape[0] * directions // batch)
    return programs.Program("paths", _measure_drawn, arguments, times=times, static=(features, steps, clip))


def program_of_path(
    features: Callable, inputs: jax.ShapeDtypeStruct, *context: PyTree, steps: int, clip: bool
) -> programs.Program:
    """The compiled program of `direction_change`, for planning; arrays may be shapes."""
    arguments = (inputs, inputs, _scalar(inputs), context)
    return programs.Program("path", _measure, arguments, static=(features, steps, clip))


def programs_of_close_look(
    features: Callable, inputs: jax.ShapeDtypeStruct, *context: PyTree, clip: bool, turnings: int, step_sizes: int
) -> list[programs.Program]:
    """The compiled programs of `turning`, and of `direction_change` in two steps and `tangent_change`, for planning.

    Args:
      features: as in `direction_change`.
      inputs: one an input and direction.
      *context: handed to the features.
      clip: as in `direction_change`.
      turnings: how often `turning` is asked for.
      step_sizes: how often the two others are.
    """
    arguments = (inputs, inputs, _scalar(inputs), context)
    found = [programs.Program("turning rate", _turning, (inputs, inputs, context), times=turnings, static=(features,))]
    if step_sizes:
        path = program_of_path(features, inputs, *context, steps=2, clip=clip)
        tangents = programs.Program("tangents", _tangent_change, arguments, times=step_sizes, static=(features,))
        found += [dataclasses.replace(path, times=step_sizes), tangents]
    return found


def line_directions(
    inputs: Float[Array, "examples ..."], keys: Key[Array, " examples"], *, count: int
) -> Float[Array, "examples directions ..."]:
    """Directions of each input, uniform on the sphere ||d||₂ = √D, D numbers an input; `keys` are random."""
    return _draw_all(count, inputs, keys)


def feature_path(
    features: Callable,
    inputs: Float[Array, "examples ..."],
    directions: Float[Array, "examples ..."],
    *context: PyTree,
    span: float,
    steps: int,
    clip: bool = False,
) -> Float[Array, "examples points dim"]:
    """The features at the steps + 1 points from x to x + span · d: what `direction_change` measures, with its arguments."""
    check(features, inputs, directions, *context, span=span, steps=steps)
    return _trajectory(features, steps, clip, inputs, directions, jnp.asarray(span, inputs.dtype), context)


def turning(
    features: Callable,
    inputs: Float[Array, "examples ..."],
    directions: Float[Array, "examples ..."],
    *context: PyTree,
) -> Turning:
    """The exact turning rate and curvature of z(t) = features(x + t d) at t = 0, by a Jacobian-vector product of another.

    No step and no difference, so no floor of rounding. Of a network that is piecewise linear (ReLU, BatchNorm, averages) z'' is
    zero wherever it exists and so are both: its bends are all in its kinks, and `tangent_change` over a step or
    `direction_change` sees them. Cost: 3.2 forward passes an example on a ViT, by XLA's count.

    Args:
      features: as in `direction_change`, as are the others; differentiable forwards twice.
      inputs: x.
      directions: d.
      *context: handed to the features.
    """
    check(features, inputs, directions, *context)
    return _turning(features, inputs, directions, context)


def tangent_change(
    features: Callable,
    inputs: Float[Array, "examples ..."],
    directions: Float[Array, "examples ..."],
    *context: PyTree,
    step: float,
) -> Float[Array, " examples"]:
    """The angle between the exact tangents z'(0) and z'(step) in radians, the angle θ(n) without its cancellation.

    For small steps it is step times the turning rate where z is smooth, and the kinks that lie in the step where it is not.
    Zero where a tangent is. Cost: 4.1 forward passes an example on a ViT.

    Args:
      features: as in `direction_change`, as are the others.
      inputs: x.
      directions: d.
      *context: handed to the features.
      step: t of the second tangent. Another one compiles nothing.
    """
    check(features, inputs, directions, *context)
    return _tangent_change(features, inputs, directions, jnp.asarray(step, inputs.dtype), context)


def check(
    features: Callable, inputs: Any, directions: Any, *context: PyTree, span: float = 1.0, steps: int = 2
) -> None:
    """Refuses what makes no path, before anything is computed; arrays may be shapes.

    Raises:
      errors.UserError: what was given, and what is expected.
    """
    if not isinstance(steps, int) or steps < 2:
        raise errors.UserError(
            f"steps={steps!r}: expected a whole number from 2, since an angle lies between two steps."
        )
    if not span > 0:
        raise errors.UserError(f"span={span}: expected a positive length of the path.")
    if inputs.shape != directions.shape:
        raise errors.UserError(
            f"inputs have shape {tuple(inputs.shape)} and directions {tuple(directions.shape)}: give one direction an input."
        )
    shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    found = jax.eval_shape(features, shape, *context)
    if getattr(found, "ndim", None) != 2 or found.shape[0] != inputs.shape[0]:
        raise errors.UserError(
            f"the features are {jax.tree.map(lambda leaf: leaf.shape, found)} for inputs {tuple(inputs.shape)}: expected one "
            "array [examples, dim]; pool or flatten it."
        )
    if jnp.finfo(found.dtype).bits < 32:
        raise errors.UserError(
            f"the features are {found.dtype}: their differences would be rounding. Use classifier.in_float32(model)."
        )


def _draw(key: jax.Array, number: jax.Array, like: jax.Array) -> jax.Array:
    drawn = jax.random.normal(jax.random.fold_in(key, number), like.shape, like.dtype)
    return drawn * (np.sqrt(like.size) / jnp.linalg.norm(drawn.ravel())).astype(like.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _draw_all(count: int, inputs: jax.Array, keys: jax.Array) -> jax.Array:
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda key, one: jax.vmap(lambda number: _draw(key, number, one))(numbers))(keys, inputs)


def _points(steps: int, clip: bool, inputs: jax.Array, directions: jax.Array, span: jax.Array) -> jax.Array:
    sizes = span * (jnp.arange(steps + 1, dtype=inputs.dtype) / steps)
    sizes = sizes.reshape(1, -1, *(1,) * (inputs.ndim - 1))
    moved = inputs[:, None] + sizes * directions[:, None]
    return jnp.clip(moved, 0.0, 1.0) if clip else moved


def _along(features: Callable, points: jax.Array, context: tuple) -> jax.Array:
    found = features(points.reshape(-1, *points.shape[2:]), *context)
    return found.reshape(*points.shape[:2], -1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _trajectory(features, steps, clip, inputs, directions, span, context):
    with jax.default_matmul_precision("highest"):
        return _along(features, _points(steps, clip, inputs, directions, span), context)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(features, steps, clip, inputs, directions, span, context):
    with jax.default_matmul_precision("highest"):
        points = _points(steps, clip, inputs, directions, span)
        return bends.measure(_along(features, points, context), points.reshape(*points.shape[:2], -1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure_drawn(features, steps, clip, inputs, keys, pairs, span, context):
    chosen = inputs[pairs[:, 0]]
    directions = jax.vmap(_draw)(keys[pairs[:, 0]], pairs[:, 1], chosen)
    return _measure(features, steps, clip, chosen, directions, span, context)


def _tangent(features: Callable, inputs: jax.Array, directions: jax.Array, size: jax.Array, context: tuple):
    """`z` and `z'` at t = size."""
    return jax.jvp(
        lambda t: features(inputs + t * directions, *context),
        (size.astype(inputs.dtype),),
        (jnp.ones((), inputs.dtype),),
    )


@functools.partial(jax.jit, static_argnums=0)
def _turning(features, inputs, directions, context):
    with jax.default_matmul_precision("highest"):
        zero, one = jnp.zeros((), inputs.dtype), jnp.ones((), inputs.dtype)
        velocity, acceleration = jax.jvp(
            lambda t: _tangent(features, inputs, directions, t, context)[1], (zero,), (one,)
        )
        speed = jnp.linalg.norm(velocity, axis=-1)
        safe = jnp.where(speed == 0, 1.0, speed)
        unit = velocity / safe[:, None]
        across = acceleration - jnp.sum(acceleration * unit, axis=-1, keepdims=True) * unit
        rate = jnp.where(speed == 0, 0.0, jnp.linalg.norm(across, axis=-1) / safe)
        return Turning(speed, rate, rate / safe)


@functools.partial(jax.jit, static_argnums=0)
def _tangent_change(features, inputs, directions, step, context):
    with jax.default_matmul_precision("highest"):
        first, second = (_tangent(features, inputs, directions, size, context)[1] for size in (0.0 * step, step))
        return bends.angles(first, second)


def _scalar(inputs: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), inputs.dtype)
