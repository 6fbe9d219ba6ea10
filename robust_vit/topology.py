"""Compiles for a TPU pod ahead of time, with no such hardware: memory of a chip, operations and collectives of a step.

Needs libtpu, which holds the compiler and installs on any Linux machine (`pip install libtpu`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping

import jax

from robust_vit import collectives, errors, mesh, programs, progress, runs, train

_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}
_CUBES |= {512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16)}


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU.

    Attributes:
      accelerator: how Google Cloud calls it in the type of a machine.
      cores: what the number in the name of a slice counts a chip as.
      grids: number of chips -> how they are laid out.
      memory: of a chip, in GiB.
      peak: bfloat16 operations a second of a chip.
      options: for the compiler, beyond the grid.
    """

    accelerator: str
    cores: int
    grids: Mapping[int, tuple[int, ...]]
    memory: float
    peak: float
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Memory and peak: cloud.google.com/tpu/docs/system-architecture-tpu-vm. A v4 chip is two cores that JAX sees as one device.
GENERATIONS = {
    "v4": Generation("v4", 2, _CUBES, 32, 275e12, {"chip_config_name": "megacore"}),
    "v5e": Generation("v5litepod", 1, _FLAT, 16, 197e12),
    "v5p": Generation("v5p", 2, _CUBES, 95, 459e12),
    "v6e": Generation("v6e", 1, _FLAT, 32, 918e12),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of a pod by its name: "v5e-64" is 64 chips, and "v4-64" and "v5p-64" are 32, whose cores the name counts.

    Attributes:
      name: as it was given.
      generation: what the chips are.
      grid: how they are laid out.
    """

    name: str
    generation: str
    grid: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.grid)

    @property
    def kind(self) -> Generation:
        """Facts of the chips."""
        return GENERATIONS[self.generation]


def parse(name: str) -> Slice:
    """The slice of that name.

    Raises:
      errors.UserError: an unknown generation or size, naming the known ones.
    """
    known = {f"{kind}-{chips * facts.cores}": chips for kind, facts in GENERATIONS.items() for chips in facts.grids}
    given = re.sub(r"^v5litepod-", "v5e-", name.strip().lower())
    if given not in known:
        raise errors.unknown("topology", name, known)
    generation = given.partition("-")[0]
    return Slice(name, generation, GENERATIONS[generation].grids[known[given]])


def configure(name: str, *, alone: bool) -> None:
    """Refuses what cannot be compiled for, and keeps libtpu from waiting for an answer about a TPU in this machine.

    To be called before JAX meets its first device.

    Args:
      name: of the slice.
      alone: nothing else is asked of this machine's devices, so JAX need not start them.
    """
    pod = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise errors.UserError(
            "--topology compiles with libtpu, which is not installed: pip install libtpu (Linux; no TPU needed)."
        )
    # It would ask the cloud's metadata server what it runs on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{pod.kind.accelerator}-{pod.chips * pod.kind.cores}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    if alone:
        jax.config.update("jax_platforms", "cpu")
        # What was compiled for chips that are not there cannot be read back: each attempt would only warn.
        jax.config.update("jax_enable_compilation_cache", False)


def devices(pod: Slice) -> list[jax.Device]:
    """Descriptions of the chips: enough to compile for them."""
    from jax.experimental import topologies

    options = dict(pod.kind.options)
    if pod.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    grid = "x".join(map(str, pod.grid))
    try:
        return topologies.get_topology_desc(f"{pod.generation}:{grid}", "tpu", **options).devices
    except Exception as error:
        raise errors.UserError(
            f"libtpu does not describe {pod.name} ({pod.generation}:{grid}): {str(error).splitlines()[0][:200]}; try another "
            "release of libtpu, or another topology."
        ) from error


def plan(setups: Mapping[str, runs.Setup], name: str) -> str:
    """What the training step and the validation of each run take on a slice of a pod, as text for a terminal.

    Args:
      setups: run -> what `runs.prepare` returned, for this machine. `train.accumulate="auto"` is settled by a chip's memory.
      name: of the slice.

    Raises:
      errors.UserError: an unknown name, no libtpu, a batch that the chips do not divide, parts that fit in no way.
    """
    pod = parse(name)
    chips = devices(pod)
    hosts = len({chip.process_index for chip in chips})
    grid = " x ".join(map(str, pod.grid))
    lines = [
        f"{pod.name}: {_count(pod.chips, 'chip')} of {chips[0].device_kind} in a grid of {grid}, {_count(hosts, 'host')}, "
        f"{pod.kind.memory:g} GiB and {pod.kind.peak / 1e12:,.0f} TFLOP/s (bfloat16) a chip"
    ]
    for run, setup in setups.items():
        there = dataclasses.replace(setup, mesh=mesh.make(chips, sharding=setup.config.sharding))
        mesh.check_batch(there.mesh, setup.config.data.batch, name="data.batch")
        there = train.settle(there, limit=int(programs.margin("accelerator") * pod.kind.memory * 2**30))
        title = f"{run}: training step of {setup.config.data.batch:,} images"
        if there.config.train.accumulate > 1:
            title += f" in {there.config.train.accumulate} parts"
        lines += ["", *_described(title, train.step_program(there), pod)]
        validation = train.validation_program(there)
        if validation is not None and not setup.config.data.eval_batch % pod.chips:
            title = f"{run}: validation of {setup.config.data.eval_batch:,} images"
            lines += ["", *_described(title, validation, pod)]
    return "\n".join(lines)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number > 1 else ''}"


def _described(title: str, program: programs.Program, pod: Slice) -> list[str]:
    try:
        cost = programs.inspect(program)
    except jax.errors.JaxRuntimeError as error:
        if not programs.out_of_memory(error):
            raise
        used = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        needs = f"needs {used.group(1)} GiB of {used.group(2)}" if used else f"needs more than {pod.kind.memory:g} GiB"
        return [
            f"{title}: does not fit: {needs} on a chip. Set train.accumulate, model.remat or bfloat16, or take more chips."
        ]
    sizes = cost.argument_bytes, cost.temporary_bytes, cost.output_bytes
    parts = [
        f"{programs.size_text(size)} {kind}"
        for size, kind in zip(sizes, ("arguments", "temporary", "output"), strict=True)
    ]
    fastest = cost.flops / pod.kind.peak
    lines = [
        f"{title}, compiled in {progress.duration(cost.compile_seconds)}",
        f"  memory a chip      {programs.size_text(cost.memory)} of {pod.kind.memory:g} GiB, which fits ({', '.join(parts)})",
        f"  operations a chip  {cost.flops / 1e9:,.1f} GFLOP: {1e3 * fastest:,.2f} ms at the peak; at 40 % of it "
        f"{progress.duration(2.5 * fastest * program.times)} for all {program.times:,} calls",
    ]
    exchanged = collectives.read(cost.compiled)
    sent = sum(one.sent * one.count for one in exchanged)
    lines.append(f"  collectives        {programs.size_text(sent)} sent by each chip a call")
    lines += [
        f"    {one.kind:<18} {one.count:>5} x {programs.size_text(one.bytes):>8} among {one.group}"
        for one in exchanged[:8]
    ]
    if len(exchanged) > 8:
        rest = exchanged[8:]
        lines.append(f"    and {len(rest)} smaller kinds, {programs.size_text(collectives.total_bytes(rest))} together")
    return lines
