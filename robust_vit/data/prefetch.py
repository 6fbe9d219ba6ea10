"""Batches made ahead: by threads on the host, and on their way to the devices while these compute."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from robust_vit import mesh

Batch = dict[str, np.ndarray]

_UNIT = 32  # Images that one thread makes at a time.
_DEVICE_AHEAD = 2  # Batches on their way to the devices.


def on_host(
    make: Callable[[int, slice, np.ndarray], Batch],
    steps: range,
    *,
    shape: tuple[int, ...],
    dtype: type,
    threads: int,
    whole: bool,
) -> Iterator[Batch]:
    """The batches of `steps`, made ahead by threads that end when the caller stops, however it stops.

    Threads, not processes: decoding and resizing release the interpreter's lock. On 2 cores a JPEG of 256 px, cropped and
    resized, takes 0.63 ms with one thread, 0.35 with two, 0.46 with two processes, which have to copy their pixels too
    (`tests/benchmarks/input_pipeline.py`).

    Args:
      make: (step, part of the batch, where its images go) -> the other arrays of that part.
      steps: which batches.
      shape: of the images of one batch.
      dtype: of the images.
      threads: how many.
      whole: one thread makes a whole batch.
    """
    unit = shape[0] if whole else _UNIT
    parts = [slice(begin, min(begin + unit, shape[0])) for begin in range(0, shape[0], unit)]
    ahead = max(2, -(-2 * threads // len(parts)))
    waiting: collections.deque[tuple[np.ndarray, list[futures.Future]]] = collections.deque()
    remaining = iter(steps)
    pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="data")
    try:
        while True:
            while len(waiting) < ahead and (step := next(remaining, None)) is not None:
                images = np.empty(
                    shape, dtype
                )  # One array a batch, never used again: a device may keep it without a copy.
                waiting.append((images, [pool.submit(make, step, part, images[part]) for part in parts]))
            if not waiting:
                return
            images, made = waiting.popleft()
            found = [part.result() for part in made]
            yield {"image": images, **{key: np.concatenate([part[key] for part in found]) for key in found[0]}}
    finally:
        for _, made in waiting:
            for part in made:
                part.cancel()
        # Not `cancel_futures`: that fails where the generator ends with the interpreter, whose modules are gone.
        pool.shutdown(wait=False)


def on_devices(
    batches: Iterator[Batch], devices: Mesh, *, names: tuple[str, ...] = ("image", "label")
) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, two of them on their way while the caller computes; closes `batches` when it ends.

    Bytes travel, a quarter of the floats: uint8 images become canonical float32 pixels on the device.

    Args:
      batches: this process's part of each batch, "image" uint8 or float32.
      devices: the batch is split over them.
      names: the entries that travel.
    """
    ready: collections.deque[dict[str, jax.Array]] = collections.deque()
    with contextlib.closing(batches):
        for batch in batches:
            sent = mesh.put_batch(devices, {name: batch[name] for name in names})  # Returns before the copy is done.
            ready.append(sent)
            if len(ready) > _DEVICE_AHEAD:
                yield _canonical(ready.popleft())
        while ready:
            yield _canonical(ready.popleft())


def to_float(images: jax.Array) -> jax.Array:
    """Canonical pixels float32 in [0, 1] of uint8 images, value / 255 to the last bit; traceable.

    Compilers divide by a constant through its rounded reciprocal, which is off in the last bit for 126 of the 256 values. But
    1 / 255 = 257 / 2^16 + 1 / (255 2^16): the first product is exact, and the second so small that its rounding is not seen.
    """
    values = images.astype(jnp.float32)
    return values * jnp.float32(257 / 2**16) + values * jnp.float32(1 / (255 * 2**16))


def _canonical(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    if batch["image"].dtype != jnp.uint8:
        return batch
    return {**batch, "image": _to_float(batch["image"])}


_to_float = jax.jit(to_float)
