"""Images by position: from memory where they fit, else from the source each time, with the same bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from robust_vit import errors
from robust_vit.data import decoding, sources, transforms

_logger = logging.getLogger(__name__)

MEMORY_LIMIT = 2 * 2**30  # Bytes of uint8 pixels that `cache="auto"` keeps for one stream.
# What `cache` may be: True keeps images in memory, None decides by their size.
CACHE = {"auto": None, "always": True, "never": False, "device": True, True: True, False: False}
_CHUNK = 512

# What one position holds: an image uint8, or, for a stream that decodes a window, the encoded image.
_Pixels = np.ndarray | decoding.Encoded


class Found(NamedTuple):
    """Examples.

    Attributes:
      images: uint8 `[batch, height, width, channels]`, or a list where sizes differ; the caller's to write over.
      labels: int32 `[batch]`.
      rows: int32 `[batch]`, identities.
      positions: int64 `[batch]`: those asked for, or the next decodable ones.
      extras: name -> `[batch]`.
    """

    images: np.ndarray | list[np.ndarray]
    labels: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    extras: dict[str, np.ndarray]


class _One(NamedTuple):
    pixels: _Pixels
    label: int
    row: int
    extras: dict[str, Any]


class _Store(NamedTuple):
    """All examples in memory: `pixels` is one array where all images have one size, else a list."""

    pixels: np.ndarray | list[_Pixels]
    places: np.ndarray  # Of each position in `pixels`.
    labels: np.ndarray
    rows: np.ndarray
    extras: dict[str, np.ndarray]
    bad: dict[int, decoding.BadImage]


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
        window: transforms.Transform | None = None,
    ):
        """With `window` the first transform of training is part of reading: a JPEG is decoded as far as its window needs, memory
        holds the encoded bytes, and so memory and disk agree.
        """
        if cache not in CACHE:
            raise errors.UserError(
                f"data.cache is {cache!r}: expected 'auto', 'always' (True), 'never' (False) or 'device'."
            )
        if any(transform.draws for transform in fixed):
            random = [transform.name for transform in fixed if transform.draws]
            raise errors.UserError(f"data.preprocess has the random {random[0]}: move it to data.augment.")
        self.source = source
        self._fixed = tuple(fixed)
        self._cache = CACHE[cache]
        self._extras = tuple(extras)
        self._workers = workers
        self._window = window
        self._undecoded = window is not None and not extras and sources.is_encoded(source)
        self._tally = decoding.Tally(total=len(source), name=source.name)
        self._lock = threading.Lock()
        self._store: _Store | None = None
        self._in_memory: bool | None = None

    @property
    def in_memory(self) -> bool:
        """Whether images are kept; with `cache="auto"` judged from the first image's size."""
        if self._in_memory is None:
            if self._cache is None:
                self._in_memory = self._peek_size() * len(self.source) <= MEMORY_LIMIT
            else:
                self._in_memory = self._cache
        return self._in_memory

    def peek(self) -> np.ndarray:
        """The first decodable image before any window, without loading the others."""
        store = self._store
        if store is not None and not self._undecoded:
            return store.pixels[store.places[self._good(store, np.zeros(1, np.int64))[0]]]
        return self._peek(lambda pixels: pixels.decode() if isinstance(pixels, decoding.Encoded) else pixels)

    def array(self) -> np.ndarray | None:
        """All images as one array in memory, uint8 `[n, height, width, channels]`, or None; `places` indexes it."""
        if not self.in_memory or self._undecoded:
            return None
        pixels = self._memory().pixels
        return pixels if isinstance(pixels, np.ndarray) else None

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Where in `array()` the examples at `positions` lie, int32."""
        return self._memory().places[positions].astype(np.int32)

    def find(self, positions: np.ndarray) -> Found:
        """The labels and identities of examples that `array()` holds, with no pixels."""
        store = self._memory()
        positions = self._good(store, positions)
        extras = {key: values[positions] for key, values in store.extras.items()}
        return Found([], store.labels[positions], store.rows[positions], positions, extras)

    def read(self, positions: np.ndarray, uniforms: np.ndarray | None = None, out: np.ndarray | None = None) -> Found:
        """The examples at some positions; an undecodable one is replaced by the next where the source says "skip".

        Args:
          positions: int `[batch]`.
          uniforms: `[batch, draws]` of the window.
          out: where the images may be laid, where they have its shape.

        Raises:
          decoding.BadImage: undecodable, and the source says "raise".
          errors.UserError: more than 1 % are bad.
        """
        if not self.in_memory:
            return self._collected(positions, self._from_source(positions), uniforms, out)
        store = self._memory()
        if self._undecoded:
            found = [
                pixels if isinstance(pixels, decoding.BadImage) else _One(pixels, pixels.label, pixels.row, {})
                for pixels in (store.pixels[position] for position in positions)
            ]
            return self._collected(positions, found, uniforms, out)
        found = self.find(positions)
        places = store.places[found.positions]
        if isinstance(store.pixels, np.ndarray):
            images = store.pixels[places]
        else:
            images = transforms.stacked([store.pixels[place] for place in places])
        if self._window is not None:
            images = transforms.apply_to_batch(self._window, images, uniforms)
        return found._replace(images=images)

    def _collected(
        self, positions: np.ndarray, found: list, uniforms: np.ndarray | None, out: np.ndarray | None
    ) -> Found:
        images, labels, rows, used, extras = [], [], [], [], []
        target = out if out is not None and out.dtype == np.uint8 else None
        for index, (position, one) in enumerate(zip(positions, found, strict=True)):
            drawn = None if uniforms is None else uniforms[index].tolist()
            position, one, image = self._first_good(int(position), one, drawn)
            if target is None:
                target = np.empty((len(found), *image.shape), np.uint8)
            if target.shape[1:] == image.shape:
                target[index] = image  # While it is in the processor's cache.
                image = target[index]
            images.append(image)
            labels.append(one.label)
            rows.append(one.row)
            used.append(position)
            extras.append(one.extras)
        return Found(
            target if {image.shape for image in images} == {target.shape[1:]} else transforms.stacked(images),
            np.asarray(labels, np.int32),
            np.asarray(rows, np.int32),
            np.asarray(used, np.int64),
            {key: np.asarray([extra[key] for extra in extras]) for key in self._extras},
        )

    def _first_good(
        self, position: int, one: _One | decoding.BadImage, drawn: list[float] | None
    ) -> tuple[int, _One, np.ndarray]:
        for _ in range(len(self.source)):
            if not isinstance(one, decoding.BadImage):
                try:
                    return position, one, self._finished(one.pixels, drawn)
                except decoding.BadImage as error:
                    one = error
            self._bad(position, one)
            position = (position + 1) % len(self.source)
            one = self._from_source([position])[0]
        raise errors.UserError(f"no image of {self.source.name} can be decoded: check the data set.")

    def _finished(self, pixels: _Pixels, drawn: list[float] | None) -> np.ndarray:
        if self._window is None:
            return pixels
        if isinstance(pixels, decoding.Encoded):
            return decoding.decode_window(pixels, self._window.window, drawn)
        return self._window.apply(pixels, np.asarray(drawn))

    def _bad(self, position: int, error: decoding.BadImage) -> None:
        if self.source.on_bad_image != "skip":
            raise error
        self._tally.add(position, error)

    def _peek(self, of: Callable[[_Pixels], Any]) -> Any:
        for position in range(len(self.source)):
            try:
                one = self._from_source([position])[0]
                if not isinstance(one, decoding.BadImage):
                    return of(one.pixels)
                raise one
            except decoding.BadImage as error:
                self._bad(position, error)
        raise errors.UserError(f"no image of {self.source.name} can be decoded: check the data set.")

    def _peek_size(self) -> int:
        return self._peek(lambda pixels: len(pixels.content) if self._undecoded else pixels.nbytes)

    def _from_source(self, positions: Sequence[int]) -> list[_One | decoding.BadImage]:
        positions = np.asarray(positions)
        if self._undecoded:
            found = sources.read_encoded(self.source, positions)
            return [e if isinstance(e, decoding.BadImage) else _One(e, e.label, e.row, {}) for e in found]
        results: list[_One | decoding.BadImage] = []
        for found in sources.read_many(self.source, positions, whole=bool(self._extras)):
            if isinstance(found, decoding.BadImage):
                results.append(found)
                continue
            image = found["image"]
            for transform in self._fixed:
                image = transform.apply(image)
            extras = {key: _scalar(found, key, self.source.name) for key in self._extras}
            results.append(_One(image, found["label"], found["row"], extras))
        return results

    def _good(self, store: _Store, positions: np.ndarray) -> np.ndarray:
        if not store.bad:
            return positions
        positions = np.array(positions)
        for index, position in enumerate(positions):
            while int(position) in store.bad:
                self._bad(int(position), store.bad[int(position)])
                position = (position + 1) % len(self.source)
            positions[index] = position
        return positions

    def _memory(self) -> _Store:
        if self._store is None:
            with self._lock:
                if self._store is None:
                    self._store = self._load()
        return self._store

    def _load(self) -> _Store:
        found = sources.arrays_of(self.source)
        if found is not None and not self._fixed and not self._extras:
            images, labels, places = found
            rows = np.asarray(self.source.rows, np.int32)
            return _Store(images, places, labels[places].astype(np.int32), rows, {}, {})
        begin = time.perf_counter()
        count = len(self.source)
        chunks = [range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
        pixels: np.ndarray | list[Any] | None = None
        labels, rows = np.zeros(count, np.int32), np.zeros(count, np.int32)
        extras: list[dict[str, Any]] = [{}] * count
        bad: dict[int, decoding.BadImage] = {}
        with futures.ThreadPoolExecutor(self._workers) as pool:
            try:
                for chunk, part in zip(chunks, pool.map(self._from_source, chunks), strict=True):
                    for position, one in zip(chunk, part, strict=True):
                        if isinstance(one, decoding.BadImage):
                            self._bad(position, one)
                            bad[position] = one
                            continue
                        pixels = _placed(pixels, position, one.pixels, count)
                        labels[position], rows[position], extras[position] = one.label, one.row, one.extras
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if pixels is None:
            raise errors.UserError(f"no image of {self.source.name} can be decoded: check the data set.")
        if self._undecoded:
            pixels = [bad.get(position, encoded) for position, encoded in enumerate(pixels)]
        _logger.info("%d images of %s in memory, %.1f s", count, self.source.name, time.perf_counter() - begin)
        default = next(extra for position, extra in enumerate(extras) if position not in bad)
        columns = {key: np.asarray([extra.get(key, default[key]) for extra in extras]) for key in self._extras}
        return _Store(pixels, np.arange(count), labels, rows, columns, bad)


def _placed(pixels: np.ndarray | list[Any] | None, position: int, image: _Pixels, count: int) -> np.ndarray | list[Any]:
    """Writes an image into the array of all; the array becomes a list at the first image of another size."""
    if pixels is None:
        encoded = isinstance(image, decoding.Encoded)
        pixels = [None] * count if encoded else np.zeros((count, *image.shape), np.uint8)
    if isinstance(pixels, np.ndarray) and pixels.shape[1:] != image.shape:
        pixels = list(pixels)
    pixels[position] = image
    return pixels


def _scalar(example: dict[str, Any], key: str, name: str) -> Any:
    if key not in example:
        raise errors.unknown(f"extra of {name}", key, set(example) - {"image", "label", "row"})
    value = np.asarray(example[key])
    if value.ndim:
        raise errors.UserError(
            f"extra {key!r} of {name} has shape {value.shape}: streams carry scalars only; read it from source[i]."
        )
    return value[()]
