"""Streams of batches: order, augmentation and padding as pure functions of (seed, step)."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from robust_vit import errors
from robust_vit.data import draws, memory, prefetch, resident, sources, transforms

Batch = prefetch.Batch

# What "image" of a batch may be: canonical pixels in [0, 1], or the bytes that they are made from.
PIXELS = {"float32": np.float32, "uint8": np.uint8}
# Crops of images of any size: where augmentation begins with one, it takes the place of `preprocess`.
_LEADING = ("random_resized_crop", "simple_random_crop")
_CHUNK = 1024  # Positions whose order and draws are computed together.
_ENDLESS = 2**40


class TrainingStream:
    """An endless stream of augmented batches; each pass over the data is a new permutation and new draws.

    Position `step * batch + i` belongs to epoch `position // len(stream)`. Nothing but (seed, position) decides which image
    stands there and how it is augmented, so a run resumes at any step without replay, and a batch straddles two epochs
    rather than being cut short.

    Attributes:
      batch_size: images in one global batch.
      steps_per_epoch: global batches in one pass, rounded up.
      source: the data.
    """

    def __init__(
        self,
        source: sources.Source,
        *,
        batch: int,
        seed: int = 0,
        augment: Sequence[str] = (),
        preprocess: Sequence[str] = (),
        cache: str | bool = "auto",
        workers: int | None = None,
        shard: tuple[int, int] = (0, 1),
        extras: Sequence[str] = (),
    ):
        """See `robust_vit.data.load` for the arguments; a leading `random_resized_crop` or
        `simple_random_crop` takes the place of `preprocess`."""
        self.source = source
        self.batch_size = batch
        self.seed = seed
        self._local, self._offset = _slice_of(batch, shard)
        self._augment = transforms.parse_all(augment)
        fixed = transforms.parse_all(preprocess)
        self._threads = _threads(workers)
        self._cache = cache
        self._window = self._augment[0] if self._augment and self._augment[0].window is not None else None
        self._images = memory.Images(
            source,
            () if self._augment and self._augment[0].name in _LEADING else fixed,
            cache=cache,
            extras=extras,
            workers=self._threads,
            window=self._window,
        )
        self._plan = functools.lru_cache(maxsize=32)(self._compute_plan)
        self._order = functools.lru_cache(maxsize=4)(
            lambda epoch: draws.permutation(self.source.rows, seed=self.seed, epoch=epoch)
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data, rounded up."""
        return math.ceil(len(self) / self.batch_size)

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the first image as delivered; decodes that one only."""
        image = self._images.peek()
        for transform in self._augment:
            image = transform(image, np.zeros(transform.draws))
        return image.shape

    def of_process(self, index: int, count: int) -> TrainingStream:
        """The same stream, of each batch only the rows that process `index` of `count` feeds to its devices."""
        other = copy.copy(self)
        other._local, other._offset = _slice_of(self.batch_size, (index, count))
        return other

    def batch(self, step: int) -> Batch:
        """The batch of a step: "image" float32 `[batch, height, width, channels]` in [0, 1], "label", "row" int32 `[batch]`,
        "mask" bool `[batch]` (all True). A pure function of (seed, step).
        """
        return _one_batch(self, step)

    def iterate(self, start_step: int = 0, *, pixels: str = "float32") -> Iterator[Batch]:
        """`batch(start_step)`, `batch(start_step + 1)`, ... without end, made ahead by reading threads.

        Args:
          start_step: the first.
          pixels: "float32", or "uint8" for the bytes that canonical pixels are made from.
        """
        return _iterate(self, range(start_step, _ENDLESS), pixels)

    def on_devices(self, devices: Mesh, start_step: int = 0) -> Iterator[dict[str, jax.Array]]:
        """Global batches on the devices from a step on, without end: "image" float32 canonical pixels and "label", split over
        them; two batches are on their way while the caller computes. The values are those of `batch`.

        Where all images are in memory and every transform has a device form (pad_crop, flip, none), they are put on each device
        once and batches are made there: with `cache="device"`, and with "auto" on accelerators up to `resident.DEVICE_LIMIT`.

        Raises:
          errors.UserError: `cache="device"` and the images cannot stay there.
        """
        asked = self._cache == "device"
        if asked or (self._cache == "auto" and devices.devices.flat[0].platform != "cpu"):
            images = self._images.array()
            if resident.fits(images, self._augment):
                return resident.batches(images, self._decisions(start_step), self._augment, devices)
            if asked:
                raise errors.UserError(
                    f"data.cache='device', but {self.source.name} cannot stay on the devices: images must have one size and at "
                    f"most {resident.DEVICE_LIMIT:,} bytes, and data.augment only pad_crop and flip; use 'auto'."
                )
        return prefetch.on_devices(self.iterate(start_step, pixels="uint8"), devices)

    def _decisions(self, start_step: int) -> Iterator[Batch]:
        for step in range(start_step, _ENDLESS):
            indices, uniforms = self._planned(step, slice(0, self._local))
            found = self._images.find(indices)
            plan = {"place": self._images.places(found.positions), "label": found.labels}
            for index, (transform, drawn) in enumerate(zip(self._augment, uniforms, strict=True)):
                plan[f"decision{index}"] = transform.batched.decide(drawn)
            yield plan

    def _compute_plan(self, chunk: int) -> tuple[np.ndarray, list[np.ndarray]]:
        positions = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)
        epochs = positions // len(self)
        indices = np.empty(_CHUNK, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(epoch))[positions[here] % len(self)]
        rows = self.source.rows[indices]
        uniforms = [
            draws.uniforms(rows, seed=self.seed, purpose=f"augment/{i}/{t.name}", epochs=epochs, count=t.draws)
            if t.draws
            else np.empty((_CHUNK, 0))
            for i, t in enumerate(self._augment)
        ]
        return indices, uniforms

    @property
    def _is_light(self) -> bool:
        """Whether a batch is a few operations on arrays: cutting it up would cost more."""
        return self._images.in_memory and all(transform.batched is not None for transform in self._augment)

    def _planned(self, step: int, part: slice) -> tuple[np.ndarray, list[np.ndarray]]:
        """Positions in the source and the draws of each transform, for a part of this process's share of a batch."""
        first = step * self.batch_size + self._offset + part.start
        last = first + part.stop - part.start
        pieces = []
        for chunk in range(first // _CHUNK, (last - 1) // _CHUNK + 1):
            begin = chunk * _CHUNK
            inside = slice(max(first - begin, 0), min(last - begin, _CHUNK))
            indices, uniforms = self._plan(chunk)
            pieces.append((indices[inside], [uniform[inside] for uniform in uniforms]))
        if len(pieces) == 1:
            return pieces[0]
        indices, uniforms = zip(*pieces, strict=True)
        return np.concatenate(indices), [np.concatenate(drawn) for drawn in zip(*uniforms, strict=True)]

    def _make(self, step: int, part: slice, out: np.ndarray | None) -> tuple[memory.Found, np.ndarray]:
        indices, uniforms = self._planned(step, part)
        if self._window is None:
            found, rest = self._images.read(indices, out=out), self._augment
        else:
            found, rest = self._images.read(indices, uniforms[0], out), self._augment[1:]
            uniforms = uniforms[1:]
        images = found.images
        for transform, drawn in zip(rest, uniforms, strict=True):
            images = transforms.apply_to_batch(transform, images, drawn)
        return found._replace(images=images), np.ones(len(indices), bool)


class EvaluationStream:
    """A finite stream in the source's order; the last batch is padded with the first image and masked.

    Attributes:
      batch_size: images in one global batch, padding included.
      num_examples: images, without the padding.
      source: the data.
    """

    def __init__(
        self,
        source: sources.Source,
        *,
        batch: int,
        limit: int | None = None,
        preprocess: Sequence[str] = (),
        cache: str | bool = "auto",
        workers: int | None = None,
        shard: tuple[int, int] = (0, 1),
        extras: Sequence[str] = (),
    ):
        """See `robust_vit.data.load` for the arguments."""
        limit = _limit(limit, len(source))
        if limit < len(source):
            source = sources.Subset(source, np.arange(limit), name=f"{source.name}[:{limit}]")
        self.source = source
        self.batch_size = batch
        self.num_examples = limit
        self._shard = shard
        self._local, self._offset = _slice_of(batch, shard)
        fixed = transforms.parse_all(preprocess)
        self._threads = _threads(workers)
        self._images = memory.Images(source, fixed, cache=cache, extras=extras, workers=self._threads)

    def __len__(self) -> int:
        return math.ceil(self.num_examples / self.batch_size)

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the first image as delivered; decodes that one only."""
        return self._images.peek().shape

    def with_batch(self, batch: int, limit: int | None = None) -> EvaluationStream:
        """The same images (shared in memory) in batches of another size, only the first `limit` where given."""
        other = object.__new__(EvaluationStream)
        other.__dict__.update(self.__dict__)
        other.batch_size = batch
        other.num_examples = _limit(limit, self.num_examples)
        other._local, other._offset = _slice_of(batch, self._shard)
        return other

    def of_process(self, index: int, count: int) -> EvaluationStream:
        """The same images (shared in memory), of each batch only the rows that process `index` of `count` feeds."""
        other = copy.copy(self)
        other._shard = (index, count)
        other._local, other._offset = _slice_of(self.batch_size, other._shard)
        return other

    def batch(self, index: int) -> Batch:
        """Batch `index`, 0 .. len - 1; "mask" is False for padding and for undecodable images that are skipped.

        The entries are those of `TrainingStream.batch`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return _one_batch(self, index)

    def iterate(self, start: int = 0, *, pixels: str = "float32") -> Iterator[Batch]:
        """`batch(start)` .. `batch(len - 1)`, made ahead by reading threads; `pixels` as in `TrainingStream.iterate`."""
        return _iterate(self, range(start, len(self)), pixels)

    def on_devices(self, devices: Mesh, start: int = 0) -> Iterator[dict[str, jax.Array]]:
        """The same on the devices, two batches ahead: "image" float32 canonical pixels, "label" and "mask"."""
        return prefetch.on_devices(self.iterate(start, pixels="uint8"), devices, names=("image", "label", "mask"))

    @property
    def _is_light(self) -> bool:
        return self._images.in_memory

    def _make(self, index: int, part: slice, out: np.ndarray | None) -> tuple[memory.Found, np.ndarray]:
        first = index * self.batch_size + self._offset
        positions = np.arange(first + part.start, first + part.stop)
        real = positions < self.num_examples
        wanted = np.where(real, positions, 0)
        found = self._images.read(wanted, out=out)
        return found, real & (found.positions == wanted)


def _one_batch(stream: TrainingStream | EvaluationStream, step: int) -> Batch:
    found, mask = stream._make(step, slice(0, stream._local), None)
    if isinstance(found.images, list):
        raise _sizes_differ(stream.source.name, {image.shape for image in found.images})
    images = np.empty(found.images.shape, np.float32)
    return {"image": _into(images, found.images), **_others(found, mask)}


def _iterate(stream: TrainingStream | EvaluationStream, steps: range, pixels: str) -> Iterator[Batch]:
    if pixels not in PIXELS:
        raise errors.unknown("kind of pixels", pixels, PIXELS)

    def make(step: int, part: slice, out: np.ndarray) -> Batch:
        found, mask = stream._make(step, part, out)
        shapes = {image.shape for image in found.images} | {out.shape[1:]}
        if len(shapes) > 1:
            raise _sizes_differ(stream.source.name, shapes)
        if found.images is not out:
            _into(out, found.images)
        return _others(found, mask)

    if steps:
        yield from prefetch.on_host(
            make,
            steps,
            shape=(stream._local, *stream.image_shape),
            dtype=PIXELS[pixels],
            threads=1 if stream._is_light else stream._threads,
            whole=stream._is_light,
        )


def _into(out: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Writes bytes as they are, or canonical pixels where `out` is float32."""
    if out.dtype == np.uint8:
        out[:] = images
        return out
    return np.divide(images, np.float32(255), out=out, dtype=np.float32)


def _others(found: memory.Found, mask: np.ndarray) -> Batch:
    return {"label": found.labels, "row": found.rows, "mask": mask, **found.extras}


def _sizes_differ(name: str, shapes: set[tuple[int, ...]]) -> errors.UserError:
    first, second = sorted(shapes)[:2]
    return errors.UserError(
        f"images of {name} differ in size ({first[0]} x {first[1]} and {second[0]} x {second[1]}): set data.preprocess, for "
        "example to ('resize(256)', 'center_crop(224)')."
    )


def _slice_of(batch: int, shard: tuple[int, int]) -> tuple[int, int]:
    index, count = shard
    if not isinstance(batch, int) or batch < 1 or batch % count:
        raise errors.UserError(f"batch size is {batch!r}: expected a positive multiple of the {count} processes.")
    return batch // count, index * (batch // count)


def _limit(limit: int | None, total: int) -> int:
    if limit is not None and limit < 1:
        raise errors.UserError(f"limit is {limit}: expected a positive number of images, or None for all.")
    return total if limit is None else min(limit, total)


def _threads(workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise errors.UserError(
            f"data.workers is {workers}: expected a number of reading threads, or None for one a core."
        )
    return workers or min(os.cpu_count() or 1, 16)
