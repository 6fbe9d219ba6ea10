"""Which parameters an operator works in: all, or those whose path matches a regular expression."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import errors, trees

PyTree = Any


def select(params: PyTree, subset: str | None) -> tuple[PyTree, PyTree]:
    """The parameters whose path matches, and the others: None where a leaf belongs to the other; without a subset, all and None.

    Raises:
      UserError: the subset is no regular expression, or matches nothing.
    """
    if subset is None:
        return params, None
    try:
        chosen = trees.mask(params, subset)
    except re.error as error:
        raise errors.UserError(f"subset={subset!r} is no regular expression ({error}).") from None
    if not any(jax.tree.leaves(chosen)):
        examples = ", ".join(trees.paths(params)[:3])
        raise errors.UserError(f"subset={subset!r} matches no parameter; paths look like {examples}.")
    selected = jax.tree.map(lambda keep, leaf: leaf if keep else None, chosen, params)
    return selected, jax.tree.map(lambda keep, leaf: None if keep else leaf, chosen, params)


def merge(chosen: PyTree, rest: PyTree) -> PyTree:
    """What `select` took apart."""
    if rest is None:
        return chosen
    return jax.tree.map(
        lambda one, other: other if one is None else one, chosen, rest, is_leaf=lambda leaf: leaf is None
    )


def check(params: PyTree) -> None:
    """Refuses what has no second derivative worth the name.

    Raises:
      UserError: there are no parameters, or one that is not float32 or float64.
    """
    if not jax.tree.leaves(params):
        raise errors.UserError("there are no parameters to differentiate in: the pytree is empty.")
    for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 4:
            raise errors.UserError(
                f"parameter {path or 'given'} is {dtype}: curvature needs float32 or float64 parameters; cast it, or leave it "
                "out with `subset`."
            )
