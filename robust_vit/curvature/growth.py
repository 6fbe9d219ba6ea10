"""Lanczos decompositions that are looked at as they grow, and kept in a folder so that a killed one goes on."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from robust_vit import checkpoints, errors, files, identities, processes
from robust_vit.curvature import krylov as krylov_lib
from robust_vit.curvature import operators

PyTree = Any
_IDENTITY = "identity.json"
# How the work is cut up, not what it is.
_CUTS = ("microbatch", "batches", "placed")


def looks(
    operator: operators.Operator, krylov: krylov_lib.Krylov, *, steps: int, folder: pathlib.Path | str | None = None
) -> Iterator[tuple[krylov_lib.Krylov, int]]:
    """The decomposition every so many steps, until there is no room or no direction, and how many applications it took.

    Args:
      operator: the map.
      krylov: empty; its memory is given up, and so is that of each that follows.
      steps: between two looks.
      folder: where each is saved before it is handed out. The first is then what was saved last, if anything was.

    Raises:
      UserError: as `Saved`.
    """
    saved, applications = None if folder is None else Saved(folder, operator, krylov), 0
    try:
        found = None if saved is None else saved.restore(krylov)
        if found is not None:
            krylov, applications = found
            yield krylov, applications
        while not krylov_lib.ended(krylov):
            # Where the host applies the operator, an idle step would be a pass over the data.
            room = krylov.steps - int(jnp.min(krylov.size))
            chunk = min(steps, room) if operators.by_host(operator) else steps
            krylov = krylov_lib.extend(operator, krylov, steps=chunk, donate=True)
            applications += chunk * krylov.width
            if saved is not None:
                saved.save(krylov, applications)
            yield krylov, applications
    finally:
        if saved is not None:
            saved.close()


class Saved:
    """A folder in which a decomposition is kept, so that it can be gone on with after a kill, to the same bytes.

    Args:
      folder: of one decomposition.
      operator: whose. It is told apart from others by its type and settings, by a checksum of its arrays (over a data set: of
        the parameters), and, before it is gone on with, by its image of the first block.
      krylov: empty, with the shapes and the sharding of what is saved.

    Raises:
      UserError: the folder is that of another decomposition.
    """

    def __init__(self, folder: pathlib.Path | str, operator: operators.Operator, krylov: krylov_lib.Krylov):
        self._folder, self._operator = pathlib.Path(folder), operator
        identity = {
            "operator": identities.describe(operator, array=identities.shape, without=_CUTS),
            "checksum": _checksum(operator, krylov),
            "steps": krylov.steps,
            "block": krylov.block,
            "arrays": [list(rows.shape) for rows in jax.tree.leaves(krylov.basis)],
        }
        self._store = checkpoints.Checkpoints(self._folder, keep=1)
        path = self._folder / _IDENTITY
        if processes.is_first() and not path.exists():
            files.write_json(path, identity)
        processes.barrier("decomposition")
        if files.read_json(path) != identity:
            self._store.close()
            raise self._foreign()

    def restore(self, krylov: krylov_lib.Krylov) -> tuple[krylov_lib.Krylov, int] | None:
        """The decomposition that was saved last and how many applications it took, or None. One application, not counted.

        Raises:
          UserError: the operator's image of the first block is not the one that was saved.
        """
        found = self._store.restore(_plain(krylov))
        if found is None:
            return None
        saved = _typed(found.state, krylov)
        if not krylov_lib.is_of(saved, krylov_lib.image(self._operator, krylov)).all():
            raise self._foreign()
        return saved, int(found.metrics["applications"])

    def save(self, krylov: krylov_lib.Krylov, applications: int) -> None:
        """Saves; returns when the arrays have been copied."""
        self._store.save(int(jnp.max(krylov.size)), _plain(krylov), metrics={"applications": applications})

    def close(self) -> None:
        """Waits for what is being written."""
        self._store.close()

    def _foreign(self) -> errors.UserError:
        return errors.UserError(
            f"{self._folder} holds the decomposition of another operator, key, rank or block: give another folder, or remove it."
        )


def _plain(krylov: krylov_lib.Krylov) -> dict[str, Any]:
    """What is saved: typed keys as their numbers."""
    fields = {name: getattr(krylov, name) for name in krylov.__dataclass_fields__ if name != "layout"}
    return {**fields, "key": jax.random.key_data(krylov.key)}


def _typed(state: dict[str, Any], like: krylov_lib.Krylov) -> krylov_lib.Krylov:
    return like.replace(**{**state, "key": jax.random.wrap_key_data(state["key"])})


def _checksum(operator: operators.Operator, krylov: krylov_lib.Krylov) -> int:
    arrays = operator.like if operators.by_host(operator) else operator
    return int(_mixed(arrays, krylov.following, krylov.key))


@jax.jit
def _mixed(*trees_of_arrays: PyTree) -> jax.Array:
    """A number of the bits of all leaves and their places: integers, so that no order of summation changes it."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(trees_of_arrays):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).reshape(-1)
        total = total * jnp.uint32(0x9E3779B1) + jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1))
    return total
