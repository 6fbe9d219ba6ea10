"""The evaluation card: what was asked of which model under which threat, and what guards it, as JSON."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import robust_vit
from robust_vit.report import comparisons, runs

SCHEMA = 1


def build(found: Sequence[runs.Run], compared: Sequence[comparisons.Row], *, beside: pathlib.Path) -> dict[str, Any]:
    """The card of a report.

    Args:
      found: the runs.
      compared: the paired tests between them.
      beside: the report's folder: paths are relative to it.
    """
    return {
        "schema": SCHEMA,
        "library": f"robust_vit {robust_vit.__version__}",
        "runs": {run.name: _run(run, beside) for run in found},
        "comparisons": [
            {
                "study": row.label,
                "first": row.first,
                "second": row.second,
                **dataclasses.asdict(row.comparison),
                "p_value_holm": row.adjusted,
            }
            for row in compared
        ],
    }


def _run(run: runs.Run, beside: pathlib.Path) -> dict[str, Any]:
    entries = {}
    for label, result in run.results.items():
        entry: dict[str, Any] = {
            "step": result.step,
            "data": result.asked["data"],
            "threat": result.asked["threat"],
            "seed": result.asked["seed"],
            "model_fingerprint": result.asked["model"],
            "provenance": result.provenance,
            "result": pathlib.PurePath(os.path.relpath(result.directory, beside)).as_posix(),
        }
        if result.skipped is None:
            entry |= {**result.card, "summary": result.finding.summary}
            architecture = (run.config.get("model") or {}).get("name", "")
            listed = result.study.entry(
                result.finding, name=run.name, architecture=architecture, seed=result.asked["seed"]
            )
            if listed is not None:
                entry["robustbench"] = listed
        else:
            entry |= {"study": result.asked["study"], "skipped": result.skipped}
        entries[label] = entry
    return {"studies": entries}
