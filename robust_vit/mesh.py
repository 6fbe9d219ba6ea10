"""The device mesh: one `jax.sharding.Mesh` with axes ("data", "model"), the same on one device and on many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robust_vit import errors

PyTree = Any
AXES = ("data", "model")


def make(devices: list[jax.Device] | None = None, *, model: int = 1) -> Mesh:
    """A mesh over the given devices (all of them by default), `model` of them along the model axis.

    Raises:
      errors.UserError: the number of devices is not divisible by `model`.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % model:
        raise errors.UserError(f"a model axis of {model} does not divide {len(devices)} devices: choose a divisor.")
    # Auto: the compiler places activations. The default of jax.make_mesh has changed between releases, so it is spelled out.
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh((len(devices) // model, model), AXES, axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(AXES[0]))


def check_batch(mesh: Mesh, batch: int, *, name: str) -> None:
    """Refuses a global batch that the data axis does not divide.

    Raises:
      errors.UserError: with the nearest batch that would do.
    """
    size = mesh.shape[AXES[0]]
    if batch % size:
        raise errors.UserError(
            f"{name}={batch} is not divisible by the {size} devices of the data axis: use {max(size, batch // size * size)}."
        )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A global, sharded batch from this process's rows of it."""
    sharding = batched(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def put_replicated(mesh: Mesh, tree: PyTree) -> PyTree:
    """The tree on every device."""
    return jax.device_put(tree, replicated(mesh))
