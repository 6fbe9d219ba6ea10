"""Findings from spectra: negative shares, means, condition numbers, effective ranks, agreement of eigenspaces.

Two numbers go by the name of a share of negative eigenvalues. `negative_share` is of the few values of largest magnitude that
Lanczos returns, as in Park & Kim 2022; `Density.negative` is of all eigenvalues, by the weights of stochastic Lanczos quadrature,
and `Density.negative_mass` weighs each by its magnitude. They answer different questions and differ by orders of magnitude.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from robust_vit import errors, trees
from robust_vit.curvature import bases, densities, estimates

PyTree = Any


def negative_share(
    values: Float[np.ndarray, "*batches top"], *, noise: Float[np.ndarray, "*batches"] | float = 0.0
) -> Float[np.ndarray, "*batches"]:
    """The share of negative ones among the eigenvalues of largest magnitude, `[...]`.

    Its mean over mini-batches is the NEP of Park & Kim 2022 (arXiv 2202.06709): the integral of the density of those
    eigenvalues up to zero. In [0, 1]; it says nothing of the eigenvalues that were not computed.

    Args:
      values: `[..., top]`, of one mini-batch or of many.
      noise: a value nearer to zero than this has no sign and counts as none (`Eigenvalues.noise`); one number, or one a row.
    """
    return (values < -np.asarray(noise, np.float64)[..., None]).mean(axis=-1)


def positive_mean(
    values: Float[np.ndarray, "*batches top"], *, noise: Float[np.ndarray, "*batches"] | float = 0.0
) -> float:
    """The mean of the positive ones among the eigenvalues of largest magnitude; zero where there is none.

    Over all mini-batches together it is the APE of Park & Kim 2022 (arXiv 2202.06709): `E[λ | λ > 0]`. Arguments as of
    `negative_share`.
    """
    positive = values > np.asarray(noise, np.float64)[..., None]
    return float(values[positive].mean()) if positive.any() else 0.0


def condition_number(
    values: Float[np.ndarray, " top"],
    residuals: Float[np.ndarray, " top"] | float = 0.0,
    *,
    noise: float = 0.0,
) -> float:
    """A lower bound of `|λ|max / |λ|min` of a symmetric operator, from Ritz values with their residuals.

    Each value has an eigenvalue within its residual, so `|λ|min` is at most the least `|value| + residual`; and no Ritz value is
    larger than the largest eigenvalue. Values within the noise are left out, because their reciprocals are noise too: an
    eigenvalue there, or one that was not computed, makes the true number larger, and it is infinite for a singular operator.
    Infinite where no value is above the noise.

    Args:
      values: `[top]`: of both ends of the spectrum, or all Ritz values.
      residuals: `[top]`, of each.
      noise: a value nearer to zero than this is none (`Eigenvalues.noise`).
    """
    sizes = np.abs(np.asarray(values, np.float64))
    resolved = sizes > noise
    if not resolved.any():
        return float("inf")
    smallest = (sizes + residuals)[resolved].min()
    return float(max(sizes.max() / smallest, 1.0))


def effective_rank(density: densities.Density) -> estimates.Estimate:
    """The participation ratio `(Σ|λ|)² / Σλ²`: k for k equal eigenvalues among zeros, the dimension for an identity.

    The error over probes is that of the delta method. Zero for the zero operator.

    Args:
      density: of the operator, without a weight decay that would count for all its dimensions.
    """
    sizes = np.abs(np.nan_to_num(density.nodes))
    first, second = (density.weights * sizes).sum(axis=1), (density.weights * sizes**2).sum(axis=1)
    if not second.any():
        return estimates.Estimate(0.0, 0.0, len(first), density.applications)
    mean, square = first.mean(), second.mean()
    value = density.dimension * mean**2 / square
    # What each probe adds to the ratio, to first order about the means.
    parts = value * (1.0 + 2.0 * (first / mean - 1.0) - (second / square - 1.0))
    return estimates.over_samples(parts, density.applications)


def overlap(first: PyTree, second: PyTree) -> float:
    """The mean squared projection of one eigenspace on another, `|U'V|² / k` for k orthonormal vectors each (Frobenius norm).

    1 for equal spaces, 0 for orthogonal ones, and on average `(vectors of the second) / dimension` for random ones: of a
    network's parameters nearly none, so that a hundredth is much. Of the top eigenspace over training: Gur-Ari et al. 2018
    (arXiv 1812.04754). The spaces are those that the rows span, whatever basis of them is given. No application; no leaf is
    ravelled.

    Args:
      first: vectors `[k, ...]`, such as `Eigenvalues.vectors`.
      second: vectors of the same structure and shapes but for their number.

    Raises:
      UserError: vectors of different spaces.
    """
    shapes = [[(path, leaf.shape[1:]) for path, leaf in _named(vectors)] for vectors in (first, second)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise errors.UserError(
            "the vectors are of different spaces: give two sets over the same parameters, a leading axis of vectors on each leaf."
        )
    projections, rank = _projections(first, second)
    return float(projections / rank) if rank else 0.0


def _named(vectors: PyTree) -> list[tuple[str, Any]]:
    return list(zip(trees.paths(vectors), jax.tree.leaves(vectors), strict=True))


@jax.jit
def _projections(first: PyTree, second: PyTree) -> tuple[jax.Array, jax.Array]:
    """The sum of the squared inner products of two orthonormal bases, and how many vectors the first has."""
    first, second = bases.orthonormal(first), bases.orthonormal(second)
    lengths = jax.vmap(trees.norm)(first)
    return jnp.sum(bases.products(first, second) ** 2), jnp.sum(lengths > 0.5)
