"""Streams of batches: order, augmentation and padding as pure functions of (seed, step)."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from robust_vit import errors
from robust_vit.data import draws, memory, sources, transforms

Batch = dict[str, np.ndarray]

_CHUNK = 1024  # Positions whose order and draws are computed together.
_UNIT = 32  # Images that one reading thread decodes at a time.
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
        """See `robust_vit.data.load` for the arguments; a leading `random_resized_crop` takes the place of `preprocess`."""
        self.source = source
        self.batch_size = batch
        self.seed = seed
        self._local, self._offset = _slice_of(batch, shard)
        self._augment = transforms.parse_all(augment)
        fixed = transforms.parse_all(preprocess)
        if self._augment and self._augment[0].name == "random_resized_crop":
            fixed = ()
        self._images = memory.Images(source, fixed, cache=cache, extras=extras, workers=_threads(workers))
        self._threads = _threads(workers)
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the first image as delivered; decodes that one only."""
        image = self._images.peek()
        for transform in self._augment:
            image = transform.apply(image, np.zeros(transform.draws)) if transform.draws else transform.apply(image)
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
        start = step * self.batch_size + self._offset
        return _finished(self._raw(np.arange(start, start + self._local)))

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """`batch(start_step)`, `batch(start_step + 1)`, ... without end, made ahead by reading threads."""
        return _prefetched(
            self._raw,
            lambda step: step * self.batch_size + self._offset,
            start=start_step,
            steps=_ENDLESS,
            local=self._local,
            threads=1 if self._images.in_memory else self._threads,
            whole=self._images.in_memory,
        )

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

    def _raw(self, positions: np.ndarray) -> dict[str, Any]:
        planned = []
        for position in positions:
            chunk, inside = divmod(int(position), _CHUNK)
            indices, uniforms = self._plan(chunk)
            planned.append((int(indices[inside]), [uniform[inside] for uniform in uniforms]))
        images, labels, rows, extras = [], [], [], []
        found = self._images.many([index for index, _ in planned])
        for (_, image, label, row, extra), (_, uniforms) in zip(found, planned, strict=True):
            for transform, uniform in zip(self._augment, uniforms, strict=True):
                image = transform.apply(image, uniform) if transform.draws else transform.apply(image)
            images.append(image)
            labels.append(label)
            rows.append(row)
            extras.append(extra)
        return _collated(images, labels, rows, [True] * len(rows), extras, self.source.name)


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

    @property
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
        start = index * self.batch_size + self._offset
        return _finished(self._raw(np.arange(start, start + self._local)))

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """`batch(start)` .. `batch(len - 1)`, made ahead by reading threads."""
        return _prefetched(
            self._raw,
            lambda index: index * self.batch_size + self._offset,
            start=start,
            steps=len(self),
            local=self._local,
            threads=1 if self._images.in_memory else self._threads,
            whole=self._images.in_memory,
        )

    def _raw(self, positions: np.ndarray) -> dict[str, Any]:
        images, labels, rows, mask, extras = [], [], [], [], []
        wanted = [int(position) if position < self.num_examples else 0 for position in positions]
        real = [position < self.num_examples for position in positions]
        for (found, image, label, row, extra), index, is_real in zip(
            self._images.many(wanted), wanted, real, strict=True
        ):
            images.append(image)
            labels.append(label)
            rows.append(row)
            mask.append(bool(is_real and found == index))
            extras.append(extra)
        return _collated(images, labels, rows, mask, extras, self.source.name)


def _prefetched(
    raw: Callable[[np.ndarray], dict[str, Any]],
    first: Callable[[int], int],
    *,
    start: int,
    steps: int,
    local: int,
    threads: int,
    whole: bool,
) -> Iterator[Batch]:
    """Batches start .. steps - 1 through a Grain pipeline that is closed when the caller stops, however it stops."""
    import grain

    unit = local if whole else math.gcd(local, _UNIT)
    if not whole and unit < 8:  # An odd batch: whole batches a thread rather than single images.
        unit = local
    units = local // unit
    elements = _Units(raw, first, unit=unit, units=units, start=start, steps=steps)
    buffer = max(2 * threads, 2 * units)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=min(buffer, max(len(elements), threads)))
    iterator = iter(grain.MapDataset.source(elements).to_iter_dataset(options))
    try:
        for _ in range(start, steps):
            parts = [next(iterator) for _ in range(units)]
            yield parts[0] if units == 1 else _finished(_joined(parts))
    finally:
        iterator.close()


class _Units:
    """Pieces of batches by number, as Grain wants them: a batch of one piece comes finished."""

    def __init__(self, raw, first, *, unit: int, units: int, start: int, steps: int):
        self._raw, self._first = raw, first
        self._unit, self._units, self._start = unit, units, start
        self._length = max(steps - start, 0) * units

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, piece = divmod(int(index), self._units)
        begin = self._first(self._start + step) + piece * self._unit
        part = self._raw(np.arange(begin, begin + self._unit))
        return _finished(part) if self._units == 1 else part


def _collated(images, labels, rows, mask, extras, name: str) -> dict[str, Any]:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise _sizes_differ(name, shapes)
    part = {
        "image": np.stack(images),
        "label": np.asarray(labels, np.int32),
        "row": np.asarray(rows, np.int32),
        "mask": np.asarray(mask, bool),
    }
    part.update({key: np.asarray([extra[key] for extra in extras]) for key in extras[0]})
    return part


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    shapes = {part["image"].shape[1:] for part in parts}
    if len(shapes) > 1:
        raise _sizes_differ("the data", shapes)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _finished(part: dict[str, Any]) -> Batch:
    images = part["image"].astype(np.float32)
    images /= np.float32(255)  # In place: half the time of one mixed-type division.
    return {**part, "image": images}


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
