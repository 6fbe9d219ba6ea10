"""Sources: random access to labelled uint8 images, whatever they are stored as."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from robust_vit import errors
from robust_vit.data import decoding

# Any other name is a TFDS name or a directory prepared by TFDS: see `tfds_source`.
SOURCES = {
    "textured_shapes": "robust_vit.data.textured_shapes:open_split",
    "folder": "robust_vit.data.folder_source:open_split",
}
_TFDS = "robust_vit.data.tfds_source:open_split"


@runtime_checkable
class Source(Protocol):
    """Labelled images by position. `source[i]` is a dict: "image" uint8 `[height, width, channels]`, "label" int, "row" int
    (the identity of the example in its original split) and what else the data set has.

    Attributes:
      name: for people.
      num_classes: labels are 0 .. num_classes - 1.
      class_names: one for each class.
      fingerprint: short hash of what identifies the bytes.
      shape: `(height, width, channels)`; height and width are None where images differ.
      rows: `int64 [len(source)]`, the identity of each example.
      on_bad_image: "raise", or "skip": streams then leave undecodable images out.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    shape: tuple[int | None, int | None, int]
    rows: np.ndarray
    on_bad_image: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def read_many(source: Source, indices: np.ndarray, *, whole: bool = True) -> list[dict[str, Any] | decoding.BadImage]:
    """Examples at several positions; an undecodable one comes as its error.

    Args:
      source: where from.
      indices: positions.
      whole: False for "image", "label" and "row" only, which is faster.
    """
    if isinstance(source, Subset):
        return read_many(source.source, source.indices[indices], whole=whole)
    if not whole and is_encoded(source):
        results: list[dict[str, Any] | decoding.BadImage] = []
        for encoded in read_encoded(source, indices):
            try:
                if isinstance(encoded, decoding.BadImage):
                    raise encoded
                results.append({"image": encoded.decode(), "label": encoded.label, "row": encoded.row})
            except decoding.BadImage as error:
                results.append(error)
        return results
    if hasattr(source, "read_many"):
        return source.read_many(indices)
    results = []
    for index in indices:
        try:
            results.append(source[int(index)])
        except decoding.BadImage as error:
            results.append(error)
    return results


def read_encoded(source: Source, indices: np.ndarray) -> list[decoding.Encoded | decoding.BadImage]:
    """Undecoded images at several positions, of a source that `is_encoded`."""
    if isinstance(source, Subset):
        return read_encoded(source.source, source.indices[indices])
    return source.read_encoded(indices)


def is_encoded(source: Source) -> bool:
    """Whether images are stored as files (JPEG, PNG, ...) that the source hands out undecoded."""
    return is_encoded(source.source) if isinstance(source, Subset) else hasattr(source, "read_encoded")


def arrays_of(source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """All images uint8, all labels, and the positions in them of the source's examples, where they lie in memory already."""
    if isinstance(source, Subset):
        found = arrays_of(source.source)
        return found and (found[0], found[1], found[2][source.indices])
    return (source.images, source.labels, np.arange(len(source))) if isinstance(source, ArraySource) else None


class ArraySource:
    """Images that are already in memory; see `from_arrays`."""

    on_bad_image = "raise"

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, class_names: tuple[str, ...], name: str):
        self.name = name
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.shape = tuple(images.shape[1:])
        self.rows = np.arange(len(images))
        self.images = images
        self.labels = labels

    @property
    def fingerprint(self) -> str:
        """Hash of all pixels and labels; computed when asked."""
        return fingerprint(self.images.shape, np.ascontiguousarray(self.images), self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index]), "row": int(self.rows[index])}


class Subset:
    """Some positions of a source, in a given order; rows keep their identity."""

    def __init__(self, source: Source, indices: np.ndarray, *, name: str):
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.name = name
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.shape = source.shape
        self.rows = source.rows[self.indices]
        self.on_bad_image = source.on_bad_image

    @property
    def fingerprint(self) -> str:
        """Hash of the whole source's fingerprint and the positions."""
        return fingerprint(self.source.fingerprint, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]


def open_source(
    name: str,
    *,
    split: str = "train",
    data_dir: str | None = None,
    on_bad_image: str = "raise",
    on_mode: str | None = None,
    channels: int | None = None,
    **options,
) -> Source:
    """Opens a split of a data set by name; nothing is decoded yet.

    Args:
      name: "textured_shapes/aligned" (embedded, generated on first use), "folder=PATH" (`class/*.jpg|png|webp`, with or
        without train/ and test/ above), a TFDS name such as "fashion_mnist" or "imagenet2012_corrupted/fog_3", or the
        path of one prepared version.
      split: "train", "test", ... with an optional slice: "train[:90%]", "train[100:200]".
      data_dir: where data sets lie; None is TFDS's own default, and `~/.cache/robust_vit/datasets` for embedded ones.
      on_bad_image: "raise" names the file; "skip" leaves undecodable images out, logs each, and stops above 1 %.
      on_mode: "error" or "convert" (see `decoding.decode`); None is "error" for folders and "convert" for data sets
        prepared by TFDS, which promise their number of channels.
      channels: 1 or 3 where the source leaves it open (folders, by default 3).
      **options: of the source, for example `size=64` for textured_shapes.

    Raises:
      errors.UserError: no such data set or split, data in another format, an empty class folder.
    """
    if on_bad_image not in decoding.ON_BAD_IMAGE:
        raise errors.unknown("value of data.on_bad_image", on_bad_image, decoding.ON_BAD_IMAGE)
    if on_mode is not None and on_mode not in decoding.ON_MODE:
        raise errors.unknown("value of data.on_mode", on_mode, decoding.ON_MODE)
    if channels not in (None, 1, 3):
        raise errors.UserError(f"data.channels is {channels!r}: expected 1 or 3, or None for what the data has.")
    base, start, stop = parse_split(split)
    key = re.split(r"[=/(]", name, maxsplit=1)[0]
    module, attribute = SOURCES.get(key, _TFDS).split(":")
    opener = getattr(importlib.import_module(module), attribute)
    source = opener(
        name, split=base, data_dir=data_dir, on_bad_image=on_bad_image, on_mode=on_mode, channels=channels, **options
    )
    if len(source) == 0:
        raise errors.UserError(f"split {base!r} of {name} has no images: choose another split.")
    if start is None and stop is None:
        return source
    indices = np.arange(_bound(start, 0, len(source)), _bound(stop, len(source), len(source)))
    if not len(indices):
        raise errors.UserError(f"split {split!r} of {name} is empty: {base!r} has {len(source)} images.")
    return Subset(source, indices, name=f"{source.name}[{split}]")


def from_arrays(
    images: np.ndarray, labels: Sequence[int], *, class_names: Sequence[str] | None = None, name: str = "arrays"
) -> ArraySource:
    """A source of images in memory.

    Args:
      images: uint8 `[n, height, width, channels]` or `[n, height, width]` with 1 or 3 channels; or floats in [0, 1], which are
        rounded to the nearest of 256 levels.
      labels: integers `[n]` from 0.
      class_names: one for each class; by default "0", "1", ... up to the largest label.
      name: for people.

    Raises:
      errors.UserError: another shape or range, or a label out of range.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise errors.UserError(
            f"images have shape {images.shape}: expected [n, height, width, 1 or 3], or [n, height, width], with n > 0."
        )
    if images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())
        if not np.issubdtype(images.dtype, np.floating) or not (low >= 0 and high <= 1):
            raise errors.UserError(
                f"images are {images.dtype} in [{low:g}, {high:g}]: expected uint8, or floats in [0, 1] (divide by 255)."
            )
        images = np.round(images * 255).astype(np.uint8)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise errors.UserError(
            f"labels are {labels.dtype} of shape {labels.shape}: expected integers of shape ({len(images)},)."
        )
    if class_names is None:
        class_names = tuple(str(index) for index in range(max(int(labels.max()) + 1, 2)))
    class_names = tuple(class_names)
    for position in np.flatnonzero((labels < 0) | (labels >= len(class_names)))[:1]:
        raise label_error(int(labels[position]), num_classes=len(class_names), where=f"{name}, example {position}")
    return ArraySource(images, labels.astype(np.int32), class_names=class_names, name=name)


def label_error(label: int, *, num_classes: int, where: str) -> errors.UserError:
    """The error for a label that no class has."""
    return errors.UserError(
        f"label {label} of {where} is out of range: expected 0 .. {num_classes - 1} for {num_classes} classes; "
        "mend the labels or name all classes."
    )


def parse_split(split: str) -> tuple[str, tuple[float, bool] | None, tuple[float, bool] | None]:
    """ "train[10%:200]" to its name and its two bounds, each (number, is it a percentage) or None."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*", split)
    if match is None:
        raise errors.UserError(
            f"split {split!r} is not understood: write for example 'train', 'test[:90%]', 'train[100:200]'."
        )
    name, start, stop = match.groups()
    bounds = (None if text is None else (int(text.rstrip("%")), text.endswith("%")) for text in (start, stop))
    return name, *bounds


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that identify arrays, strings and JSON-able values."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(str((part.dtype.str, part.shape)).encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _bound(bound: tuple[float, bool] | None, default: int, length: int) -> int:
    if bound is None:
        return default
    number, percent = bound
    number = round(number * length / 100) if percent else int(number)
    return min(max(number + length if number < 0 else number, 0), length)
