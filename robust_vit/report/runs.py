"""Finds the runs that a report compares: workdirs or single runs on disk, with their results and training metrics."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from robust_vit import errors, files, progress
from robust_vit.report import results

# What a reader asks first; other studies follow by name.
_FIRST = ("accuracy", "calibration")


@dataclasses.dataclass(frozen=True)
class Run:
    """One model's folder.

    Attributes:
      name: how the report calls it; unique within the report.
      directory: `<workdir>/<run>`.
      results: label -> newest finished or skipped result.
      metrics: lines of `metrics.jsonl`, in order.
      config: the training config, or empty.
    """

    name: str
    directory: pathlib.Path
    results: dict[str, results.Result]
    metrics: tuple[dict, ...]
    config: dict


def find(paths: Sequence[os.PathLike | str | tuple[str, os.PathLike | str]]) -> list[Run]:
    """Reads runs in the given order; a workdir stands for all its runs.

    Args:
      paths: workdirs, runs (`<workdir>/<run>`), or pairs of a name and a run's folder.

    Raises:
      UserError: a path that is neither, or no run at all.
    """
    names: dict[pathlib.Path, str] = {}  # Each folder once, where it first stood; a name that was given wins.
    for path in paths:
        name, path = path if isinstance(path, tuple) else (None, path)
        path = pathlib.Path(path)
        if not path.is_dir():
            raise errors.UserError(f"there is no folder {path}: give a --workdir, or one run in it.")
        folders = [path] if _is_run(path) else sorted(child for child in path.iterdir() if _is_run(child))
        if not folders:
            raise errors.UserError(f"{path} holds no results: give a --workdir that a run or a study has written to.")
        for folder in map(pathlib.Path.resolve, folders):
            names[folder] = name or names.get(folder, folder.name)
    named = [(name, folder) for folder, name in names.items()]
    # Runs without results go last: the position of a run is its colour in every figure.
    return sorted((_read(name, folder) for name, folder in _distinct(named)), key=lambda run: not run.results)


def labels(runs: Iterable[Run]) -> list[str]:
    """All study labels of the runs: the plain questions first, then by name."""
    found = {label for run in runs for label in run.results}
    return sorted(found, key=lambda label: (_FIRST.index(label) if label in _FIRST else len(_FIRST), label))


def _is_run(folder: pathlib.Path) -> bool:
    return (folder / "studies").is_dir() or (folder / progress.METRICS_FILE).is_file()


def _distinct(named: Sequence[tuple[str, pathlib.Path]]) -> list[tuple[str, pathlib.Path]]:
    """Names that collide get their workdir in front, and a number where even that is no help."""
    names = [name for name, _ in named]
    distinct, taken = [], set()
    for name, folder in named:
        unique = name if names.count(name) == 1 else f"{folder.parent.name}/{name}"
        suffix = 2
        while unique in taken:
            unique, suffix = f"{unique.split(' (')[0]} ({suffix})", suffix + 1
        taken.add(unique)
        distinct.append((unique, folder))
    return distinct


def _read(name: str, folder: pathlib.Path) -> Run:
    found = {label: results.read(directory) for label, directory in results.latest(folder).items()}
    return Run(name, folder, found, tuple(progress.read(folder / progress.METRICS_FILE)), _config(folder, name))


def _config(folder: pathlib.Path, name: str) -> dict[str, Any]:
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            return files.read_json(path)
    return {}
