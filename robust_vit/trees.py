"""Algebra and naming of pytrees. Nothing here ravels a tree: the sharding of every leaf is kept."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def dot(left: PyTree, right: PyTree) -> jax.Array:
    """Inner product over all leaves, accumulated in float32, or float64 where a leaf is float64."""
    products = jax.tree.map(lambda a, b: jnp.sum(_widen(a) * _widen(b)), left, right)
    return sum(jax.tree.leaves(products), jnp.float32(0.0))


def norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, in float32 or wider."""
    return jnp.sqrt(dot(tree, tree))


def scale(factor: jax.Array | float, tree: PyTree) -> PyTree:
    """`factor * tree`, each leaf in its own dtype."""
    return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), tree)


def unit(tree: PyTree) -> PyTree:
    """The tree at Euclidean length one; zero where it has no length."""
    length = norm(tree)
    return scale(jnp.where(length > 0, 1.0 / jnp.where(length > 0, length, 1.0), 0.0), tree)


def add(left: PyTree, right: PyTree, factor: jax.Array | float = 1.0) -> PyTree:
    """`left + factor * right`, each leaf in the dtype of `left`."""
    return jax.tree.map(lambda a, b: (a + factor * b).astype(a.dtype), left, right)


def zeros_like(tree: PyTree) -> PyTree:
    """A tree of zeros."""
    return jax.tree.map(jnp.zeros_like, tree)


def count(tree: PyTree) -> int:
    """How many numbers the tree holds."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def normal_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Standard normal draws shaped like `tree`; a leaf's draw depends on the key and its path alone, not on its neighbours."""
    return map_with_path(lambda path, leaf: jax.random.normal(_path_key(key, path), leaf.shape, leaf.dtype), tree)


def paths(tree: PyTree) -> list[str]:
    """The slash-joined path of every leaf, in leaf order: `encoder/block00/mlp/kernel`."""
    return [_slash(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """`jax.tree.map` that also hands over the slash-joined path of the leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(_slash(path), leaf), tree)


def mask(tree: PyTree, pattern: str) -> PyTree:
    """A tree of Python booleans: True where the regular expression is found in the leaf's path."""
    compiled = re.compile(pattern)
    return map_with_path(lambda path, _: compiled.search(path) is not None, tree)


def all_finite(tree: PyTree) -> jax.Array:
    """A scalar boolean: no leaf holds a NaN or an infinity."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def _widen(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _path_key(key: jax.Array, path: str) -> jax.Array:
    # CRC-32 rather than `hash`, which Python salts anew in every process.
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _slash(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
