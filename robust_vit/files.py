"""Files that are whole or absent: write beside the target, flush to the disk, rename."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from robust_vit import errors


@contextlib.contextmanager
def disk_errors(path: os.PathLike | str) -> Iterator[None]:
    """Turns a full disk, a quota, a missing permission or a file in the way into one line that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.UserError(
                f"no space left while writing {path}: free some space or choose another --workdir, then run "
                "the same command again; what was finished is kept."
            ) from error
        refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
        if error.errno in refused:
            raise errors.UserError(
                f"cannot write {path}: {error.strerror}. Choose a folder that you may write to."
            ) from error
        raise


def write_bytes(path: os.PathLike | str, content: bytes) -> None:
    """Writes a file so that after a crash at any moment it holds either the old content or all of the new."""
    path = pathlib.Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_text(path: os.PathLike | str, content: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: os.PathLike | str, content: Any) -> None:
    """Writes JSON with sorted keys, so that equal content is equal bytes. Non-finite floats become null."""
    write_text(path, json.dumps(jsonable(content), indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_npz(path: os.PathLike | str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays; equal arrays give equal bytes (the archive holds no time stamps)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: np.asarray(arrays[name]) for name in sorted(arrays)})
    write_bytes(path, buffer.getvalue())


def read_json(path: os.PathLike | str) -> Any:
    """Reads JSON; a damaged file is a `UserError` that names it."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} is damaged ({error}): remove it and run the same command again.") from error


def read_npz(path: os.PathLike | str) -> dict[str, np.ndarray]:
    """Reads named arrays; a damaged file is a `UserError` that names it. Never runs pickled code."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise errors.UserError(f"{path} is damaged ({error}): remove it and run the same command again.") from error


def jsonable(value: Any) -> Any:
    """Plain Python for `json`: arrays to lists, NumPy scalars to numbers, non-finite floats to None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, pathlib.PurePath):
        return str(value)
    return value


def _sync_folder(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # Some network file systems refuse to open a folder.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
