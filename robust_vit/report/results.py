"""Results on disk: one folder a study and step, `<run>/studies/<label>/step_<n>/`, written whole or not at all.

`examples.npz` holds the per-example records, `result.json` what was asked and what was found (both byte-comparable
between machines of one kind), `provenance.json` what may differ: versions, hardware, times. `result.json` is written
last, so its presence means that the study is finished.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_vit import errors, files, studies

RECORDS = "examples.npz"
RESULT = "result.json"
PROVENANCE = "provenance.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one study found about one model.

    Attributes:
      directory: where it was read from.
      label: the name that the config gave the study.
      step: the training step of the model.
      study: the configured study, rebuilt from its settings; None where it was skipped.
      finding: records, summary and provenance; None where it was skipped.
      asked: what identifies the result: study, settings, model and data.
      card: the study's own part of the evaluation card.
      skipped: why the study does not apply to the model, or None.
      provenance: versions, hardware, wall time.
    """

    directory: pathlib.Path
    label: str
    step: int
    study: studies.Study | None
    finding: studies.Finding | None
    asked: dict
    card: dict
    skipped: str | None
    provenance: dict


def write(
    directory: pathlib.Path,
    *,
    asked: Mapping[str, Any],
    records: Mapping[str, np.ndarray] | None,
    summary: Mapping[str, Any] | None,
    card: Mapping[str, Any],
    provenance: Mapping[str, Any],
    skipped: str | None = None,
) -> None:
    """Writes a finished (or skipped) study; `result.json` last."""
    if records is not None:
        files.write_npz(directory / RECORDS, records)
    files.write_json(directory / PROVENANCE, provenance)
    content: dict[str, Any] = {"asked": asked, "summary": summary, "card": card}
    if skipped is not None:
        content["skipped"] = skipped
    files.write_json(directory / RESULT, content)


def is_finished(directory: pathlib.Path) -> bool:
    """Whether the folder holds a finished study."""
    return (directory / RESULT).is_file()


def read_asked(directory: pathlib.Path) -> dict:
    """What a finished result was asked for: study settings, model and data."""
    return _content(directory)["asked"]


def read(directory: pathlib.Path, *, study: studies.Study | None = None) -> Result:
    """Reads a finished study back; a damaged or missing file is a `UserError` that names it.

    Args:
      directory: `<run>/studies/<label>/step_<n>`.
      study: the study where the caller has it; otherwise it is rebuilt from the stored settings.
    """
    content = _content(directory)
    asked, skipped = content["asked"], content.get("skipped")
    provenance = files.read_json(directory / PROVENANCE) if (directory / PROVENANCE).is_file() else {}
    finding = None
    if skipped is None:
        study = studies.build(**asked["settings"]) if study is None else study
        if not (directory / RECORDS).is_file():
            raise errors.UserError(
                f"{directory / RECORDS} is missing: remove {directory} and run the same command again."
            )
        finding = studies.Finding(
            settings=asked["settings"],
            records=files.read_npz(directory / RECORDS),
            summary=content["summary"],
            provenance=provenance,
        )
    return Result(
        directory=directory,
        label=directory.parent.name,
        step=step_of(directory),
        study=study if skipped is None else None,
        finding=finding,
        asked=asked,
        card=content["card"] or {},
        skipped=skipped,
        provenance=provenance,
    )


def folder(run_directory: pathlib.Path | str, label: str, step: int) -> pathlib.Path:
    """Where the study `label` of a model at `step` lives."""
    return pathlib.Path(run_directory) / "studies" / label / f"step_{step}"


def step_of(directory: pathlib.Path) -> int:
    """The training step that a result's folder is named after; -1 where it is named otherwise."""
    match = re.fullmatch(r"step_(\d+)", directory.name)
    return int(match.group(1)) if match else -1


def latest(run_directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """For each label the finished result of the highest step."""
    found: dict[str, pathlib.Path] = {}
    for path in sorted((run_directory / "studies").glob(f"*/step_*/{RESULT}")):
        label = path.parent.parent.name
        if label not in found or step_of(path.parent) > step_of(found[label]):
            found[label] = path.parent
    return found


def _content(directory: pathlib.Path) -> dict:
    content = files.read_json(directory / RESULT)
    if not isinstance(content, dict) or not {"asked", "summary", "card"} <= content.keys():
        raise errors.UserError(f"{directory / RESULT} is not a result of robust_vit: remove it and run again.")
    return content
