"""Data sets in the layout of TensorFlow Datasets, array_record format, read without TensorFlow."""

from __future__ import annotations

import difflib
import io
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from robust_vit import errors
from robust_vit.data import decoding, sources

DEFAULT_DIR = "~/tensorflow_datasets"
_CHUNK = 2048
# Records of more bytes than this are read one by one: 22 us each at 32 KiB, against 74 in one call of array_record, which starts
# threads. At 1 KiB one call for many is faster.
_LARGE = 2**13
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource:
    """One split of a prepared data set. Pixels are decoded here, by PIL, from the stored bytes."""

    def __init__(self, folder: pathlib.Path, split: str, *, on_bad_image: str, on_mode: str | None):
        import tensorflow_datasets as tfds

        self.folder = folder
        try:
            builder = tfds.builder_from_directory(str(folder))
        except Exception as error:  # Whatever TFDS says of files that it did not write.
            raise _damaged(folder, error) from error
        info = builder.info
        splits = {name: value for name, value in info.splits.items() if name != "all"}
        if split not in splits:
            raise errors.unknown(f"split of {folder}", split, splits)
        features = info.features
        if "image" not in features or "label" not in features or not hasattr(features["label"], "names"):
            raise errors.UserError(
                f"{folder} has the features {', '.join(sorted(features))}: expected an image and a class label; "
                "choose a classification data set."
            )
        self._check_format(info, splits[split])
        images = {key for key, feature in features.items() if type(feature).__name__ == "Image"}
        decoders = {key: tfds.decode.SkipDecoding() for key in images}
        self._records = builder.as_data_source(split=split, decoders=decoders)
        # The records as stored: parsing the three values that training needs costs a fifth of TFDS's general parser.
        self._stored = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        self._images = {key: features[key].shape[-1] for key in images}
        self._on_mode = on_mode or "convert"
        self._one_by_one = sum(path.stat().st_size for path in self._shards(split)) > _LARGE * len(self._stored)
        self.name = f"{info.full_name}/{split}"
        self.class_names = tuple(features["label"].names)
        self.num_classes = features["label"].num_classes
        shape = tuple(features["image"].shape)
        self.shape = (shape[0], shape[1], shape[2] or 3)
        self._has_row = "row" in features
        self._rows: np.ndarray | None = None
        self.on_bad_image = on_bad_image
        self.fingerprint = sources.fingerprint(
            info.full_name,
            split,
            [(path.name, path.stat().st_size) for path in self._shards(split)],
            (folder / "features.json").read_text(),
        )

    def _shards(self, split: str) -> list[pathlib.Path]:
        return sorted(self.folder.glob(f"*-{split}.array_record*"))

    def _check_format(self, info: Any, split: Any) -> None:
        form = getattr(info.file_format, "value", str(info.file_format))
        if form != "array_record":
            raise errors.UserError(
                f"{self.folder} holds {form} files: expected array_record; prepare it again with "
                f"`tfds build {info.name} --file_format=array_record` (needs robust_vit[tf])."
            )
        missing = [name for name in split.filenames if not (self.folder / name).is_file()]
        if missing:
            raise errors.UserError(
                f"{self.folder / sorted(missing)[0]} is missing ({len(missing)} of {len(split.filenames)} files): "
                "prepare or copy the data set again."
            )

    @property
    def rows(self) -> np.ndarray:
        """`int64 [len]`: the feature `row` where there is one (reads every record once), else the position as stored."""
        if self._rows is None:
            self._rows = np.arange(len(self))
            if self._has_row:
                chunks = np.array_split(self._rows, range(_CHUNK, len(self), _CHUNK))
                found = (features["row"].int64_list.value[0] for chunk in chunks for features in self._parsed(chunk))
                self._rows = np.fromiter(found, np.int64, len(self))
        return self._rows

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._decode(self._read(np.asarray([index]))[0], index, self._images)

    def read_encoded(self, indices: np.ndarray) -> list[decoding.Encoded | decoding.BadImage]:
        """Undecoded images at several positions, in one read."""
        results: list[decoding.Encoded | decoding.BadImage] = []
        for index, features in zip(indices, self._parsed(indices), strict=True):
            where = f"{self.name}, record {index}"
            label = self._checked(features["label"].int64_list.value[0], where)
            row = features["row"].int64_list.value[0] if self._has_row else int(index)
            content = features["image"].bytes_list.value[0]
            results.append(decoding.Encoded(content, label, row, where, self.shape[2], self._on_mode))
        return results

    def read_many(self, indices: np.ndarray) -> list[dict[str, Any] | decoding.BadImage]:
        """Examples at several positions with only "image" decoded; one read for all is three times faster than one each."""
        results = []
        for index, record in zip(indices, self._read(indices), strict=True):
            try:
                results.append(self._decode(record, int(index), keys=("image",)))
            except decoding.BadImage as error:
                results.append(error)
        return results

    def _parsed(self, indices: np.ndarray) -> list[Any]:
        from tensorflow_datasets.proto import tf_example_pb2

        return [
            tf_example_pb2.Example.FromString(content).features.feature for content in self._read(indices, self._stored)
        ]

    def _read(self, indices: np.ndarray, records: Any = None) -> list[Any]:
        records = self._records if records is None else records
        try:
            if self._one_by_one:
                return [records[int(index)] for index in indices]
            return records.__getitems__([int(index) for index in indices])
        except Exception as error:  # array_record raises several kinds for a file that is cut short or altered.
            raise _damaged(self.folder, error) from error

    def _decode(self, record: dict[str, Any], index: int, keys: Iterable[str]) -> dict[str, Any]:
        where = f"{self.name}, record {index}"
        example = {key: value for key, value in record.items() if key not in self._images}
        for key in keys:
            content = record[key]
            example[key] = decoding.decode(
                content.getvalue() if isinstance(content, io.BytesIO) else content,
                channels=self.shape[2] if key == "image" else self._images[key],
                name=where,
                on_mode=self._on_mode,
            )
        label = self._checked(int(record["label"]), where)
        return {**example, "label": label, "row": int(record["row"]) if self._has_row else index}

    def _checked(self, label: int, where: str) -> int:
        if not 0 <= label < self.num_classes:
            raise sources.label_error(label, num_classes=self.num_classes, where=where)
        return label


def open_split(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike | None,
    on_bad_image: str,
    on_mode: str | None,
    channels: int | None,
    **options,
) -> TfdsSource:
    """Finds NAME[/CONFIG][:VERSION] below `data_dir`, or takes `name` as the path of a prepared version.

    Raises:
      errors.UserError: nothing there, or an unknown name (the nearest names are listed).
    """
    if options:
        raise errors.UserError(f"data.options {sorted(options)} do not apply to {name}: remove them.")
    return TfdsSource(_find(name, data_dir), split, on_bad_image=on_bad_image, on_mode=on_mode)


def _damaged(folder: pathlib.Path, error: Exception) -> errors.UserError:
    said = " ".join(str(error).split())[:200]
    return errors.UserError(f"{folder} is damaged ({said}): copy or prepare the data set again.")


def _find(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    direct = pathlib.Path(name).expanduser()
    if (direct / "features.json").is_file():
        return direct
    root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR", DEFAULT_DIR)).expanduser()
    path, _, version = name.partition(":")
    base = root / path
    versions = sorted((child for child in base.glob("*.*.*") if _VERSION.fullmatch(child.name)), key=_version_key)
    versions = [child for child in versions if version in ("", child.name)]
    whole = [child for child in versions if (child / "features.json").is_file()]
    if whole:
        return whole[-1]
    if versions:
        raise errors.UserError(
            f"{versions[-1]} has no features.json: its preparation was interrupted or is not TFDS's; remove it and "
            "prepare the data set again."
        )
    configs = sorted({path.parent.parent.name for path in base.glob("*/*/features.json")})
    if configs:
        raise errors.UserError(
            f"{name} has several configs at {root}: choose one of {', '.join(f'{path}/{config}' for config in configs)}."
        )
    if any(base.glob("*incomplete*")):
        raise errors.UserError(f"{base} was left unfinished: remove it and prepare the data set again.")
    present = sorted(child.name for child in root.iterdir() if child.is_dir()) if root.is_dir() else []
    known = _published_names()
    if path.split("/")[0] not in known:
        raise _unknown(name, root, present, known)
    there = f"it holds {_listed(present)}" if present else ("it is empty" if root.is_dir() else "no such folder")
    raise errors.UserError(
        f"no {name} at {root} ({there}): set data.data_dir to the folder above {path}/, or prepare it with "
        f"`tfds build {path} --data_dir={root} --file_format=array_record` (needs robust_vit[tf])."
    )


def _unknown(name: str, root: pathlib.Path, present: list[str], known: list[str]) -> errors.UserError:
    candidates = {*present, *known, "folder=PATH", "textured_shapes/aligned"}
    near = difflib.get_close_matches(name, sorted(candidates), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    there = f"at {root}: {_listed(present)}" if present else f"nothing is prepared at {root}"
    return errors.UserError(
        f"unknown data set {name!r}: {hint}Known: textured_shapes/CONFIG, folder=PATH, the names of TFDS; {there}."
    )


def _published_names() -> list[str]:
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls("no_such_data_set")
    except Exception as error:  # Without TensorFlow this message is the one public list of names.
        return re.findall(r"^\s*- (\w+)", str(error), flags=re.MULTILINE)
    return []


def _version_key(folder: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("."))


def _listed(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
