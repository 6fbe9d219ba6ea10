"""The blocks of a network's parameters, and an operator in one of them: which layers the curvature is in."""

from __future__ import annotations

import re
from typing import Any

import flax.struct
import jax
import numpy as np

from robust_vit import errors, trees
from robust_vit.curvature import operators, subsets

PyTree = Any
_STEM = {"stem", "stem_norm", "embedding", "position", "class_token"}
_HEAD = {"norm", "pool", "head"}
_TRANSFORMER = re.compile(r"block(s|\d+)")
_RESIDUAL = re.compile(r"(stage\d+)_(block\d+)")


def blocks(params: PyTree) -> dict[str, str]:
    """Name -> regular expression of each block of the parameters, from the stem to the head: each parameter is in exactly one.

    Each expression is a `subset=` of `hessian` and its relatives, and the traces over all blocks sum to the trace. Of a Vision
    Transformer: `stem`, `block00/attention`, `block00/mlp`, ..., `head`, each branch with its norm (where the blocks are scanned
    `blocks/attention` is that of all depths); of a ResNet: `stem`, `stage1/block00`, ..., `head`; of any other pytree one block
    a key.

    Args:
      params: the parameters; their shapes are enough.

    Raises:
      UserError: there are none.
    """
    paths = trees.paths(params)
    if not paths:
        raise errors.UserError("there are no parameters to take apart: the pytree is empty.")
    branched = {path.split("/")[0] for path in paths if re.match(rf"{_TRANSFORMER.pattern}/mlp", path)}
    members: dict[str, list[str]] = {}
    for path in paths:
        name, prefix = _block(path, branched)
        prefixes = members.setdefault(name, [])
        if prefix not in prefixes:
            prefixes.append(prefix)
    # Attention before MLP, as they are computed: leaves come by the names of their layers.
    depths = list(dict.fromkeys(name.split("/")[0] for name in members))
    order = sorted(members, key=lambda name: (name == "head", name != "stem", depths.index(name.split("/")[0]), name))
    return {name: _expression(members[name]) for name in order}


class Within(flax.struct.PyTreeNode):
    """An operator in one block of the parameters: `P A P`, with P the projection on the block. `within` makes it.

    Its eigenvalues are those of the block, and zeros. `subset=` gives the same block as an operator of its own, which is cheaper
    to apply and is compiled anew for each block; this is compiled once for all of them.

    Attributes:
      operator: the whole one.
      mask: one number a leaf: one in the block, zero outside.
    """

    operator: operators.Operator
    mask: PyTree

    @property
    def like(self) -> PyTree:
        """The vectors of the whole operator."""
        return self.operator.like

    def __call__(self, vector: PyTree) -> PyTree:
        """The map applied to a vector. One application of the whole operator."""
        return _masked(self.mask, self.operator(_masked(self.mask, vector)))

    def block(self, vectors: PyTree) -> PyTree:
        """The map applied to each of a block of vectors, `[block, ...]`, where the host applies the whole operator."""
        return _masked(self.mask, self.operator.block(_masked(self.mask, vectors)))


def within(operator: operators.Operator, subset: str) -> Within:
    """The operator in the parameters whose path matches a regular expression, on the vectors of the whole one.

    Args:
      operator: in all parameters.
      subset: as of `hessian`, for example a value of `blocks(params)`.

    Raises:
      UserError: the expression is none, or matches nothing.
    """
    subsets.select(operator.like, subset)
    mask = trees.mask(operator.like, subset)
    return Within(operator, jax.tree.map(np.float32, mask))


def _block(path: str, branched: set[str]) -> tuple[str, str]:
    """The block of a parameter, and the beginning of the path that it shares with its neighbours there."""
    first, *rest = path.split("/")
    if first in branched and rest:
        return f"{first}/{'mlp' if rest[0].startswith('mlp') else 'attention'}", f"{first}/{rest[0]}"
    residual = _RESIDUAL.fullmatch(first)
    if residual:
        return "/".join(residual.groups()), first
    name = "stem" if first in _STEM else "head" if first in _HEAD else first
    return name or "all", first


def _expression(prefixes: list[str]) -> str:
    return f"^(?:{'|'.join(map(re.escape, prefixes))})(?:/|$)"


def _masked(mask: PyTree, vector: PyTree) -> PyTree:
    return jax.tree.map(lambda chosen, leaf: chosen.astype(leaf.dtype) * leaf, mask, vector)
