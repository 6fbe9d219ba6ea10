"""Power iteration with deflation: what Lanczos replaces, and what published spectra were made with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from robust_vit import errors, trees
from robust_vit.curvature import bases, eigenvalues, operators, probes

PyTree = Any
RULES = ("residual", "pyhessian")


def power_iteration(
    operator: operators.Operator,
    key: Key[jax.Array, ""],
    *,
    top: int = 5,
    steps: int = 100,
    tolerance: float = 1e-3,
    rule: str = "residual",
    starts: PyTree | None = None,
) -> eigenvalues.Eigenvalues:
    """The eigenvalues of largest magnitude, one after the other, each in the complement of those before it.

    `rule="pyhessian"` is that of PyHessian's `eigenvalues` (Yao et al. 2020, arXiv 1912.07145; `pyhessian/hessian.py`), with
    which the spectra of Park & Kim 2022 were made: it stops when two quotients in a row differ by less than `tolerance` of
    the value, and returns the one before with the vector after. Where +a and -b are nearly as large that may be anything
    between them; an eigenvalue nearly as large as another may come in its place (tests/benchmarks/results/curvature.md). So
    every pair comes with its true residual, and `lanczos` is what to use: fewer products, and both ends.

    Cost: at most `top * (steps + 1)` applications; memory of `top + 3` vectors.

    Args:
      operator: the map.
      key: draws the starting vectors.
      top: how many; no more than the dimension.
      steps: applications for each at most; of the rule `pyhessian` 100, with a tolerance of 1e-3, are the defaults there.
      tolerance: relative; of the residual, or of the change of the quotient.
      rule: `residual` or `pyhessian`.
      starts: like the operator's vectors with a leading axis `[top]`: where each begins, in place of a draw.

    Returns:
      `converged` says whether the true residual is within the tolerance, whatever rule ended the iteration; `ritz` and `weights`
      are empty.

    Raises:
      UserError: an unknown rule, a number below one, or a product that is not finite.
    """
    if rule not in RULES:
        raise errors.unknown("stopping rule", rule, RULES)
    for name, value in (("top", top), ("steps", steps)):
        if value < 1:
            raise errors.UserError(f"{name} is {value}: expected a whole number from 1.")
    top = min(top, trees.count(operator.like))
    found = jax.tree.map(lambda leaf: jnp.zeros((top, *leaf.shape), leaf.dtype), operator.like)
    values, residuals, scale, applications = np.zeros(top), np.zeros(top), 0.0, 0
    for index in range(top):
        if starts is None:
            vector = probes.draw(jax.random.fold_in(key, index), operator.like)
        else:
            vector = jax.tree.map(lambda rows, i=index: rows[i], starts)
        vector, value = _normalised(vector, found), None
        for _ in range(steps):
            image = operator(vector)
            quotient, residual, length = (float(number) for number in _measures(vector, image))
            applications += 1
            if not np.isfinite([quotient, residual]).all():
                raise operators.not_finite(applications)
            scale = max(scale, length)
            if rule == "residual":
                value = quotient
                if residual <= tolerance * abs(quotient) or length == 0:
                    break
            else:
                before, value = value, quotient
                if before is not None and abs(before - quotient) / (abs(before) + 1e-6) < tolerance:
                    value, vector = before, _normalised(image, found)
                    break
            vector = _normalised(image, found)
        values[index] = value
        found = jax.tree.map(lambda rows, v, i=index: rows.at[i].set(v), found, vector)
    for index in range(top):
        vector = jax.tree.map(lambda rows, i=index: rows[i], found)
        residuals[index] = bases.length(trees.add(operator(vector), vector, -values[index]))
    noise = float(bases.BREAKDOWN * jnp.finfo(jnp.result_type(*jax.tree.leaves(found))).eps * scale)
    return eigenvalues.Eigenvalues(
        values=values,
        residuals=residuals,
        converged=residuals <= np.maximum(tolerance * np.abs(values), noise),
        noise=noise,
        applications=applications + top,
        ritz=np.zeros(0),
        weights=np.zeros(0),
        vectors=found,
    )


@jax.jit
def _measures(vector: PyTree, image: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The quotient `v'Av` of a unit vector, `|Av - (v'Av) v|`, and `|Av|`."""
    quotient = trees.dot(vector, image)
    return quotient, bases.length(trees.add(image, vector, -quotient)), bases.length(image)


@jax.jit
def _normalised(vector: PyTree, found: PyTree) -> PyTree:
    """The unit vector of what is outside of those found; zero where nothing is."""
    _, vector = bases.orthogonalise_twice(found, bases.shrunk(vector, bases.magnitude(vector)))
    return trees.unit(vector)
