"""A study whose records are drawn, so that the report can be tested without a model; and folders full of its results."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar

import numpy as np

from robust_vit import files, plots, studies, tables
from robust_vit.metrics import statistics
from robust_vit.report import results
from robust_vit.studies import study as study_lib

NAME = "fabricated"
ENTRY = "fabricated_study:Fabricated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fabricated(studies.Study):
    """Right or wrong on drawn images.

    Second paragraph of the protocol.

    Attributes:
      epsilons: not used for anything.
    """

    name: ClassVar[str] = NAME
    title: ClassVar[str] = "A fabricated <study>"
    question: ClassVar[str] = "How often is a coin right?"
    paper: ClassVar[str] = "Bernoulli 1713"

    epsilons: tuple[float, ...] = (0.0, 0.5)

    def summarise(self, records):
        interval = statistics.proportion(int(records["correct"].sum()), len(records["correct"]))
        caveats = ["A coin sees <nothing>: raise `flips`."]
        if interval.value < 0.6:
            caveats.append("This coin is hardly better than chance.")
        return {"accuracy": dataclasses.asdict(interval), "caveats": caveats}

    def headline(self, finding):
        return {"accuracy": _number(finding)}

    def tables(self, findings):
        rows = [(run, _number(finding), len(finding.records["row"])) for run, finding in findings.items()]
        return {"coins": tables.Table("Coins & <b>tables</b>", ("run", "accuracy", "images"), rows, "Over images.")}

    def figures(self, findings):
        with plots.style():
            figure, axes = plots.figure(width=5, height=2.4)
            for index, (run, finding) in enumerate(findings.items()):
                axes[0, 0].plot(np.cumsum(finding.records["correct"]), color=plots.color(index), label=run)
            plots.legend(axes[0, 0])
        return {"running_total": figure}

    def compare(self, first, second):
        left, right = study_lib.pair(first, second)
        if not len(left):
            return []
        pair = first.records["correct"][left], second.records["correct"][right]
        difference = statistics.paired_difference(pair[0].astype(float), pair[1].astype(float))
        test = statistics.mcnemar(*pair)
        item = studies.Comparison(
            "accuracy", difference.value, difference.low, difference.high, test.p_value, test.method, test.over, "+.1%"
        )
        return [item]


def _number(finding) -> tables.Number:
    interval = finding.summary["accuracy"]
    return tables.Number(interval["value"], interval["low"], interval["high"], "images", ".1%")


def write(
    run_directory: pathlib.Path,
    *,
    label: str = "coin",
    step: int = 100,
    rate: float = 0.8,
    seed: int = 0,
    examples: int = 200,
    data: str = "0123",
    study: Fabricated | None = None,
    skipped: str | None = None,
) -> pathlib.Path:
    """One result on disk: `examples` drawn outcomes that are right at `rate`. Returns its folder."""
    study = study or Fabricated()
    generator = np.random.default_rng(seed)
    records = {
        "row": np.arange(examples, dtype=np.int32),
        "label": np.arange(examples, dtype=np.int32) % 10,
        "correct": generator.random(examples) < rate,
    }
    asked = {
        "study": NAME,
        "settings": study.settings(),
        "model": f"{seed:016x}",
        "data": {"name": "coins", "fingerprint": data, "examples": examples},
        "classes": 10,
        "threat": None,
        "seed": 0,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
    }
    summary = study.summarise(records)
    directory = results.folder(run_directory, label, step)
    results.write(
        directory,
        asked=asked,
        records=None if skipped else records,
        summary=None if skipped else summary,
        card={} if skipped else study.card(studies.Finding(study.settings(), records, summary)),
        provenance={"data_fingerprint": data, "wall_seconds": 1.5, "versions": {"jax": "0.10.2"}, "attempts": 1},
        skipped=skipped,
    )
    return directory


def write_metrics(run_directory: pathlib.Path, *, steps: int = 100) -> None:
    """Training metrics as `progress.TrainingLog` writes them."""
    lines = []
    for step in range(10, steps + 1, 10):
        lines.append(f'{{"step": {step}, "train/loss": {2.3 * 0.98**step:.4f}, "train/learning_rate": 0.001}}')
        lines.append(f'{{"step": {step}, "validation/accuracy": {1 - 0.9 * 0.98**step:.4f}, "validation/loss": 0.9}}')
    files.write_text(run_directory / "metrics.jsonl", "\n".join(lines) + '\n{"step": 110, "tra')
