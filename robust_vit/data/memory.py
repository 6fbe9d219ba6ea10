"""Decoded images by position: from memory where they fit, else from the source each time, with the same bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from robust_vit import errors
from robust_vit.data import decoding, sources, transforms

_logger = logging.getLogger(__name__)

MEMORY_LIMIT = 2 * 2**30  # Bytes of uint8 pixels that `cache="auto"` keeps for one stream.
# What `cache` may be: True keeps images in memory, None decides by their size.
CACHE = {"auto": None, "always": True, "never": False, True: True, False: False}
_CHUNK = 512

# Position, image uint8, label, row, scalar extras.
Example = tuple[int, np.ndarray, int, int, dict[str, Any]]


class Images:
    """Images of a source after fixed transforms. Loaded into memory at first use where they fit.

    Attributes:
      source: the data.
    """

    def __init__(
        self,
        source: sources.Source,
        fixed: Sequence[transforms.Transform],
        *,
        cache: str | bool,
        extras: Sequence[str],
        workers: int,
    ):
        if cache not in CACHE:
            raise errors.UserError(f"data.cache is {cache!r}: expected 'auto', 'always' (True) or 'never' (False).")
        if any(transform.draws for transform in fixed):
            random = [transform.name for transform in fixed if transform.draws]
            raise errors.UserError(f"data.preprocess has the random {random[0]}: move it to data.augment.")
        self.source = source
        self._fixed = tuple(fixed)
        self._cache = CACHE[cache]
        self._extras = tuple(extras)
        self._workers = workers
        self._tally = decoding.Tally(total=len(source), name=source.name)
        self._lock = threading.Lock()
        self._memory: list[Example | decoding.BadImage] | None = None
        self._in_memory: bool | None = None

    @property
    def in_memory(self) -> bool:
        """Whether images are kept decoded; with `cache="auto"` judged from the first image's size."""
        if self._in_memory is None:
            if self._cache is None:
                self._in_memory = self.peek().nbytes * len(self.source) <= MEMORY_LIMIT
            else:
                self._in_memory = self._cache
        return self._in_memory

    def peek(self) -> np.ndarray:
        """The first decodable image, without loading the others."""
        return self._first_good(0, lambda position: self._decode([position])[0])[1]

    def good(self, index: int) -> Example:
        """The example at a position, or the next decodable one where this is bad and the source says "skip".

        Raises:
          decoding.BadImage: undecodable, and the source says "raise".
          errors.UserError: more than 1 % are bad.
        """
        return self._first_good(index, self._at)

    def many(self, indices: Sequence[int]) -> list[Example]:
        """`good` of each position; what is not in memory is read at once."""
        if self.in_memory:
            return [self.good(index) for index in indices]
        found = self._decode(indices)
        return [
            self.good(index) if isinstance(example, decoding.BadImage) else example
            for index, example in zip(indices, found, strict=True)
        ]

    def _first_good(self, index: int, read: Callable[[int], Example | decoding.BadImage]) -> Example:
        for step in range(len(self.source)):
            position = (index + step) % len(self.source)
            found = read(position)
            if not isinstance(found, decoding.BadImage):
                return found
            self._bad(position, found)
        raise errors.UserError(f"no image of {self.source.name} can be decoded: check the data set.")

    def _bad(self, position: int, error: decoding.BadImage) -> None:
        if self.source.on_bad_image != "skip":
            raise error
        self._tally.add(position, error)

    def _at(self, position: int) -> Example | decoding.BadImage:
        if not self.in_memory:
            return self._decode([position])[0]
        if self._memory is None:
            with self._lock:
                if self._memory is None:
                    self._memory = self._load()
        return self._memory[position]

    def _decode(self, positions: Sequence[int]) -> list[Example | decoding.BadImage]:
        results = []
        for position, found in zip(positions, sources.read_many(self.source, np.asarray(positions)), strict=True):
            if isinstance(found, decoding.BadImage):
                results.append(found)
                continue
            image = found["image"]
            for transform in self._fixed:
                image = transform.apply(image)
            extras = {key: _scalar(found, key, self.source.name) for key in self._extras}
            results.append((int(position), image, found["label"], found["row"], extras))
        return results

    def _load(self) -> list[Example | decoding.BadImage]:
        begin = time.perf_counter()
        chunks = [range(i, min(i + _CHUNK, len(self.source))) for i in range(0, len(self.source), _CHUNK)]
        examples: list[Example | decoding.BadImage] = []
        with futures.ThreadPoolExecutor(self._workers) as pool:
            try:
                for part in pool.map(self._decode, chunks):
                    for found in part:
                        if isinstance(found, decoding.BadImage):
                            self._bad(len(examples), found)
                        examples.append(found)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        _logger.info("%d images of %s in memory, %.1f s", len(examples), self.source.name, time.perf_counter() - begin)
        return examples


def _scalar(example: dict[str, Any], key: str, name: str) -> Any:
    if key not in example:
        raise errors.unknown(f"extra of {name}", key, set(example) - {"image", "label", "row"})
    value = np.asarray(example[key])
    if value.ndim:
        raise errors.UserError(
            f"extra {key!r} of {name} has shape {value.shape}: streams carry scalars only; read it from source[i]."
        )
    return value[()]
