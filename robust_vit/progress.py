"""What a training run says while it runs: log lines with an ETA, `metrics.jsonl`, TensorBoard events, a profiler trace."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX

from robust_vit import files, processes

_logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"


class TrainingLog:
    """Writes the metrics of one run; on a resume, the lines after the restored step are cut away first.

    `metrics.jsonl` holds what is a function of the configuration, so that two equal runs have equal bytes; times go to
    `speed.jsonl`.

    Args:
      folder: of the run.
      total: steps of the whole training.
      batch: images in one step.
      start: the step that training goes on from.
    """

    def __init__(self, folder: pathlib.Path, *, total: int, batch: int, start: int):
        self._folder, self._total, self._batch = folder, total, batch
        self._active = processes.is_first()
        self._name = folder.name
        self._step = start
        self._time = self._began = time.monotonic()
        self._first = start
        if self._active:
            _cut(folder / METRICS_FILE, start)
            _cut(folder / SPEED_FILE, start)
            self._events = tensorboardX.SummaryWriter(str(folder / "events"), purge_step=start + 1 if start else None)

    def train(self, step: int, metrics: Mapping[str, Any], *, learning_rate: float) -> None:
        """One line of training metrics: means since the line before; and the speed since then."""
        now = time.monotonic()
        speed = (step - self._step) * self._batch / max(now - self._time, 1e-9)
        # The steps since the last line tell more about what is left than the first one, which compiled.
        per_step = (now - self._time) / max(step - self._step, 1)
        left = per_step * (self._total - step)
        self._step, self._time = step, now
        values = {f"train/{name}": value for name, value in metrics.items()} | {"train/learning_rate": learning_rate}
        self._write(METRICS_FILE, step, values)
        self._write(SPEED_FILE, step, {"images_per_second": round(speed, 1), "seconds": round(now - self._began, 2)})
        if self._active:
            self._events.add_scalar("speed/images_per_second", speed, step)
            text = ", ".join(f"{name} {np.mean(value):.4g}" for name, value in metrics.items())
            _logger.info(
                "%s: step %d of %d (%.0f %%), %s, %.0f images/s, %s left",
                self._name, step, self._total, 100 * step / self._total, text, speed, duration(left),
            )  # fmt: skip

    def validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of validation metrics; the time that they took does not count against the speed."""
        self._write(METRICS_FILE, step, {f"validation/{name}": value for name, value in metrics.items()})
        if self._active:
            text = ", ".join(f"{name} {np.mean(value):.4g}" for name, value in metrics.items())
            _logger.info("%s: validation at step %d: %s", self._name, step, text)
        self._step, self._time = step, time.monotonic()

    def close(self) -> None:
        """Flushes the events."""
        if self._active:
            self._events.close()

    def _write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._active:
            return
        path = self._folder / name
        with files.disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(files.jsonable({"step": step, **values}), sort_keys=True) + "\n")
        if name == METRICS_FILE:
            for key, value in values.items():
                self._events.add_scalar(key, float(np.mean(value)), step)


class Trace:
    """A window of `jax.profiler` steps, written once; one that training never reaches is said at once.

    Args:
      folder: where the trace goes; open it with `xprof` or TensorBoard's profile plugin.
      start: first step of the window.
      steps: its length; 0 writes nothing.
      last: step of training.
    """

    def __init__(self, folder: pathlib.Path, *, start: int, steps: int, last: int):
        self._folder, self._start, self._end = folder, start, min(start + steps, last + 1)
        self._running = False
        self._wanted = steps > 0 and processes.is_first()
        if self._wanted and start > last:
            _logger.warning(
                "no profiler trace will be written: it would begin at step %d, and training ends at %d; set profile.start lower, "
                "or train longer or in another --workdir",
                start, last,
            )  # fmt: skip

    def at(self, step: int, state: Any) -> None:
        """Called before each step, and after the last one with the number that would follow.

        Waits for the device at both ends: the window holds its own steps, all of them and no other.

        Args:
          step: that comes next.
          state: what the step before it returned.
        """
        if self._wanted and not self._running and self._start <= step < self._end:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step >= self._end:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the window where it is open."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = self._wanted = False
            _logger.info("profiler trace written to %s", self._folder)


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read(path: os.PathLike | str) -> list[dict[str, Any]]:
    """The lines of a metrics file; a line that a kill has torn is left out."""
    path = pathlib.Path(path)
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines


def _cut(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read(path) if line["step"] <= step]
        files.write_text(path, "".join(json.dumps(line, sort_keys=True) + "\n" for line in kept))
