"""Runs studies over models: in chunks that are written as they finish, so that a killed study goes on where it stopped.

`report_card` is the door for a model that this library did not define.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from robust_vit import classifier as classifiers
from robust_vit import errors, files, mesh, processes, progress, report, studies
from robust_vit.report import provenance, results
from robust_vit.studies import foreign, identity
from robust_vit.studies import study as study_lib

_logger = logging.getLogger(__name__)
_JOURNAL = "asked.json"
_SECONDS = "_seconds"  # A chunk's own wall time, kept beside its records and left out of the merge.


class Stopped(Exception):
    """The stop flag was raised between two chunks. What was finished is on disk; the same call goes on from there."""


def run_study(
    study: studies.Study,
    label: str,
    subject: studies.Subject,
    directory: os.PathLike | str,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> results.Result | None:
    """Runs one study on one model, or goes on with it, or reads it where it is finished.

    Each chunk is written to `directory/chunks` as it finishes. The merged records and the summary do not depend on where
    the study was killed: `examples.npz` and `result.json` have the same bytes. Several processes compute each chunk together;
    process 0 decides what is left to do, and writes.

    Args:
      study: a configured study (`robust_vit.studies.build`).
      label: the name under which the result is known.
      subject: the model and the data it is judged on (`robust_vit.studies.Subject`).
      directory: `<run>/studies/<label>/step_<n>`.
      stop: polled before each chunk.

    Returns:
      The result as it stands on disk; `.skipped` holds the reason where the study does not apply. None on the processes of a
      job that do not write.

    Raises:
      Stopped: `stop` returned True.
    """
    directory = pathlib.Path(directory)
    chunks = directory / "chunks"
    study = _settle(study, subject, directory)
    asked = files.jsonable(identity.asked(study, subject))
    if processes.first_finds(lambda: _is_finished(directory, asked, label)):
        return results.read(directory, study=study) if processes.is_first() else None
    reason = study.applicable(subject)
    attempts = 0
    if not reason:
        if processes.is_first():
            attempts = _open_chunks(chunks, asked, label)
        seconds = _run_chunks(study, label, subject, chunks, stop)
    if not processes.is_first():
        return None
    if reason:
        _logger.info("%s on %s is skipped: %s.", label, subject.name, reason.rstrip("."))
        shutil.rmtree(chunks, ignore_errors=True)
        circumstances = _circumstances(asked, seconds=0.0, attempts=0, passes=(0, 0))
        results.write(
            directory, asked=asked, records=None, summary=None, card={}, provenance=circumstances, skipped=reason
        )
        return results.read(directory, study=study)
    parts = [files.read_npz(_chunk(chunks, index)) for index in range(study.chunks(subject))]
    records = study_lib.merge([{key: part[key] for key in part if key != _SECONDS} for part in parts])
    summary = files.jsonable(study.summarise(records))
    card = files.jsonable(study.card(studies.Finding(asked["settings"], records, summary)))
    circumstances = _circumstances(asked, seconds=seconds, attempts=attempts, passes=study.passes(subject))
    results.write(directory, asked=asked, records=records, summary=summary, card=card, provenance=circumstances)
    shutil.rmtree(chunks, ignore_errors=True)
    return results.read(directory, study=study)


def evaluate_runs(
    workdir: os.PathLike | str,
    subjects: Mapping[str, studies.Subject],
    asked: Mapping[str, studies.Study],
    step: int | Mapping[str, int],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, results.Result | None]]:
    """Runs every study on every model of a workdir; what is finished is read, not computed.

    Args:
      workdir: holds one folder a run.
      subjects: run name -> `robust_vit.studies.Subject`.
      asked: label -> configured study (`build_studies`).
      step: the training step of the models: one number, or one for each run.
      stop: polled before each chunk.

    Returns:
      run name -> label -> result.
    """
    subjects = studies.introduce(subjects)
    found: dict[str, dict[str, results.Result | None]] = {name: {} for name in subjects}
    total, number = len(subjects) * len(asked), 0
    # Study by study, so that runs of equal shape follow each other while their program is warm.
    for label, study in asked.items():
        for run, subject in subjects.items():
            number += 1
            run_step = step if isinstance(step, int) else step[run]
            _logger.info("[%d/%d] %s on %s", number, total, label, run)
            directory = results.folder(pathlib.Path(workdir) / run, label, run_step)
            found[run][label] = run_study(study, label, subject, directory, stop=stop)
    return found


def build_studies(asked: Mapping[str, Any] | Iterable[str] | None = None) -> dict[str, studies.Study]:
    """Configured studies by label.

    Args:
      asked: label -> a study, or its options as a mapping (`name` among them where the label is not a study's name); or
        names alone, each with its defaults; None is `studies.STANDARD`.
    """
    if asked is None:
        asked = studies.STANDARD
    if isinstance(asked, str):
        asked = (asked,)
    if not isinstance(asked, Mapping):
        return {name: studies.build(name) for name in asked}
    built = {}
    for label, options in asked.items():
        built[label] = options if isinstance(options, studies.Study) else studies.build(**{"name": label, **options})
    return built


@dataclasses.dataclass(frozen=True)
class ReportCard:
    """What `report_card` returns.

    Attributes:
      path: the report, one HTML file.
      results: label -> result of this model, records included.
    """

    path: pathlib.Path
    results: Mapping[str, results.Result]

    @property
    def summary(self) -> dict[str, Any]:
        """label -> the study's numbers with their intervals, as plain JSON; studies that were skipped are left out."""
        return {label: found.finding.summary for label, found in self.results.items() if found.finding is not None}


def report_card(
    model: Callable | classifiers.Classifier | classifiers.Wrapped,
    images: Float[Array, "examples height width channels"] | os.PathLike | str,
    labels: Int[Array, " examples"] | None = None,
    *,
    variables: Any = None,
    workdir: os.PathLike | str,
    studies: Mapping[str, Any] | Iterable[str] | None = None,
    class_names: Iterable[str] | None = None,
    threat: str | None = None,
    name: str = "model",
    batch: int = 128,
    train: tuple[Any, Any] | None = None,
    validation: tuple[Any, Any] | None = None,
    preprocess: tuple[str, ...] = (),
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> ReportCard:
    """Runs the studies on any JAX model and writes the report; called again, it goes on where it was or reads what is finished.

    A second model under another `name` in the same `workdir` joins the same report, compared with the first.

    Args:
      model: `images -> logits`, or `(variables, images) -> logits` where `variables` are given, or a classifier. Images
        are float32 pixels `[batch, height, width, channels]` in [0, 1]; normalisation belongs inside the model. Logits
        `[batch, classes]`, before the softmax.
      images: `[examples, height, width]` or `[examples, height, width, channels]`, uint8 or floats in [0, 1]; or an image
        folder `class/*.jpg|png|webp`, whose sorted class names are the labels; or a source (`robust_vit.data.open_source`).
        Floats are rounded to the nearest of 256 levels.
      labels: class indices; None with a folder or a source.
      variables: the model's parameters, for the studies that look into them.
      workdir: where results and report go.
      studies: see `build_studies`.
      class_names: one name a class.
      threat: the threat model's name, for example "cifar10/linf-8".
      name: of the model in the report.
      batch: images in one compiled forward pass.
      train: training images and labels as they reached the loss, for the studies of its curvature; None skips these.
      validation: images and labels that were held out of training, for what has to be fitted, such as a temperature.
      preprocess: what makes the images of a folder one size, for example `("resize(256)", "center_crop(224)")`.
      weight_decay: the coefficient of the L2 term that the model was trained with.
      label_smoothing: of the training loss, in [0, 1).
      seed: of every draw.

    Raises:
      UserError: one line, for a model that returns probabilities, non-finite or random logits, is in training mode or no JAX
        function, and for images or labels out of range.
    """
    built = build_studies(studies)
    subject = foreign.subject(
        model,
        images,
        labels,
        variables=variables,
        class_names=class_names,
        threat=threat,
        name=name,
        batch=batch,
        train=train,
        validation=validation,
        preprocess=preprocess,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        seed=seed,
    )
    found = evaluate_runs(workdir, {name: subject}, built, step=0)[name]
    path = report.write([workdir], pathlib.Path(workdir) / "report")
    _logger.info("the report: %s", path)
    return ReportCard(path, found)


def _is_finished(directory: pathlib.Path, asked: Mapping[str, Any], label: str) -> bool:
    """Whether the result on disk answers what is asked; one of something else is removed."""
    if not results.is_finished(directory):
        return False
    difference = identity.difference(results.read_asked(directory), asked)
    if not difference:
        shutil.rmtree(directory / "chunks", ignore_errors=True)
        return True
    _logger.warning("%s: the result on disk is of other %s; computing it anew.", label, difference)
    # The result goes first: what is left without it is not taken for a finished study.
    (directory / results.RESULT).unlink()
    return False


def _open_chunks(chunks: pathlib.Path, asked: Mapping[str, Any], label: str) -> int:
    """Makes the chunk folder belong to `asked`, and returns how many attempts there have been."""
    journal = chunks / _JOURNAL
    attempts = 1
    if journal.is_file():
        try:
            content = files.read_json(journal)
            difference = identity.difference(content["asked"], asked)
        except (errors.UserError, KeyError, TypeError):
            difference = "an unreadable journal"
        if difference:
            _logger.warning("%s: the unfinished chunks on disk are of other %s; starting anew.", label, difference)
            shutil.rmtree(chunks)
        else:
            attempts = content["attempts"] + 1
    elif chunks.exists():
        shutil.rmtree(chunks)
    files.write_json(journal, {"asked": asked, "attempts": attempts})
    return attempts


def _run_chunks(
    study: studies.Study, label: str, subject: studies.Subject, chunks: pathlib.Path, stop: Callable[[], bool]
) -> float:
    """Computes what is missing and returns the seconds that all chunks took, in all attempts (on the process that writes)."""
    count = study.chunks(subject)
    whole = [processes.is_first() and _is_whole(_chunk(chunks, index)) for index in range(count)]
    missing = np.flatnonzero(~processes.from_first(np.asarray(whole, bool))).tolist()
    if len(missing) < count:
        _logger.info("%s on %s goes on at chunk %d of %d.", label, subject.name, count - len(missing) + 1, count)
    durations: list[float] = []
    last_line = time.monotonic()
    for done, index in enumerate(missing):
        if stop():
            raise Stopped(f"{label} on {subject.name}: stopped before chunk {index + 1} of {count}.")
        start = time.monotonic()
        with mesh.context(subject.mesh):
            records = {key: np.asarray(value) for key, value in study.chunk(subject, index).items()}
        _check_chunk(records, label, index)
        durations.append(time.monotonic() - start)
        if processes.is_first():
            files.write_npz(_chunk(chunks, index), {**records, _SECONDS: np.float64(durations[-1])})
        if time.monotonic() - last_line > 5.0 and 1 <= done < len(missing) - 1:
            last_line = time.monotonic()
            left = _left(durations, len(missing) - done - 1)
            position = count - len(missing) + done + 1
            _logger.info("%s on %s: %d of %d chunks, about %s left", label, subject.name, position, count, left)
    if not processes.is_first():
        return 0.0
    return sum(float(files.read_npz(_chunk(chunks, index))[_SECONDS]) for index in range(count))


def _left(durations: list[float], chunks: int) -> str:
    # The first chunk holds the compilation: it is no measure of the others.
    typical = durations[1:] or durations
    return progress.duration(chunks * sum(typical) / len(typical))


def _check_chunk(records: Mapping[str, np.ndarray], label: str, index: int) -> None:
    lengths = {
        key: value.shape[0] for key, value in records.items() if value.ndim and not key.startswith(study_lib.EXHIBIT)
    }
    scalars = [key for key, value in records.items() if value.ndim == 0]
    if scalars or "row" not in lengths or len(set(lengths.values())) != 1:
        raise ValueError(
            f"study {label!r}, chunk {index}: records need one leading length and a 'row' key; "
            f"got lengths {lengths}, scalars {scalars}."
        )


def _chunk(chunks: pathlib.Path, index: int) -> pathlib.Path:
    return chunks / f"{index:05d}.npz"


def _is_whole(path: pathlib.Path) -> bool:
    if not path.is_file():
        return False
    try:
        files.read_npz(path)
    except errors.UserError:
        _logger.warning("%s is damaged; computing it again.", path)
        return False
    return True


def _settle(study: studies.Study, subject: studies.Subject, directory: pathlib.Path) -> studies.Study:
    """`Study.settle` by what is on the disk; of several processes the first decides."""
    settled = study.settle(subject, _stored_settings(directory))
    if settled is study:
        return study
    number = processes.first_finds(lambda: getattr(settled, settled.automatic))
    return dataclasses.replace(settled, **{settled.automatic: number})


def _stored_settings(directory: pathlib.Path) -> Mapping[str, Any] | None:
    """The settings that a finished or begun study in the folder was asked with; None where there is none to be read."""
    try:
        if results.is_finished(directory):
            return results.read_asked(directory)["settings"]
        return files.read_json(directory / "chunks" / _JOURNAL)["asked"]["settings"]
    except (errors.UserError, OSError, KeyError, TypeError):
        return None


def _circumstances(
    asked: Mapping[str, Any], *, seconds: float, attempts: int, passes: tuple[int, int]
) -> dict[str, Any]:
    return {
        **provenance.collect(),
        "data_fingerprint": asked["data"]["fingerprint"],
        "wall_seconds": round(seconds, 3),
        "attempts": attempts,
        "passes_planned": {"forward": int(passes[0]), "backward": int(passes[1])},
    }
