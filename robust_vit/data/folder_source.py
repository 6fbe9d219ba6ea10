"""An image folder, `class/*.jpg|jpeg|png|webp`, with or without train/ and test/ above the classes."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_vit import errors
from robust_vit.data import decoding, sources

_logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Names of the folders that hold a split, by the split's name.
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}
TEST_FRACTION = 0.2


class FolderSource:
    """Images in one folder a class. The order is a hash of each file's path, so that any first n images are a fair sample of
    the classes; `paths[i]` names the file of position i and row i.
    """

    def __init__(
        self,
        paths: list[str],
        labels: np.ndarray,
        rows: np.ndarray,
        *,
        root: pathlib.Path,
        class_names: tuple[str, ...],
        channels: int,
        on_bad_image: str,
        on_mode: str,
    ):
        self.name = f"folder={root}"
        self.root = root
        self.paths = paths
        self.labels = labels
        self.rows = rows
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.shape = (None, None, channels)
        self.on_bad_image = on_bad_image
        self._on_mode = on_mode

    @property
    def fingerprint(self) -> str:
        """Hash of the relative paths and sizes of all files."""
        return sources.fingerprint([(path, (self.root / path).stat().st_size) for path in self.paths], self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        encoded = self._encoded(index)
        return {"image": encoded.decode(), "label": encoded.label, "row": encoded.row}

    def read_encoded(self, indices: np.ndarray) -> list[decoding.Encoded | decoding.BadImage]:
        """Files at several positions, undecoded; an unreadable one comes as its error."""
        results = []
        for index in indices:
            try:
                results.append(self._encoded(int(index)))
            except decoding.BadImage as error:
                results.append(error)
        return results

    def _encoded(self, index: int) -> decoding.Encoded:
        path = str(self.root / self.paths[index])
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
        except OSError as error:
            raise decoding.BadImage(f"{path} cannot be decoded ({error.strerror}): restore the file.") from error
        label, row = int(self.labels[index]), int(self.rows[index])
        return decoding.Encoded(content, label, row, path, self.shape[2], self._on_mode)


def from_folder(
    path: str | os.PathLike,
    *,
    split: str = "all",
    class_names: Sequence[str] | None = None,
    channels: int | None = 3,
    on_bad_image: str = "raise",
    on_mode: str | None = "error",
) -> FolderSource:
    """Opens `path/class/*.jpg|jpeg|png|webp`; nothing is decoded yet.

    Args:
      path: the folder above the class folders, or above train/ and test/ (or val/).
      split: "train", "test", or "all". Where `path` has no train/ and test/ folders, one file in five, chosen by a hash of
        its path, is "test" and the others are "train".
      class_names: folder names in label order; by default all folders, sorted.
      channels: 1 or 3; None is 3.
      on_bad_image: "raise" or "skip"; see `open_source`.
      on_mode: "error" or "convert" for files with another number of channels.

    Raises:
      errors.UserError: no such folder, a class without images, fewer than two classes.
    """
    top = pathlib.Path(path).expanduser()
    if not top.is_dir():
        raise errors.UserError(
            f"no image folder at {top}: give the folder that holds one folder of images for each class."
        )
    root, has_splits = _split_root(top, split)
    names = tuple(class_names) if class_names is not None else tuple(sorted(_folders(root)))
    if len(names) < 2 and class_names is None:
        raise errors.UserError(
            f"{root} has {len(names)} class folders: expected {root}/CLASS/*.jpg|png|webp with at least two classes."
        )
    paths, labels = [], []
    for label, name in enumerate(names):
        files = _images(root / name)
        if not files:
            raise errors.UserError(
                f"class folder {root / name} has no images ({', '.join(SUFFIXES)}): add some, or remove the folder."
            )
        paths += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
    keys = [_hash(file) for file in paths]
    order = np.argsort(np.asarray(keys, np.uint64), kind="stable")
    rows = np.arange(len(order))
    if split != "all" and not has_splits:
        is_test = np.asarray([_hash("split/" + paths[index]) < TEST_FRACTION * 2**64 for index in order])
        rows = np.flatnonzero(is_test if split == "test" else ~is_test)
        _logger.info("%s has no train/ and test/: %d of %d images are %r", top, len(rows), len(order), split)
        if not len(rows):
            raise errors.UserError(f"{top} has too few images to split ({len(order)}): make train/ and test/ folders.")
    chosen = order[rows]
    return FolderSource(
        [paths[index] for index in chosen],
        np.asarray(labels, np.int32)[chosen],
        rows,
        root=root,
        class_names=names,
        channels=channels or 3,
        on_bad_image=on_bad_image,
        on_mode=on_mode or "error",
    )


def open_split(name: str, *, split: str, data_dir: str | os.PathLike | None, **options) -> FolderSource:
    """`from_folder` for the name "folder=PATH", or "folder" with `data_dir`."""
    path = name.partition("=")[2] or data_dir
    if not path:
        raise errors.UserError("data set 'folder' without a path: write folder=PATH.")
    if unknown := set(options) - {"class_names", "channels", "on_bad_image", "on_mode"}:
        raise errors.unknown("option of data set 'folder'", sorted(unknown)[0], ["class_names"])
    return from_folder(path, split=split, **options)


def _split_root(top: pathlib.Path, split: str) -> tuple[pathlib.Path, bool]:
    found = {
        name: top / folder
        for name, folders in SPLIT_FOLDERS.items()
        for folder in reversed(folders)
        if (top / folder).is_dir() and _folders(top / folder)
    }
    if split == "all":
        return top, False
    if found:
        if split in found:
            return found[split], True
        if (top / split).is_dir():
            return top / split, True
        raise errors.unknown(f"split of {top}", split, found)
    if split not in SPLIT_FOLDERS:
        raise errors.unknown(f"split of {top}", split, [*SPLIT_FOLDERS, "all"])
    return top, False


def _folders(path: pathlib.Path) -> list[str]:
    return [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]


def _images(folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        raise errors.UserError(f"no class folder {folder}: check data.options.class_names.")
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
