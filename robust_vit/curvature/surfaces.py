"""Numbers of a sampled landscape: how it bends at its centre, how far it stays low, how bumpy it is. Plain NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from robust_vit import errors

# Twice the leading coefficient of the parabola through, or nearest to, so many equally spaced values.
_FIVE = np.array([2.0, -1.0, -2.0, -1.0, 2.0]) / 7.0
_THREE = np.array([1.0, -2.0, 1.0])


def origin(axes: Sequence[Float[np.ndarray, " offsets"]]) -> tuple[int, ...]:
    """Where zero is on each axis.

    Raises:
      UserError: an axis that does not hold zero.
    """
    found = []
    for axis in axes:
        place = np.flatnonzero(np.asarray(axis) == 0.0)
        if len(place) != 1:
            raise errors.UserError("an axis of the landscape does not hold zero once: use curvature.offsets.")
        found.append(int(place[0]))
    return tuple(found)


def centre(
    values: Float[np.ndarray, "*leading points"], axes: Sequence[Float[np.ndarray, " offsets"]]
) -> Float[np.ndarray, "*leading"]:
    """The values at the weights themselves, of values `[..., len(axes[0]), ...]`, one axis of the array an axis of the plane."""
    return values[(..., *origin(axes))]


def curvature(
    values: Float[np.ndarray, "*leading points"], axes: Sequence[Float[np.ndarray, " offsets"]]
) -> Float[np.ndarray, "*leading axes"]:
    """The second derivative at the centre along each axis, `[..., axes]`, in the values' unit over the coordinates' squared.

    That of the parabola fitted to the five points about the centre, or to three where there are no five: the curvature at the
    scale of the grid's step, which at a kink or in a bump narrower than the step is not that of the Hessian.
    """
    found = []
    for line, axis, start in _through_the_centre(values, axes):
        reach = 2 if 2 <= start < len(axis) - 2 else 1
        if not 1 <= start < len(axis) - 1:
            raise errors.UserError(
                "the centre is at the end of an axis: a second derivative needs points on both sides."
            )
        weights = (_FIVE if reach == 2 else _THREE) / (axis[start + 1] - axis[start]) ** 2
        # Differences to the centre first: the sum of the weights is zero only up to rounding.
        found.append((line[..., start - reach : start + reach + 1] - line[..., start : start + 1]) @ weights)
    return np.stack(found, axis=-1)


def rise(
    values: Float[np.ndarray, "*leading points"], axes: Sequence[Float[np.ndarray, " offsets"]], radius: float
) -> Float[np.ndarray, "*leading"]:
    """How much higher the values are at a distance from the centre, in the mean over both ways along each axis, `[...]`.

    Between grid points by linear interpolation.

    Raises:
      UserError: an axis does not reach as far.
    """
    found = []
    for line, axis, start in _through_the_centre(values, axes):
        if axis[-1] < radius * (1 - 1e-9) or axis[0] > -radius * (1 - 1e-9):
            raise errors.UserError(
                f"an axis of the landscape goes from {axis[0]:g} to {axis[-1]:g}: the radius {radius:g} is not on it."
            )
        step = axis[start + 1] - axis[start]
        for sign in (-1, 1):
            place = min(max(start + sign * radius / step, 0.0), len(axis) - 1.0)
            low = min(int(place), len(axis) - 2)
            share = place - low
            found.append((1 - share) * line[..., low] + share * line[..., low + 1] - line[..., start])
    return np.mean(found, axis=0)


def radius(
    values: Float[np.ndarray, "*leading points"], axes: Sequence[Float[np.ndarray, " offsets"]], factor: float = 2.0
) -> Float[np.ndarray, "*leading"]:
    """The smallest distance from the centre at which the values have grown by this factor, `[...]`; infinite where they do not.

    Along the two ways of each axis, and of the two diagonals of a plane, at the first crossing between grid points by linear
    interpolation; what is not finite has grown.

    Args:
      values: positive at the centre.
      axes: the offsets.
      factor: above one.
    """
    level = factor * centre(values, axes)[..., None]
    found = []
    for ray, distances in _rays(values, axes):
        high = ~(ray < level)
        first = np.argmax(high, axis=-1)[..., None]
        before = np.maximum(first - 1, 0)
        left, right = (np.take_along_axis(ray, each, axis=-1) for each in (before, first))
        between = np.isfinite(right) & (right > left)
        share = np.divide(level - left, right - left, out=np.zeros_like(right), where=between)
        crossing = distances[before] + share * (distances[first] - distances[before])
        found.append(np.where(high.any(axis=-1), crossing[..., 0], np.inf))
    return np.min(found, axis=0)


def negative_share(
    values: Float[np.ndarray, "*leading points"],
    axes: Sequence[Float[np.ndarray, " offsets"]],
    noise: float = 0.0,
) -> Float[np.ndarray, "*leading"]:
    """The share of second differences along the grid's lines that are negative: zero where every line is convex, `[...]`.

    Args:
      values: on the grid.
      axes: the offsets.
      noise: a second difference of no more than this has no sign, and counts as not negative; what is not finite does not count.
    """
    negative = total = 0
    for place in range(-len(axes), 0):
        with np.errstate(invalid="ignore"):
            second = np.diff(values, n=2, axis=place)
        finite, over = np.isfinite(second), tuple(range(-len(axes), 0))
        negative = negative + np.sum(finite & (second < -noise), axis=over)
        total = total + np.sum(finite, axis=over)
    return negative / np.maximum(total, 1)


def roughness(
    values: Float[np.ndarray, "*leading points"], axes: Sequence[Float[np.ndarray, " offsets"]]
) -> Float[np.ndarray, "*leading"]:
    """How bumpy the grid's lines are: zero where each falls to one minimum and rises from there, `[...]`.

    A line's total variation, less what it takes to go from its first value down to its least and up to its last, over its
    range: each bump counts twice its height. In the mean over the grid's lines; a line that is not finite is left out.
    """
    total = count = 0
    for place in range(-len(axes), 0):
        lines = np.moveaxis(values, place, -1)
        with np.errstate(invalid="ignore", divide="ignore"):
            variation = np.abs(np.diff(lines, axis=-1)).sum(axis=-1)
            least = lines.min(axis=-1)
            needed = lines[..., 0] + lines[..., -1] - 2.0 * least
            spread = lines.max(axis=-1) - least
            share = np.where(spread > 0, (variation - needed) / np.where(spread > 0, spread, 1.0), 0.0)
        finite = np.isfinite(lines).all(axis=-1)
        over = tuple(range(-(len(axes) - 1), 0))
        # What float64 leaves of a line without a bump is none.
        total = total + np.where(finite & (share > 1e-12), share, 0.0).sum(axis=over)
        count = count + finite.sum(axis=over)
    return total / np.maximum(count, 1)


def _through_the_centre(values: np.ndarray, axes: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The line through the centre along each axis, `[..., offsets]`, its offsets, and where zero is on it."""
    start = origin(axes)
    for number, axis in enumerate(axes):
        chosen = [slice(None) if other == number else start[other] for other in range(len(axes))]
        yield values[(..., *chosen)], np.asarray(axis, np.float64), start[number]


def _rays(values: np.ndarray, axes: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The values from the centre outwards, and their distances from it."""
    start = origin(axes)
    ways = [(-1,), (1,)] if len(axes) == 1 else [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    for way in ways:
        room = [
            (len(axis) - 1 - begin) if sign > 0 else begin
            for axis, begin, sign in zip(axes, start, way, strict=True)
            if sign
        ]
        steps = np.arange(min(room) + 1)
        places = [begin + sign * steps for begin, sign in zip(start, way, strict=True)]
        distances = np.sqrt(sum(np.asarray(axis)[place] ** 2 for axis, place in zip(axes, places, strict=True)))
        yield values[(..., *places)], distances
