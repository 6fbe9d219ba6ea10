"""Spectral densities by stochastic Lanczos quadrature: raw nodes and weights first, curves and shares from them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Key

from robust_vit import errors, trees
from robust_vit.curvature import eigenvalues, estimates, operators


@dataclasses.dataclass(frozen=True)
class Density:
    """The spectral density of an operator, one quadrature a probe. Plain NumPy in float64.

    Attributes:
      nodes: `[probes, rank]`: Ritz values, ascending; not a number from where a probe's Krylov space was complete.
      weights: `[probes, rank]`: of each node, zero there; a probe's sum is one, and its sum of weight times node is the
        quadratic form of the probe.
      dimension: of the operator: the trace is `dimension` times the mean of the density.
      noise: a node nearer to zero than this has no sign: the rounding of the arithmetic at the largest eigenvalue.
      applications: of the operator.
    """

    nodes: Float[np.ndarray, "probes rank"]
    weights: Float[np.ndarray, "probes rank"]
    dimension: int
    noise: float
    applications: int

    def integral(self, function) -> estimates.Estimate:
        """The mean of `function(eigenvalue)` over the spectrum, with its standard error over probes.

        Args:
          function: of an array of nodes.
        """
        values = np.where(self.weights > 0, function(np.nan_to_num(self.nodes)), 0.0)
        return estimates.over_samples((self.weights * values).sum(axis=1), self.applications)

    def negative(self, floor: float | None = None) -> estimates.Estimate:
        """The share of eigenvalues below zero by more than a floor: the noise, where none is given."""
        floor = self.noise if floor is None else floor
        return self.integral(lambda nodes: nodes < -floor)

    def positive(self, floor: float | None = None) -> estimates.Estimate:
        """The share of eigenvalues above zero by more than a floor: the noise, where none is given."""
        floor = self.noise if floor is None else floor
        return self.integral(lambda nodes: nodes > floor)

    def negative_mass(self, floor: float | None = None) -> estimates.Estimate:
        """The sum of |eigenvalue| over those below zero by more than a floor (the noise), as a share of that over all."""
        floor = self.noise if floor is None else floor
        magnitudes = self.weights * np.abs(np.nan_to_num(self.nodes))
        negative = np.where(np.nan_to_num(self.nodes) < -floor, magnitudes, 0.0).sum(axis=1)
        return estimates.ratio(negative, magnitudes.sum(axis=1), self.applications)

    def trace(self) -> estimates.Estimate:
        """The sum of the eigenvalues."""
        return estimates.scaled(self.integral(lambda nodes: nodes), self.dimension)

    def curve(
        self, at: Float[np.ndarray, " points"], *, width: float
    ) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
        """The density smoothed by a Gaussian, and its standard error over probes, each `[points]`.

        Args:
          at: eigenvalues to evaluate it at.
          width: the Gaussian's standard deviation, in units of the eigenvalues. A picture depends on it; nodes do not.
        """
        nodes = np.nan_to_num(self.nodes)[:, :, None]
        kernels = scipy.stats.norm.pdf(np.asarray(at, np.float64)[None, None], nodes, width)
        each = (self.weights[:, :, None] * kernels).sum(axis=1)
        error = each.std(axis=0, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.full(each.shape[1], np.nan)
        return each.mean(axis=0), error


def density(operator: operators.Operator, key: Key[Array, ""], *, rank: int = 100, probes: int = 8) -> Density:
    """The spectral density by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani et al. 2019, arXiv 1901.10159).

    Each probe is a random unit vector whose Lanczos decomposition gives the Gauss quadrature of its own spectral measure: exact
    for polynomials up to degree `2 rank - 1`. The mean over probes is unbiased for them. Cost: `probes * rank` applications,
    memory of `rank + 3` vectors, one compilation.

    Args:
      operator: the map.
      key: draws the probes.
      rank: Lanczos steps a probe; no more than the dimension.
      probes: how many; two at least for standard errors.

    Raises:
      UserError: the operator returned a NaN or an infinity; a number of probes or steps below one.
    """
    for name, value in (("rank", rank), ("probes", probes)):
        if value < 1:
            raise errors.UserError(f"{name} is {value}: expected a whole number from 1.")
    dimension = trees.count(operator.like)
    rank = min(rank, dimension)
    nodes, weights = np.full((probes, rank), np.nan), np.zeros((probes, rank))
    noise, applications = 0.0, 0
    for probe in range(probes):
        found = eigenvalues.lanczos(operator, jax.random.fold_in(key, probe), rank=rank, top=1)
        nodes[probe, : len(found.ritz)], weights[probe, : len(found.ritz)] = found.ritz, found.weights
        noise, applications = max(noise, found.noise), applications + found.applications
    return Density(nodes, weights, dimension, noise, applications)
