"""The geometry of paths: angles between successive steps and their rounding, how straight a path is, the plane it lies in."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Bend(NamedTuple):
    """How paths of features bend, one row a path. Angles are in radians.

    Attributes:
      angles: θ(n) between the n-th step of the path and the one before it, in [0, π]; 0 goes straight on. Zero where a step has
        no length, and `noise` is π there.
      noise: what rounding alone makes of an angle where the path is straight, at most π: each feature vector and each input is
        taken to be off by the machine epsilon of its length, across the path, and the features to follow the input as fast as
        along the path. Against float64, errors were measured at 0.3 to 0.9 of this along random directions (linear maps,
        multilayer perceptrons, ViTs, a ResNet); along a gradient, where features move faster than rounding moves them, less.
      lengths: of the steps.
      straightness: distance of the ends over the length of the path, in [0, 1]; 1 is straight. 1 where the path has no length.
      linearity: share of the first principal component in the variance of the points, λ₁/Σλ; 1 is straight.
    """

    angles: Float[Array, "*paths inner"]
    noise: Float[Array, "*paths inner"]
    lengths: Float[Array, "*paths steps"]
    straightness: Float[Array, "*paths"]
    linearity: Float[Array, "*paths"]


def angles(left: Float[Array, "*rows dim"], right: Float[Array, "*rows dim"]) -> Float[Array, "*rows"]:
    """Angles between vectors in radians, with all digits of small ones (Kahan 2006); zero where a vector is."""
    first, second = (jnp.linalg.norm(vector, axis=-1, keepdims=True) for vector in (left, right))
    # Normalised before they are subtracted: products of tiny steps would underflow.
    left, right = left / jnp.where(first == 0, 1.0, first), right / jnp.where(second == 0, 1.0, second)
    found = 2.0 * jnp.arctan2(jnp.linalg.norm(left - right, axis=-1), jnp.linalg.norm(left + right, axis=-1))
    # What is not a number stays none: only zeros are told apart.
    return jnp.where((first == 0)[..., 0] | (second == 0)[..., 0], 0.0, found)


def measure(path: Float[Array, "paths points dim"], inputs: Float[Array, "paths points size"]) -> Bend:
    """How paths of features bend.

    Args:
      path: features at the points.
      inputs: flat inputs at the points, whose rounding is a part of the noise.
    """
    moved = jnp.diff(path, axis=1)
    lengths = jnp.linalg.norm(moved, axis=-1)
    found = angles(moved[:, 1:], moved[:, :-1])
    still = (lengths[:, 1:] == 0) | (lengths[:, :-1] == 0)
    noise = jnp.hypot(_rounding(path, lengths), _rounding(inputs, jnp.linalg.norm(jnp.diff(inputs, axis=1), axis=-1)))
    centred = path - jnp.mean(path, axis=1, keepdims=True)
    gram = jnp.einsum("bpd,bqd->bpq", centred, centred)
    whole, arc = jnp.trace(gram, axis1=1, axis2=2), jnp.sum(lengths, axis=1)
    chord = jnp.linalg.norm(path[:, -1] - path[:, 0], axis=-1)
    return Bend(
        angles=found,
        noise=jnp.where(still, jnp.pi, jnp.minimum(noise, jnp.pi)).astype(found.dtype),
        lengths=lengths,
        straightness=_share(chord, arc),
        linearity=_share(jnp.linalg.eigvalsh(gram)[:, -1], whole),
    )


def project(paths: Float[np.ndarray, "*paths points dim"]) -> tuple[np.ndarray, np.ndarray]:
    """Each path in the plane that holds most of it, that of its first two principal components; in float64 on the host.

    Args:
      paths: features or flat pixels.

    Returns:
      `[*paths, points, 2]`, from the origin, in units of the distance between the path's ends (of its largest extent where they
      meet), turned in its plane so that the end lies to the right of the start and most of the path above; and `[*paths, 2]`,
      the shares of the two components in its variance.
    """
    paths = np.asarray(paths, np.float64)
    flat = paths.reshape(-1, *paths.shape[-2:])
    coordinates, shares = np.zeros((*flat.shape[:2], 2)), np.zeros((len(flat), 2))
    for index, path in enumerate(flat):
        centred = path - path.mean(axis=0)
        # The Gram matrix of the points: a path has far fewer of them than an image has pixels.
        values, vectors = np.linalg.eigh(centred @ centred.T)
        values = np.maximum(values[::-1][:2], 0.0)
        found = vectors[:, ::-1][:, :2] * np.sqrt(values)
        found = found - found[0]
        angle = np.arctan2(found[-1, 1], found[-1, 0])
        cosine, sine = np.cos(angle), np.sin(angle)
        found = found @ np.asarray([[cosine, -sine], [sine, cosine]])
        found[:, 1] *= -1.0 if found[:, 1].sum() < 0 else 1.0
        unit = np.linalg.norm(path[-1] - path[0])
        unit = unit if unit > 1e-6 * np.abs(found).max() else np.abs(found).max()
        coordinates[index] = found / (unit or 1.0)
        shares[index] = values / ((centred**2).sum() or 1.0)
    return coordinates.reshape(*paths.shape[:-1], 2), shares.reshape(*paths.shape[:-2], 2)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """At most 1, and 1 of nothing."""
    return jnp.where(whole == 0, 1.0, jnp.minimum(part / jnp.where(whole == 0, 1.0, whole), 1.0))


def _rounding(points: jax.Array, lengths: jax.Array) -> jax.Array:
    """The angle that one unit of rounding in each point makes where the path is straight, all of it across the path."""
    unit = jnp.finfo(points.dtype).eps * jnp.linalg.norm(points[:, 1:-1], axis=-1)
    before, after = (1.0 / jnp.where(part == 0, 1.0, part) for part in (lengths[:, :-1], lengths[:, 1:]))
    return unit * jnp.sqrt(before**2 + after**2 + (before + after) ** 2)
