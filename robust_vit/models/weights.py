"""Weights on disk, and between the forms of a model: loop and scan, one grid of positions and another."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import errors, files
from robust_vit.models import positions, transfer

_logger = logging.getLogger(__name__)

PyTree = Any
_LISTED = 6


def save_weights(path: os.PathLike | str, variables: PyTree) -> None:
    """Writes variable collections to an `.npz` under slash-joined names; equal weights give equal bytes."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    files.write_npz(path, flat)


def load_weights(path: os.PathLike | str, variables: PyTree, *, reset: str | None = None) -> PyTree:
    """Variables like the given ones, with the values of an `.npz`: this library's, or tensors under torch names.

    Layouts that `transfer.recognise` knows are translated. Blocks are stacked or unstacked as the variables ask. Learned
    positions of another square grid are resized, which is logged.

    Args:
      path: the file.
      variables: what the module needs: `models.init` gave them.
      reset: regular expression; variables that it finds keep the given values, whatever the file holds. `"^params/head/"`
        takes a trunk and starts a new classifying layer.

    Raises:
      errors.UserError: no such file, a damaged one, or names and shapes that do not fit; the first of them are listed.
    """
    try:
        arrays = files.read_npz(path)
    except FileNotFoundError as error:
        raise errors.UserError(f"there are no weights at {path}: check the path.") from error
    layout = transfer.recognise(arrays)
    if layout is not None:
        arrays = flax.traverse_util.flatten_dict(transfer.from_torch(arrays, layout=layout), sep="/")
    return fit(arrays, variables, reset=reset, source=str(path))


def fit(arrays: Mapping[str, np.ndarray], variables: PyTree, *, reset: str | None = None, source: str) -> PyTree:
    """Variables like the given ones with the values of flat, slash-named arrays; see `load_weights`.

    Raises:
      errors.UserError: names that are missing or extra, or shapes that differ.
    """
    wanted = flax.traverse_util.flatten_dict(variables, sep="/")
    found = dict(arrays)
    stacked = any(name.startswith("params/blocks/") for name in wanted)
    if stacked != any(name.startswith("params/blocks/") for name in found):
        change = stack_blocks if stacked else unstack_blocks
        found = flax.traverse_util.flatten_dict(change(flax.traverse_util.unflatten_dict(found, sep="/")), sep="/")
    kept = re.compile(reset) if reset is not None else None
    if kept is not None:
        found = {name: value for name, value in found.items() if not kept.search(name)}
        found.update({name: value for name, value in wanted.items() if kept.search(name)})
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(found.keys() - wanted.keys())
    found = {name: _regridded(name, found[name], wanted[name].shape) for name in wanted if name in found}
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in sorted(found.items())
        if tuple(value.shape) != tuple(wanted[name].shape)
    ]
    problems = [
        f"{kind} {', '.join(names[:_LISTED])}{f' and {len(names) - _LISTED} more' if len(names) > _LISTED else ''}"
        for kind, names in (("missing", missing), ("extra", extra), ("other shape", shapes))
        if names
    ]
    if problems:
        raise errors.UserError(
            f"{source} does not fit the model: {'; '.join(problems)}. Choose the model's options as the weights were "
            'trained, or start some anew with reset (as "^params/head/").'
        )
    loaded = {name: jnp.asarray(found[name], wanted[name].dtype) for name in wanted}
    return flax.traverse_util.unflatten_dict(loaded, sep="/")


def stack_blocks(variables: PyTree) -> PyTree:
    """Variables of a `scan` ViT from those of a loop ViT: `blockNN` of `params` stacked along a leading axis as `blocks`."""
    params = dict(variables["params"])
    names = sorted(name for name in params if re.fullmatch(r"block\d+", name))
    blocks = [params.pop(name) for name in names]
    if not blocks:
        raise errors.UserError(
            "there are no blocks to stack: expected params with block00, block01, ... of a loop ViT."
        )
    stack = jnp.stack if isinstance(jax.tree.leaves(blocks[0])[0], jax.Array) else np.stack
    return {**variables, "params": {**params, "blocks": jax.tree.map(lambda *leaves: stack(leaves), *blocks)}}


def unstack_blocks(variables: PyTree) -> PyTree:
    """Variables of a loop ViT from those of a `scan` ViT; the inverse of `stack_blocks`."""
    params = dict(variables["params"])
    if "blocks" not in params:
        raise errors.UserError("there are no stacked blocks: expected params with blocks, of a ViT with scan=True.")
    blocks = params.pop("blocks")
    depth = jax.tree.leaves(blocks)[0].shape[0]
    split = {f"block{index:02d}": jax.tree.map(lambda leaf, i=index: leaf[i], blocks) for index in range(depth)}
    return {**variables, "params": {**params, **split}}


def resize_positions(variables: PyTree, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> PyTree:
    """Variables of a ViT for another grid of patches: learned positions and relative tables interpolated bilinearly.

    Args:
      variables: of a ViT with position "learned" or "relative", loop or scan.
      old_grid: rows and columns of patches that they were made for.
      new_grid: rows and columns that are wanted.

    Raises:
      errors.UserError: a table is not of `old_grid`.
    """

    def resized(path: tuple, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        if name not in ("position", "relative_position"):
            return leaf
        length, rows = leaf.shape[-2], old_grid[0] * old_grid[1]
        known = (rows, rows + 1)
        if name == "relative_position":
            rows = (2 * old_grid[0] - 1) * (2 * old_grid[1] - 1)
            known = (rows, rows + 3)
        if length not in known:
            raise errors.UserError(
                f"{name} has {length} rows, which is no grid of {old_grid[0]} x {old_grid[1]} patches: give the grid "
                "that the positions were made for."
            )
        return _resize(name, leaf, old_grid, new_grid)

    return jax.tree_util.tree_map_with_path(resized, variables)


def _resize(name: str, table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    resize = positions.resize_table if name == "position" else positions.resize_relative
    if table.ndim == 3:
        return jnp.stack([resize(layer, old=old, new=new) for layer in table])
    return resize(jnp.asarray(table), old=old, new=new)


def _regridded(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A position table of another square grid, resized; anything else as it is."""
    name = path.rsplit("/", 1)[-1]
    if name not in ("position", "relative_position") or value.ndim != len(shape) or value.shape[-2] == shape[-2]:
        return value
    extras = (0, 1) if name == "position" else (0, 3)
    for extra in extras:
        old, new = math.isqrt(value.shape[-2] - extra), math.isqrt(shape[-2] - extra)
        if old**2 != value.shape[-2] - extra or new**2 != shape[-2] - extra:
            continue
        if name == "relative_position":
            old, new = (old + 1) // 2, (new + 1) // 2
        _logger.info("%s resized from a grid of %d x %d patches to %d x %d.", path, old, old, new, new)
        return _resize(name, value, (old, old), (new, new))
    return value
