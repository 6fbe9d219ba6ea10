"""The planes that a loss landscape is looked at in: random ones, eigenvectors, and that of the way the run was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from robust_vit import curvature, errors, trees
from robust_vit import mesh as meshes
from robust_vit.curvature import directions
from robust_vit.studies import study

PLANES = ("random", "eigenvectors", "trajectory")
_CHECK_EVERY = 10  # Lanczos steps between two looks at what has converged.
_MARGIN = 0.2  # Of a trajectory's extent, beyond it on each side.
_RISE = 1.0  # Nats that the parabola of the largest eigenvalue rises by up to the end of an axis.


class Plane(NamedTuple):
    """Directions through the weights, and how far to look along them.

    Attributes:
      directions: like the parameters, with a leading axis `[axes]`.
      spans: lowest and highest coordinate of each axis.
      exhibits: what is worth keeping beside the losses.
    """

    directions: Any
    spans: Sequence[tuple[float, float]]
    exhibits: dict[str, np.ndarray]


def random(
    key: jax.Array, params: Any, *, dimensions: int, span: float | None, normalisation: str, vectors: str
) -> Plane:
    """Random directions at the scale of the filters."""
    options = _options(params, normalisation, vectors)
    found = curvature.random_directions(key, params, count=dimensions, **options)
    return Plane(found, [(-(span or 1.0), span or 1.0)] * dimensions, {})


def eigenvectors(
    operator: curvature.Operator,
    key: jax.Array,
    params: Any,
    *,
    dimensions: int,
    span: float | None,
    normalisation: str,
    vectors: str,
    rank: int,
    tolerance: float,
) -> Plane:
    """The eigenvectors of the largest eigenvalues by magnitude; without a span, as far as the parabola rises by one nat."""
    eigen = curvature.lanczos(
        operator,
        key,
        rank=rank,
        top=dimensions,
        tolerance=tolerance,
        check_every=min(_CHECK_EVERY, rank),
        vectors=True,
    )
    found = eigen.vectors
    reach = math.sqrt(2.0 * _RISE / max(abs(float(eigen.values[0])), 1e-12))
    if normalisation != "none":
        found = curvature.normalise_directions(found, params, **_options(params, normalisation, vectors))
        reach = 1.0
    exhibits = {
        "eigenvalues": eigen.values,
        "eigenvalue_residuals": eigen.residuals,
        "eigenvalue_converged": eigen.converged,
    }
    return Plane(found, [(-(span or reach), span or reach)] * dimensions, exhibits)


def programs(operator: curvature.Operator, *, rank: int) -> list:
    """The compiled programs of `eigenvectors`."""
    return curvature.programs(operator, rank=rank, check_every=min(_CHECK_EVERY, rank))


def trajectory(subject: study.Subject, params: Any, *, dimensions: int, span: float | None) -> Plane:
    """The principal components of the run's checkpoints about the weights; without a span, as far as holds all of them.

    Raises:
      UserError: a checkpoint of another model.
    """
    steps, points = [], []
    for step, read in subject.history.items():
        point = _like(read(), params, step)
        # The weights themselves may be among the checkpoints; they are the origin.
        if float(trees.norm(trees.add(point, params, -1.0))) > 0:
            steps.append(step)
            points.append(point)
    if len(points) < dimensions:
        raise errors.UserError(
            f"{len(points)} of the run's checkpoints differ from its weights, and {dimensions} are needed: keep more of them, "
            'as checkpoint.milestones=("epochs",) does.'
        )
    found = curvature.trajectory(points, params, count=dimensions)
    low = np.minimum(found.coordinates.min(axis=0), 0.0)
    high = np.maximum(found.coordinates.max(axis=0), 0.0)
    margin = _MARGIN * (high - low)
    # The second axis is often much the shorter: it is given a quarter of the first at least, so that the picture is no strip.
    margin = np.maximum(margin, (0.25 * (high - low).max() - (high - low)) / 2)
    spans = [(-span, span)] * dimensions if span else list(zip(low - margin, high + margin, strict=True))
    exhibits = {
        "trajectory": found.coordinates,
        "trajectory_step": np.asarray(steps, np.int64),
        "trajectory_distance": found.distances,
        "explained": found.explained,
    }
    return Plane(found.directions, spans, exhibits)


def _options(params: Any, normalisation: str, vectors: str) -> dict[str, Any]:
    """The published rule; under `park2022` tables of positions rest, where there are any."""
    tables = any(jax.tree.leaves(trees.mask(params, directions.POSITIONS)))
    still = directions.POSITIONS if normalisation == "park2022" and tables else None
    return {"normalisation": normalisation, "vectors": vectors, "still": still}


def _like(point: Any, params: Any, step: int) -> Any:
    """The parameters of a checkpoint, placed as the weights are."""
    shapes = [jax.tree.map(np.shape, tree) for tree in (point, params)]
    if shapes[0] != shapes[1]:
        raise errors.UserError(f"the checkpoint of step {step} is of another model than the weights.")

    def one(leaf: Any, like: jax.Array) -> jax.Array:
        placed = getattr(like, "sharding", None)
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        return jax.numpy.asarray(leaf) if placed is None else meshes.put(leaf, placed)

    return jax.tree.map(one, point, params)
