"""What a configuration will take, before anything runs: passes, minutes and memory of each part of each run.

Memory and operations are XLA's own figures for the very programs that would run, compiled from shapes; the compilation
cache keeps them for the run. Minutes come from a calibration that executes these programs for about three seconds.
"""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections

from robust_vit import checkpoints, files, programs, progress, runs, studies, train
from robust_vit.report import results
from robust_vit.training import optimizers

CALIBRATION_SECONDS = 3.0
_NEGLIGIBLE = 1e7  # Operations: a program that does fewer in one call is not worth timing.
_TYPICAL = 0.4  # Share of a matrix product's speed that is assumed of a model none of which could be timed.


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of the plan: the training of a run, its validation, or one study of it.

    Attributes:
      run: name of the run.
      name: "training", "validation" or the label of the study.
      work: how much there is in all, for example "852 steps".
      state: what is done of it already, or why it will not be done; empty where all of it is to do.
      automatic: of a study, the setting that memory may choose ("auto").
      share: of the work that is left, in [0, 1].
      passes: forward and backward passes of one example that are left.
      programs: what is compiled, with how often each runs in all of the work.
      costs: of these, in the same order.
    """

    run: str
    name: str
    work: str = ""
    state: str = ""
    automatic: str = ""
    share: float = 1.0
    passes: tuple[int, int] = (0, 0)
    programs: tuple[programs.Program, ...] = ()
    costs: tuple[programs.Cost, ...] = ()

    @property
    def pairs(self) -> list[tuple[programs.Program, programs.Cost]]:
        """Each program with its cost."""
        return list(zip(self.programs, self.costs, strict=True))

    @property
    def largest(self) -> programs.Cost | None:
        """The program that takes most memory."""
        return max(self.costs, key=lambda cost: cost.memory, default=None)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What the calibration found.

    Attributes:
      product: operations a second of a matrix product on one device.
      seconds: of one call of each program that was timed, by `Program.key`.
      rates: run -> operations a second of its own programs, for those that would take too long to time.
    """

    product: float
    seconds: Mapping[tuple, float]
    rates: Mapping[str, float]

    def of(self, part: Part) -> float:
        """Seconds of the work that is left of a part."""
        return part.share * sum(self._seconds(part))

    def timed(self, part: Part) -> bool:
        """Whether nine tenths of a part's seconds were timed, rather than derived from operations."""
        derived = [program.key not in self.seconds for program in part.programs]
        seconds = self._seconds(part)
        return not part.share or sum(map(operator.mul, derived, seconds)) <= 0.1 * sum(seconds)

    def _seconds(self, part: Part) -> list[float]:
        rate = self.rates.get(part.run, _TYPICAL * self.product)
        return [program.times * self.seconds.get(program.key, cost.flops / rate) for program, cost in part.pairs]


def plan(setups: Mapping[str, runs.Setup], asked: Mapping[str, studies.Study]) -> str:
    """The plan of all runs and their studies, as text for a terminal. Nothing is written and no parameters are made.

    Args:
      setups: run -> what `runs.prepare` returned.
      asked: label -> configured study.

    Raises:
      errors.UserError: what is set to "auto" fits in no way.
    """
    settled = {name: train.settle(setup) for name, setup in setups.items()}
    parts = list(collect(settled, asked))
    return render(parts, calibrate(parts, settled))


def collect(setups: Mapping[str, runs.Setup], asked: Mapping[str, studies.Study]) -> Iterable[Part]:
    """The parts of all runs with their programs, compiled; equal programs once."""
    known: dict[tuple, programs.Cost] = {}
    subjects = {}
    for name, setup in setups.items():
        seeds = [f"{name}.seed{index}" for index in range(setup.replicas or 1)]
        model, past = setup.abstract_classifier(), runs.history(setup, until=setup.steps)
        subjects |= {seed: runs.subject(setup, model, name, past) for seed in seeds}
    subjects = studies.introduce(subjects)
    for name, setup in setups.items():
        subject = subjects[f"{name}.seed0"]
        parts = [*_training(setup, name), *(_study(setup, label, study, subject) for label, study in asked.items())]
        for part in parts:
            for program in part.programs:
                if program.key not in known:
                    known[program.key] = programs.inspect(program)
            yield dataclasses.replace(part, costs=tuple(known[program.key] for program in part.programs))


def calibrate(parts: Sequence[Part], setups: Mapping[str, runs.Setup]) -> Speed:
    """Times the programs that take longest, as many as `CALIBRATION_SECONDS` allow; the rates serve the others."""
    product = _product_speed()
    if jax.process_count() > 1:
        return Speed(product, {}, {})  # One process cannot execute what all of them have to execute together.
    weight: dict[tuple, float] = {}
    candidates: dict[tuple, tuple[str, programs.Program, programs.Cost]] = {}
    for part in parts:
        for program, cost in part.pairs:
            if part.share and cost.flops > _NEGLIGIBLE:
                weight[program.key] = weight.get(program.key, 0.0) + cost.flops * program.times
                candidates[program.key] = part.run, program, cost
    until = time.monotonic() + CALIBRATION_SECONDS
    limit = programs.usable_memory()
    seconds: dict[tuple, float] = {}
    done: dict[str, list[tuple[float, float]]] = {}
    for key in sorted(candidates, key=weight.get, reverse=True):
        run, program, cost = candidates[key]
        # A first call and one that is timed, both perhaps at a quarter of a product's speed.
        if 8 * cost.flops / product < until - time.monotonic() and cost.memory < limit:
            seconds[key] = programs.measure(program, cost, seconds=CALIBRATION_SECONDS / 30)
            done.setdefault(run, []).append((cost.flops, seconds[key]))
    rates = {run: sum(flops for flops, _ in pairs) / sum(took for _, took in pairs) for run, pairs in done.items()}
    for run in {run for run, _, _ in candidates.values()} - rates.keys():
        rate = _probe(setups[run], product, until - time.monotonic())
        if rate is not None:
            rates[run] = rate
    return Speed(product, seconds, rates)


def render(parts: Sequence[Part], speed: Speed) -> str:
    """The table of the parts, the total, how sure it is, and what does not fit."""
    limit = programs.device_memory()
    devices = jax.devices()
    header = (
        "run",
        "part",
        "work",
        "forward passes",
        "backward",
        "minutes",
        "memory",
        "arguments + temporary + output",
    )
    rows: list[tuple[str, ...]] = [header]
    for part in parts:
        work = ", ".join(filter(None, (part.work, part.state)))
        passes = [f"{number:,}" for number in part.passes]
        largest = part.largest
        memory = ("", "")
        if largest is not None:
            sizes = largest.argument_bytes, largest.temporary_bytes, largest.output_bytes
            memory = programs.size_text(largest.memory), " + ".join(map(programs.size_text, sizes))
        minutes = ""
        if part.programs:
            number = speed.of(part) / 60
            minutes = f"{'' if speed.timed(part) else '~'}{number:,.{0 if number >= 100 else 2}f}"
        rows.append((part.run, part.name, work, *passes, minutes, *memory))
    total = sum(speed.of(part) for part in parts)
    compiling = sum(cost.compile_seconds for cost in {id(cost): cost for part in parts for cost in part.costs}.values())
    lines = [
        f"{len(devices)} device{'s' if len(devices) > 1 else ''} ({devices[0].device_kind}), {programs.size_text(limit)} of "
        f"memory each, {speed.product / 1e9:,.0f} GFLOP/s in a matrix product",
        "",
        *_aligned(rows, right=(3, 4, 5, 6)),
        "",
        f"In all about {progress.duration(total)} of computing. Compiling took {progress.duration(compiling)} just now; the "
        "compilation cache keeps it for the run.",
        "Minutes are timed on this machine just now: expect them within a factor of 1.5. Those marked ~ follow from the "
        "number of operations: within 3. Reading images, statistics, checkpoints and the report come on top; studies that stop "
        "early, once Lanczos has converged or an attack has succeeded, take less than their plan.",
    ]
    for part in parts:
        if part.largest is not None and part.share and part.largest.memory > programs.margin() * limit:
            lines.append(
                f"{part.run}: {part.name} needs {programs.size_text(part.largest.memory)}, more than "
                f"{programs.margin():.0%} of the device's memory: {_remedy(part)}."
            )
    return "\n".join(lines)


def _training(setup: runs.Setup, name: str) -> list[Part]:
    config = setup.config
    done = min(max(checkpoints.steps(setup.folder / "checkpoints"), default=0), setup.steps)
    share = 1.0 - done / setup.steps
    state = "finished" if not share else f"from step {done:,}" if done else ""
    gradients = 2 if optimizers.takes_gradient_function(config.optimizer.name) else 1
    images = (setup.steps - done) * config.data.batch * gradients * (setup.replicas or 1)
    work = f"{setup.steps:,} steps of {config.data.batch:,}"
    if config.train.accumulate > 1:
        work += f" in {config.train.accumulate} parts"
    step = (train.step_program(setup),)
    found = [Part(name, "training", work, state, share=share, passes=(images, images), programs=step)]
    validation = train.validation_program(setup)
    if validation is not None:
        images = round(share * validation.times) * setup.bundle.validation.batch_size
        batches = f"{validation.times:,} batches"
        found.append(Part(name, "validation", batches, state, share=share, passes=(images, 0), programs=(validation,)))
    return found


def _study(setup: runs.Setup, label: str, study: studies.Study, subject: studies.Subject) -> Part:
    reason = study.applicable(subject)
    if reason is not None:
        return Part(setup.folder.name, label, state=f"skipped: {reason}", share=0.0)
    trained = max(checkpoints.steps(setup.folder / "checkpoints"), default=0) >= setup.steps
    folder = setup.folder if setup.replicas is None else setup.folder.with_name(f"{setup.folder.name}.seed0")
    finished = results.latest(folder).get(label) if trained else None
    stored = results.read_asked(finished)["settings"] if finished is not None else None
    automatic = getattr(study, study.automatic, None) == programs.AUTO
    study = study.settle(subject, stored)
    chunks = study.chunks(subject)
    state, share = "", 1.0
    if stored is not None and stored == files.jsonable(study.settings()):
        state, share = "finished", 0.0
    elif trained:
        begun = len(list(folder.glob(f"studies/{label}/step_*/chunks/*.npz")))
        if begun:
            state, share = f"from chunk {begun + 1}", max(1.0 - begun / chunks, 0.0)
    work = f"{chunks:,} chunk{'s' if chunks > 1 else ''}"
    if automatic:
        work += f", {study.automatic} {getattr(study, study.automatic)}"
    times = setup.replicas or 1
    if times > 1:
        work += f" x {times} seeds"
    found = [dataclasses.replace(program, times=times * program.times) for program in study.programs(subject)]
    passes = tuple(round(times * share * number) for number in study.passes(subject))
    return Part(setup.folder.name, label, work, state, study.automatic, share, passes, tuple(found))


def _product_speed() -> float:
    """Operations a second of a matrix product on one device, in the precision that its models would use."""
    platform = jax.local_devices()[0].platform
    size, dtype = (1024, jnp.float32) if platform == "cpu" else (8192, jnp.bfloat16)
    shape = jax.ShapeDtypeStruct((size, size), dtype)
    program = programs.Program("product", jax.jit(jnp.matmul), (shape, shape))
    return 2.0 * size**3 / programs.measure(program, programs.inspect(program), seconds=0.15)


def _probe(setup: runs.Setup, product: float, seconds: float) -> float | None:
    """Operations a second of a training step of as many images as there is time for; None where there is none, or no memory."""
    batch = setup.config.data.batch
    step = train.step_program(setup)
    images = int(max(seconds, CALIBRATION_SECONDS / 3) * product / (8 * programs.inspect(step).flops / batch))
    each = min(images, batch) // setup.mesh.size
    if not each:
        return None
    # Few different sizes: the compilation cache knows them the next time.
    images = setup.mesh.size * 2 ** (each.bit_length() - 1)
    config = ml_collections.ConfigDict(setup.config.to_dict())
    with config.ignore_type():
        config.data.batch, config.train.accumulate = images, 1
    small = train.step_program(dataclasses.replace(setup, config=config.lock()))
    cost = programs.inspect(small)
    if cost.memory >= programs.usable_memory():
        return None
    return cost.flops / programs.measure(small, cost, seconds=0.0)


def _remedy(part: Part) -> str:
    if part.automatic:
        return f"set studies.{part.name}.{part.automatic}=auto"
    if part.name == "validation":
        return "lower data.eval_batch; or shard the parameters"
    return "set train.accumulate=auto, model.remat with model.scan, or bfloat16; or shard the parameters"


def _aligned(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
