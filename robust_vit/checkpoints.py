"""Checkpoints: Orbax writes the arrays, a manifest of checksums makes each step whole or absent.

A step is written by Orbax into `<step>.partial`, hashed file by file, given a `manifest` and only then renamed to
`<step>`. So a kill at any moment leaves the steps before it, and a flipped byte anywhere, which Orbax restores without a
word, is noticed before a value is used.

Of several processes each writes its part of the arrays; process 0 hashes, renames, removes, and decides which step is restored.
A checkpoint of any number of processes and devices is restored by any other number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from robust_vit import errors, files, processes, trees

PyTree = Any
_logger = logging.getLogger(__name__)
MANIFEST = "manifest"
_PARTIAL = ".partial"
_DELETED = ".deleted"
_DAMAGED = ".damaged"
_BLOCK = 1 << 20
_NONE_THERE, _NONE_INTACT = -1, -2


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back.

    Attributes:
      state: the pytree, with the shardings of the target.
      step: the step that it was saved at.
      metrics: the metrics that it was saved with.
    """

    state: PyTree
    step: int
    metrics: dict[str, float]


class Checkpoints:
    """The checkpoints of one run: saved asynchronously; the newest few, the best and all milestones are kept.

    Args:
      folder: where the steps live.
      keep: how many of the newest steps are kept.
      best: name of the metric whose largest value marks one more step to keep; None keeps no best.
    """

    def __init__(self, folder: os.PathLike | str, *, keep: int = 2, best: str | None = None):
        if keep < 1:
            raise errors.UserError(f"checkpoint.keep={keep}: keep at least 1.")
        self._folder = pathlib.Path(folder).absolute()
        self._keep = keep
        self._best = best
        self._writer = ocp.StandardCheckpointer()
        self._sealing: threading.Thread | None = None
        self._failure: BaseException | None = None
        if processes.is_first():
            with files.disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.iterdir():
                # What an earlier process was writing or deleting when it was killed; Orbax adds a suffix of its own.
                if _PARTIAL in leftover.name or _DELETED in leftover.name:
                    shutil.rmtree(leftover, ignore_errors=True)
        processes.barrier("checkpoint folder")

    def steps(self) -> list[int]:
        """The steps on disk, oldest first. They may be damaged: `restore` finds out."""
        return steps(self._folder)

    def best_step(self) -> int | None:
        """The step with the largest value of the metric that marks the best, the earliest of equals."""
        scored = [(metrics[self._best], -step) for step, metrics in self._metrics().items() if self._best in metrics]
        return -max(scored)[1] if scored else None

    def save(
        self, step: int, state: PyTree, *, metrics: Mapping[str, float] | None = None, milestone: bool = False
    ) -> None:
        """Starts to save; returns when the arrays have been copied. A save under way is waited for first.

        A milestone is kept for ever: the manifest says so, so that no later configuration takes it for an old step.
        """
        self.wait()
        partial = self._folder / f"{step}{_PARTIAL}"
        final = self._folder / str(step)
        with self._write_errors():
            if processes.first_finds(lambda: _is_there(final)):
                return
            self._writer.save(partial, state, force=True)
        content = {"step": step, "metrics": dict(metrics or {}), "arrays": _describe(state)}
        content |= {"milestone": True} if milestone else {}
        self._sealing = threading.Thread(
            target=self._seal, args=(partial, content), name=f"checkpoint-{step}", daemon=True
        )
        self._sealing.start()

    def wait(self) -> None:
        """Waits until the save under way is whole on the disk; raises what went wrong with it."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
            if self._failure is None:
                processes.barrier("checkpoint")
        failure, self._failure = self._failure, None
        if failure is not None:
            with self._write_errors():
                raise failure

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def restore(self, target: PyTree, *, step: int | None = None, preferred: int | None = None) -> Restored | None:
        """The newest intact step (or the given one), in the structure, dtypes and shardings of `target`.

        A damaged step is named in the log and the next older one is taken.

        Args:
          target: a pytree of arrays or `jax.ShapeDtypeStruct` with shardings.
          step: restore exactly this step.
          preferred: restore this step where it is intact, and the newest one otherwise.

        Returns:
          None where there is no checkpoint at all.

        Raises:
          errors.UserError: every step is damaged, or the checkpoint is of another model.
        """
        self.wait()
        return restore(self._folder, target, step=step, preferred=preferred)

    def _metrics(self) -> dict[int, dict[str, float]]:
        return {step: manifest["metrics"] for step, manifest in _manifests(self._folder).items()}

    def _seal(self, partial: pathlib.Path, content: dict[str, Any]) -> None:
        try:
            self._writer.wait_until_finished()
            if processes.is_first():
                _flush(partial)
                files.write_bytes(partial / MANIFEST, _encode_manifest({**content, "sha256": _hashes(partial)}))
                os.replace(partial, self._folder / str(content["step"]))
                self._remove_old()
        except BaseException as failure:
            self._failure = failure

    def _remove_old(self) -> None:
        present = self.steps()
        kept = {*present[-self._keep :], self.best_step(), *_milestones(self._folder)}
        for step in present:
            if step not in kept:
                # Renamed first: a kill in the middle of a removal leaves nothing that looks like a step.
                doomed = self._folder / f"{step}{_DELETED}"
                os.replace(self._folder / str(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _write_errors(self):
        return _WriteErrors(self._folder)


def steps(folder: os.PathLike | str) -> list[int]:
    """The steps that a checkpoint folder holds, oldest first."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def milestones(folder: os.PathLike | str) -> list[int]:
    """The steps of a checkpoint folder that are kept for ever, oldest first; the same on every process."""
    found = _milestones(pathlib.Path(folder)) if processes.is_first() else []
    count = processes.first_finds(lambda: len(found))
    return processes.from_first(np.asarray(found or [0] * count, np.int64)).tolist()


def restore(
    folder: os.PathLike | str, target: PyTree, *, step: int | None = None, preferred: int | None = None
) -> Restored | None:
    """`Checkpoints.restore` for a folder that is only read."""
    folder = pathlib.Path(folder).absolute()
    found = _intact(folder, step=step, preferred=preferred)
    return None if found is None else _read(folder / str(found), found, target)


def read_variables(folder: os.PathLike | str) -> PyTree:
    """The variable collections of the newest intact train state in a folder, whatever its optimiser, as nested dicts.

    The moving average of the parameters is taken where one was kept.

    Raises:
      errors.UserError: there is none.
    """
    step = _intact(pathlib.Path(folder).absolute())
    if step is None:
        raise errors.UserError(f"no checkpoint in {folder}: give the folder of a run that has saved one.")
    raw = read_raw(folder, step)
    return {"params": raw.get("average") or raw["params"], **(raw.get("model_state") or {})}


def read_raw(folder: os.PathLike | str, step: int) -> dict[str, Any]:
    """The arrays of one step as nested dicts, without a target and without a check."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(pathlib.Path(folder).absolute() / str(step))


def find_damage(path: os.PathLike | str) -> str | None:
    """What is wrong with the files of one step, in a few words; None where every byte is as it was written."""
    path = pathlib.Path(path)
    try:
        written = _read_manifest(path)["sha256"]
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or has changed"
    found = _hashes(path)
    for name in sorted(written.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in written:
            return f"{name} was not there when it was written"
        if written[name] != found[name]:
            return f"{name} has changed"
    return None


def _intact(folder: pathlib.Path, *, step: int | None = None, preferred: int | None = None) -> int | None:
    """The step to restore, the same on every process; None where there is no checkpoint.

    Raises:
      errors.UserError: the step asked for is not there, or all are damaged.
    """
    present = steps(folder)
    if step is not None and step not in present:
        raise errors.UserError(f"no checkpoint of step {step} in {folder}: there are {present or 'none'}.")
    wanted = present[::-1] if step is None else [step]
    if preferred in wanted:
        wanted = [preferred, *(other for other in wanted if other != preferred)]
    found = processes.first_finds(lambda: _first_intact(folder, wanted))
    if found == _NONE_INTACT:
        raise errors.UserError(
            f"every checkpoint in {folder} is damaged (steps {sorted(wanted)}): restore the folder from a copy, or remove it to "
            "train from scratch."
        )
    return None if found == _NONE_THERE else found


def _first_intact(folder: pathlib.Path, wanted: list[int]) -> int:
    for candidate in wanted:
        damage = find_damage(folder / str(candidate))
        if damage is None:
            return candidate
        _logger.warning(
            "checkpoint of step %d is damaged (%s): falling back to the newest intact one", candidate, damage
        )
    return _NONE_INTACT if wanted else _NONE_THERE


def _is_there(final: pathlib.Path) -> bool:
    """Whether a step is whole on the disk; a damaged one is set aside: what can be rescued from it is the user's to decide."""
    if not final.exists():
        return False
    if find_damage(final) is None:
        return True
    aside = final.with_name(f"{final.name}{_DAMAGED}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(final, aside)
    return False


def _milestones(folder: pathlib.Path) -> list[int]:
    return [step for step, manifest in _manifests(folder).items() if manifest.get("milestone")]


def _manifests(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
    found = {}
    for step in steps(folder):
        try:
            found[step] = _read_manifest(folder / str(step))
        except (OSError, ValueError):
            continue  # Damaged: it can be neither the best nor a milestone, nor restored.
    return found


def _read(path: pathlib.Path, step: int, target: PyTree) -> Restored:
    manifest = _read_manifest(path)
    difference = _difference(manifest["arrays"], _describe(target))
    if difference:
        raise errors.UserError(
            f"the checkpoint {path} is of another model or optimiser: {difference}. Use the config that it was trained with, "
            "or another --workdir."
        )
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, target))
    return Restored(state=state, step=step, metrics=manifest["metrics"])


def _describe(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree.leaves(tree)
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in zip(trees.paths(tree), leaves, strict=True)}


def _difference(stored: dict[str, str], wanted: dict[str, str]) -> str:
    differing = [name for name in sorted(stored.keys() | wanted.keys()) if stored.get(name) != wanted.get(name)]
    if not differing:
        return ""
    name = differing[0]
    more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
    return (
        f"{name} is {stored.get(name, 'absent')} in the checkpoint and {wanted.get(name, 'absent')} in the config{more}"
    )


def _encode_manifest(content: dict[str, Any]) -> bytes:
    body = json.dumps(files.jsonable(content), sort_keys=True, allow_nan=False)
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode()


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest, whose first line is the checksum of the rest; ValueError where that does not hold."""
    digest, _, body = (path / MANIFEST).read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path / MANIFEST} has changed")
    return json.loads(body)


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): _hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }


def _hash(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


class _WriteErrors:
    """Tensorstore reports a full disk by text, not by errno."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, errors.UserError):
            text = f"{error} {error.__cause__ or ''}"
            if "No space left" in text or "ENOSPC" in text or "quota exceeded" in text.lower():
                raise errors.UserError(
                    f"no space left while saving a checkpoint in {self._folder}: free some space, then run the same command "
                    "again; it goes on from the newest whole checkpoint."
                ) from error
        return False
