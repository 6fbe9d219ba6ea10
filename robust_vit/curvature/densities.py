"""Spectral densities by stochastic Lanczos quadrature: raw nodes and weights first, curves and shares from them."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Key

from robust_vit import errors, trees
from robust_vit.curvature import eigenvalues, estimates, growth, krylov, operators


@dataclasses.dataclass(frozen=True)
class Density:
    """The spectral density of an operator, one quadrature a probe. Plain NumPy in float64.

    Attributes:
      nodes: `[probes, rank]`: Ritz values, ascending; not a number beyond the dimension.
      weights: `[probes, rank]`: of each node, zero there and outside of the probe's own Krylov space; a probe's sum is one, and
        its sum of weight times node is the quadratic form of the probe.
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


def density(
    operator: operators.Operator,
    key: Key[Array, ""],
    *,
    rank: int = 100,
    probes: int = 8,
    block: int | None = None,
    folder: pathlib.Path | str | None = None,
) -> Density:
    """The spectral density by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani et al. 2019, arXiv 1901.10159).

    Each probe is a random unit vector whose Lanczos decomposition gives the Gauss quadrature of its own spectral measure: exact
    for polynomials up to degree `2 rank - 1`. The mean over probes is unbiased for them. Cost: `probes * rank` applications,
    memory of `block * (rank + 3)` vectors, one compilation, and one more where `block` does not divide `probes`.

    Args:
      operator: the map; also one over a data set (`curvature.stream`), which then costs `rank` passes over the data a block.
      key: draws the probes.
      rank: Lanczos steps a probe; no more than the dimension.
      probes: how many; two at least for standard errors.
      block: probes in lock-step, which share each application as a block of vectors does. None takes them one after the other,
        or, over a data set, all at once. A probe has the same nodes and weights, to rounding.
      folder: where the decompositions are saved every ten steps. The same call goes on from what is there, to the same bytes.

    Raises:
      UserError: the operator returned a NaN or an infinity; a number of probes, steps or a block below one; the folder is that of
        another operator, key, rank or block.
    """
    block = (probes if operators.by_host(operator) else 1) if block is None else block
    for name, value in (("rank", rank), ("probes", probes), ("block", block)):
        if value < 1:
            raise errors.UserError(f"{name} is {value}: expected a whole number from 1.")
    dimension = trees.count(operator.like)
    rank, chunk = krylov.counts(operator, rank, 1, None, saved=folder is not None)
    nodes, weights = np.full((probes, rank), np.nan), np.zeros((probes, rank))
    noise, total = 0.0, 0
    for first in range(0, probes, block):
        numbers = range(first, min(first + block, probes))
        keys = jnp.stack([jax.random.fold_in(key, probe) for probe in numbers])
        state = krylov.start(operator, keys if len(numbers) > 1 else keys[0], rank=rank)
        part = None if folder is None else pathlib.Path(folder) / f"probe_{first}"
        with contextlib.closing(growth.looks(operator, state, steps=chunk, folder=part)) as looks:
            for look in looks:
                state, applications = look
                # Also so that a number that is not finite is found early.
                found = [eigenvalues.solve(one, 1, "magnitude", 0.0)[0] for one in krylov.lanes(state)]
        total += applications
        for probe, one in zip(numbers, found, strict=True):
            nodes[probe, : len(one.ritz)], weights[probe, : len(one.ritz)] = one.ritz, one.weights
            noise = max(noise, one.noise)
    return Density(nodes, weights, dimension, noise, total)
