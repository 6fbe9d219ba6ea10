"""What is said of a loss landscape in numbers, computed from its records alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from robust_vit.curvature import surfaces
from robust_vit.metrics import statistics

_DRAWS = 500  # Of the bootstrap over images: each goes over the whole grid.


@dataclasses.dataclass(frozen=True)
class Surface:
    """The records of all planes as arrays on the grid.

    Attributes:
      axes: the offsets along each axis.
      losses: NLL of each image, `[planes, *grid, images]`.
      l2: the L2 term, `[planes, *grid]`; zero where it was not asked for.
      accuracy: share of the images that are classified rightly, `[planes, *grid]`.
    """

    axes: tuple[Float[np.ndarray, " offsets"], ...]
    losses: np.ndarray
    l2: np.ndarray
    accuracy: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """The mean over images, with the L2 term where it was asked for, `[planes, *grid]`."""
        return self.losses.mean(axis=-1, dtype=np.float64) + self.l2

    @property
    def symmetric(self) -> float | None:
        """How far every axis goes to both sides; None where one does not go as far to one side as to the other."""
        ends = [(-axis[0], axis[-1]) for axis in self.axes]
        return ends[0][1] if all(np.isclose(end, ends[0][1]) for pair in ends for end in pair) else None


def surface(records: Mapping[str, np.ndarray], *, l2: bool) -> Surface:
    """The records by plane and place, with the L2 term or without."""
    coordinates, planes = records["coordinates"], records["plane"]
    axes = tuple(np.unique(coordinates[:, axis]) for axis in range(coordinates.shape[1]))
    shape = (len(np.unique(planes)), *map(len, axes))
    order = np.lexsort((*coordinates.T[::-1], planes))
    return Surface(
        axes,
        records["example_loss"][order].reshape(*shape, -1),
        records["l2"][order].reshape(shape) if l2 else np.zeros(shape),
        records["accuracy"][order].reshape(shape),
    )


def summary(surface: Surface) -> dict[str, Any]:
    """Loss at the centre, curvature, rise, radius of doubling, share of negative second differences and roughness.

    Intervals are over images where there is one plane, else over planes.
    """
    axes, loss = surface.axes, surface.loss
    finite = np.isfinite(loss)
    at_centre = surfaces.centre(loss, axes)[0]
    noise = 16 * np.finfo(np.float32).eps * np.abs(loss[finite]).max() if finite.any() else 0.0
    found: dict[str, Any] = {
        "loss": _plain(
            statistics.mean(_centre_losses(surface) + float(surfaces.centre(surface.l2, axes)[0]), draws=_DRAWS)
        ),
        "accuracy": float(surfaces.centre(surface.accuracy, axes)[0]),
        "finite": float(finite.mean()),
        "grid": [len(axis) for axis in axes],
        "spans": [[float(axis[0]), float(axis[-1])] for axis in axes],
        "step": float(max(axis[1] - axis[0] for axis in axes)),
        "planes": len(loss),
        "images": surface.losses.shape[-1],
    }
    found["curvature"] = [
        _estimate(surface, lambda values, axis=axis: surfaces.curvature(values, axes)[..., axis])
        for axis in range(len(axes))
    ]
    half = None if surface.symmetric is None else float(surface.symmetric) / 2
    found["rise"] = None if half is None else _estimate(surface, lambda values: surfaces.rise(values, axes, half))
    found["rise_at"] = half
    found["radius"] = None
    if surface.symmetric is not None and at_centre > 0:
        # Capped where the axes end, so that what is never reached is not left out of means.
        limit = float(surface.symmetric)
        found["radius"] = _estimate(surface, lambda values: np.minimum(surfaces.radius(values, axes), limit))
        found["radius"] |= {"reached": float(np.mean(surfaces.radius(loss, axes) < limit)), "limit": limit}
    found["negative"] = _estimate(surface, lambda values: surfaces.negative_share(values, axes, noise))
    found["roughness"] = _estimate(surface, lambda values: surfaces.roughness(values, axes))
    return found


def per_image(surface: Surface, statistic: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, " images"]:
    """A statistic that is linear in the losses, of each image alone, in the mean over planes."""
    losses = np.moveaxis(surface.losses, -1, 0).astype(np.float64)
    return statistic(losses).reshape(len(losses), -1).mean(axis=1)


def _estimate(surface: Surface, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any] | None:
    """A statistic of the surface with its interval; None where it is not finite.

    Args:
      surface: of all planes.
      statistic: of losses `[planes, *grid]`, a number a plane.
    """
    with np.errstate(invalid="ignore"):
        values = np.asarray(statistic(surface.loss), np.float64)
    if not np.isfinite(values).all():
        return None
    if len(values) > 1:
        return _plain(statistics.mean(values, over="planes"))
    images = surface.losses.shape[-1]
    flat = surface.losses.reshape(-1, images).astype(np.float64)
    shape = surface.l2.shape

    def of_rows(rows: np.ndarray) -> float:
        # How often each image was drawn, so that a resample is one product with a matrix.
        shares = np.bincount(rows, minlength=images) / len(rows)
        with np.errstate(invalid="ignore"):
            return float(statistic((flat @ shares).reshape(shape) + surface.l2)[0])

    return _plain(statistics.bootstrap(of_rows, np.arange(images), draws=_DRAWS))


def _centre_losses(surface: Surface) -> np.ndarray:
    """Of each image, at the weights; the same in every plane."""
    return surfaces.centre(np.moveaxis(surface.losses, -1, 0)[:, 0], surface.axes).astype(np.float64)


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    return dataclasses.asdict(interval)
