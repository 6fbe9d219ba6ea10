"""Images that stay on the devices: the host sends places and decisions, the device gathers, crops and mirrors."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from robust_vit import mesh
from robust_vit.data import prefetch, transforms

# Bytes of uint8 pixels that every device may hold with `cache="auto"`; the smallest accelerators have eight times as much.
DEVICE_LIMIT = 2 * 2**30
_AHEAD = 2


def fits(images: np.ndarray | None, augment: Sequence[transforms.Transform]) -> bool:
    """Whether images are one array in memory, small enough, and every transform has a device form."""
    return (
        images is not None
        and images.nbytes <= DEVICE_LIMIT
        and all(transform.batched is not None for transform in augment)
    )


def batches(
    images: np.ndarray,
    plans: Iterator[dict[str, np.ndarray]],
    augment: Sequence[transforms.Transform],
    devices: Mesh,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches of canonical pixels, with the bytes of the host's path.

    Args:
      images: all images uint8 `[n, height, width, channels]`; one copy goes to each device, once.
      plans: for each batch, this process's "place" int32 `[batch]` in `images`, "label", and "decision0", "decision1", ...
      augment: the transforms that were decided on.
      devices: the batch is split over them.
    """
    sharding = mesh.replicated(devices)
    resident = jax.make_array_from_callback(images.shape, sharding, lambda index: images[index])
    forms = tuple(transform.batched.device for transform in augment)
    make = jax.jit(functools.partial(_augmented, forms), out_shardings=mesh.batched(devices))
    ready: collections.deque[dict[str, jax.Array]] = collections.deque()
    for plan in plans:
        sent = mesh.put_batch(devices, plan)
        decisions = [sent[f"decision{index}"] for index in range(len(forms))]
        ready.append({"image": make(resident, sent["place"], decisions), "label": sent["label"]})
        if len(ready) > _AHEAD:
            yield ready.popleft()
    yield from ready


def _augmented(forms: tuple, images: jax.Array, places: jax.Array, decisions: list[jax.Array]) -> jax.Array:
    chosen = images[places]
    for form, decision in zip(forms, decisions, strict=True):
        chosen = form(chosen, decision)
    return prefetch.to_float(chosen)
