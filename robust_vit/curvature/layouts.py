"""Where the leaves of vectors lie while a solver works on them: those that are alike in one array, so that less is compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the leaves of a pytree are gathered. A deep network has hundreds, of a dozen shapes.

    Attributes:
      structure: of the pytree.
      groups: numbers of the leaves that are members of each array, in the order of its axis of members; none at all where no
        two leaves are alike: then the pytree stays as it is.
    """

    structure: Any
    groups: tuple[tuple[int, ...], ...]

    def together(self, tree: PyTree, axis: int = 0) -> PyTree:
        """The arrays of a pytree, a tuple.

        Args:
          tree: with the layout's structure.
          axis: of the members: how many axes every leaf has before those of the vectors.
        """
        if not self.groups:
            return tree
        leaves = self.structure.flatten_up_to(tree)
        return tuple(jnp.stack([leaves[leaf] for leaf in group], axis) for group in self.groups)

    def apart(self, arrays: PyTree, axis: int = 0) -> PyTree:
        """The pytree of the arrays that `together` made with this axis.

        Outside of a program each shape is compiled once, whatever the member.
        """
        if not self.groups:
            return arrays
        leaves: list[Any] = [None] * sum(map(len, self.groups))
        for array, group in zip(arrays, self.groups, strict=True):
            for member, leaf in enumerate(group):
                leaves[leaf] = jax.lax.dynamic_index_in_dim(array, member, axis, keepdims=False)
        return jax.tree.unflatten(self.structure, leaves)

    def shardings(self, placement: tuple[NamedSharding, ...]) -> tuple[NamedSharding, ...]:
        """Where the arrays lie, given where the leaves do: every device keeps its own part of each member."""
        if not self.groups:
            return placement
        first = [placement[group[0]] for group in self.groups]
        return tuple(NamedSharding(one.mesh, PartitionSpec(None, *one.spec)) for one in first)


def of(like: PyTree) -> Layout:
    """The layout that gathers leaves of one shape, dtype and place.

    Args:
      like: arrays or their shapes. What is traced has no place.
    """
    leaves, structure = jax.tree.flatten(like)
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        place = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        place = place if isinstance(place, NamedSharding) else None
        groups.setdefault((jnp.shape(leaf), jnp.result_type(leaf), place), []).append(index)
    alike = len(groups) < len(leaves)
    return Layout(structure, tuple(map(tuple, groups.values())) if alike else ())
