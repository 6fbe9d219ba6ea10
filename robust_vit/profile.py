"""`python -m robust_vit.profile RUN`: the operations that take a step's time, from the trace that `config.profile` wrote.

A table for the terminal; `xprof` or TensorBoard's profile plugin show the same file in full.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

import jax

from robust_vit import errors

_OPERATIONS = "XLA Ops"  # The line of a TPU's or a GPU's plane that holds operations.


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    Attributes:
      name: as XLA calls it.
      module: the program, for example "jit_step".
      seconds: in all, without what ran inside of it.
      calls: how often.
    """

    name: str
    module: str
    seconds: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace holds of one device.

    Attributes:
      operations: the longest first.
      steps: how many training steps the window shows; 0 where none is marked.
      window: seconds from the first operation to the end of the last.
      busy: seconds of it in which at least one operation ran.
    """

    operations: tuple[Operation, ...]
    steps: int
    window: float
    busy: float


def read(folder: os.PathLike | str) -> Profile:
    """The newest trace below a folder.

    Raises:
      errors.UserError: there is none, or it shows no operation.
    """
    traces = sorted(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise errors.UserError(
            f"no trace (*.xplane.pb) below {folder}: train with --config.profile.steps=5, and give the folder of the run."
        )
    try:
        planes = list(jax.profiler.ProfileData.from_file(str(traces[-1])).planes)
    except Exception as error:
        raise errors.UserError(
            f"{traces[-1]} is no trace that can be read ({str(error)[:100]}): record it again."
        ) from error
    devices = [plane for plane in planes if plane.name.startswith("/device:") and any(True for _ in plane.lines)]
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    intervals: list[tuple[float, float]] = []
    for line in (devices[0] if devices else next(p for p in planes if p.name.startswith("/host:CPU"))).lines:
        events = []
        for event in line.events:
            facts = dict(event.stats)
            if "hlo_op" in facts or line.name == _OPERATIONS:
                key = (str(facts.get("hlo_op", event.name)), str(facts.get("hlo_module", "")))
                events.append((event.start_ns, event.start_ns + event.duration_ns, key))
        for key, duration in _own_times(events):
            totals[key][0] += duration
            totals[key][1] += 1
        intervals += [(start, end) for start, end, _ in events]
    if not intervals:
        raise errors.UserError(f"{traces[-1]} shows no operation of a compiled program: record more steps.")
    found = [Operation(name, module, total * 1e-9, int(calls)) for (name, module), (total, calls) in totals.items()]
    numbers = {
        dict(event.stats)["step_num"]
        for plane in planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        if event.name.partition("#")[0] == "train" and "step_num" in dict(event.stats)
    }
    window = max(end for _, end in intervals) - min(start for start, _ in intervals)
    operations = tuple(sorted(found, key=lambda one: -one.seconds))
    return Profile(operations, len(numbers), window * 1e-9, _union(intervals) * 1e-9)


def render(profile: Profile, *, top: int = 15) -> str:
    """The table as text."""
    steps = max(profile.steps, 1)
    total = sum(one.seconds for one in profile.operations)
    lines = [
        f"{profile.steps} steps in {profile.window:.3g} s: {1e3 * profile.window / steps:.4g} ms a step. Operations run in "
        f"{profile.busy / profile.window:.0%} of it; in the rest the device waits, for images or for the host.",
        "",
        f"{'share':>6}  {'ms a step':>9}  {'calls':>6}  operation",
    ]
    for one in profile.operations[:top]:
        program = f" ({one.module})" if one.module else ""
        share = one.seconds / max(total, 1e-12)
        lines.append(f"{share:6.1%}  {1e3 * one.seconds / steps:9.3f}  {one.calls / steps:6.1f}  {one.name}{program}")
    return "\n".join(lines)


def _own_times(events: Iterable[tuple[float, float, tuple[str, str]]]) -> list[tuple[tuple[str, str], float]]:
    """The duration of each event of one line without those that ran inside of it: a loop is more than its body."""
    own: list[list] = []
    stack: list[tuple[float, int]] = []
    for start, end, key in sorted(events, key=lambda event: (event[0], -event[1])):
        while stack and stack[-1][0] <= start:
            stack.pop()
        if stack:
            own[stack[-1][1]][1] -= min(end, stack[-1][0]) - start
        stack.append((end, len(own)))
        own.append([key, end - start])
    return [(key, max(duration, 0.0)) for key, duration in own]


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the operations that take most time; 2 and one line for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m robust_vit.profile", description=main.__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or any folder that holds a trace")
    parser.add_argument("--top", type=int, default=15, help="operations to list")
    given = parser.parse_args(arguments)
    try:
        print(render(read(given.run), top=given.top))
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
