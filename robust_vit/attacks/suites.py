"""Sequences of attacks, each on what those before it left standing: AutoAttack (Croce & Hein 2020, arXiv 2003.01690)."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from robust_vit import errors
from robust_vit import programs as compiled
from robust_vit.attacks import apgd, arguments, evaluation, expectations, fab, norms, runner, skeleton, square, threats

_logger = logging.getLogger(__name__)

VERSIONS = ("standard", "plus", "rand")
TARGETS = 9
CANDIDATES = 10  # Classes whose boundaries FAB looks at; the published one looks at all, for a backward pass each.
SAMPLES = 20  # Draws of a stochastic model in each evaluation of the version "rand".
# What an image costs in half the batch. Measured on a CPU (tests/benchmarks/results/attacks.md): a gradient in batches of 4, 8
# and 16 takes 1.52, 1.19 and 1 (ViT), 1.15, 1.03 and 1 (ResNet-20). An accelerator takes about as long for a small batch as for
# its half.
_DEARER = {"cpu": 1.12, "accelerator": 1.9}


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """What a sequence of attacks found: one row an example, in the order of the examples, one column an attack.

    From the bits the minimum over any of the attacks that were tried on an example can be computed again.

    Attributes:
      names: of the attacks, in the order of their turns.
      epsilon: radius of the ball, in pixel units.
      row: ids.
      label: true classes.
      correct: the clean image is classified as its label.
      attempted: whether the attack was tried; not where the clean image is misclassified or an earlier attack succeeded.
      success: whether it succeeded within the ball.
      distance: of the image that it returned; not a number where it was not tried.
      forward_passes: of the example, useful ones.
      backward_passes: likewise.
      log: for each attack what it met and left, its passes executed and useful, its seconds.
      notes: in which respects this is not the suite as published.
    """

    names: tuple[str, ...]
    epsilon: float
    row: Int[np.ndarray, " examples"]
    label: Int[np.ndarray, " examples"]
    correct: Bool[np.ndarray, " examples"]
    attempted: Bool[np.ndarray, "examples attacks"]
    success: Bool[np.ndarray, "examples attacks"]
    distance: Float[np.ndarray, "examples attacks"]
    forward_passes: Int[np.ndarray, "examples attacks"]
    backward_passes: Int[np.ndarray, "examples attacks"]
    log: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()

    @property
    def robust(self) -> Bool[np.ndarray, " examples"]:
        """Whether the example is classified correctly and no attack broke it."""
        return self.correct & ~self.success.any(axis=1)

    def records(self) -> dict[str, np.ndarray]:
        """The per-example arrays by name: what a table, a merge or a later minimum over attacks is computed from."""
        found = {"row": self.row, "label": self.label, "correct": self.correct}
        for column, name in enumerate(self.names):
            for field in ("attempted", "success", "distance", "forward_passes", "backward_passes"):
                found[f"{field}/{name}"] = getattr(self, field)[:, column]
        return found


class _Clean(skeleton.Attack, kw_only=True):
    """No attack: the judgement of the clean image."""

    @property
    def evaluations(self) -> int:
        return 1

    @property
    def step_passes(self) -> tuple[int, int]:
        return 0, 0

    def step(self, model: skeleton.Model, state: skeleton.State) -> skeleton.State:
        del model
        return state


def members(
    version: str, *, epsilon: float, norm: norms.Norm, classes: int, exact: bool = False
) -> tuple[dict[str, skeleton.Attack], tuple[str, ...]]:
    """The attacks of a version by name, in their order, and in which respects they are not the published ones.

    Args:
      version: `standard`, `plus` or `rand`, with the budgets of the authors' repository (`autoattack/autoattack.py`).
      epsilon: radius in pixel units.
      norm: of the ball.
      classes: of the model. Below 4 the targeted DLR loss is not defined, below 3 the DLR loss is not.
      exact: the published budgets to the last step: APGD and FAB leave no example early (Square does there too), and FAB looks
        at the boundaries of all classes.

    In L1 the published suite has a Square attack that is not here. Its `plus` is not made for L1, of which it warns: it takes 9
    targets and one ball, where APGD here goes through three.

    Raises:
      errors.UserError: an unknown version; what cannot be run as published, where `exact`.
    """
    if version not in VERSIONS:
        raise errors.unknown("version of AutoAttack", version, VERSIONS)
    if classes < 2:
        raise errors.UserError(f"the model has {classes} class: AutoAttack needs at least 2.")
    targets = min(5 if norm is norms.L1 and version == "standard" else TARGETS, classes - 1)
    restarts = {"standard": 5 if norm is norms.L1 else 1, "plus": 5, "rand": 1}[version]
    ball = {"epsilon": epsilon, "norm": norm}
    climb = {**ball, "stop_on_success": not exact}
    # FAB seeks the nearest success; within the ball any is near enough.
    near = {**ball, "end_early": not exact}
    build = {
        "apgd_ce": lambda: apgd.apgd_ce(**climb, restarts=restarts),
        "apgd_dlr": lambda: apgd.apgd_dlr(**climb, restarts=restarts),
        "apgd_t": lambda: apgd.apgd_t(**climb, targets=targets),
        "fab": lambda: fab.fab(**near, restarts=5, candidates=classes if exact else min(CANDIDATES, classes)),
        "fab_t": lambda: fab.fab_t(**near, targets=min(TARGETS, classes - 1)),
        "square": lambda: square.square(**ball, queries=5000, rescale=False),
    }
    order = {
        "standard": ("apgd_ce", "apgd_t", "fab_t", "square"),
        "plus": ("apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"),
        "rand": ("apgd_ce", "apgd_dlr"),
    }[version]
    notes = []
    for name, least in (("apgd_dlr", 3), ("apgd_t", 4)):
        if name in order and classes < least:
            notes.append(
                f"the model has {classes} classes and the loss of {name} needs {least}: it climbs the margin instead"
            )
            starts = targets if name == "apgd_t" else restarts
            build[name] = functools.partial(apgd.apgd, **climb, loss="margin", restarts=starts)
    if norm is norms.L1:
        notes.append("Square is not defined for L1 here: it is left out")
        order = tuple(name for name in order if name != "square")
    if notes and exact:
        raise errors.UserError(
            f"{'; '.join(notes)}. The published suite (exact=True) cannot be run here: set exact=False."
        )
    return {name: build[name]() for name in order}, tuple(notes)


def auto_attack(
    model: skeleton.Model,
    examples: Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]],
    *,
    threat: str | threats.ThreatModel | None = None,
    epsilon: float | None = None,
    norm: str | norms.Norm | None = None,
    version: str = "standard",
    attacks: Mapping[str, skeleton.Attack] | None = None,
    exact: bool = False,
    individual: bool = False,
    slots: int = 64,
    stride: int | None = None,
    seed: int = 0,
    directory: pathlib.Path | str | None = None,
    mesh: Mesh | None = None,
) -> SuiteResult:
    """Runs a sequence of attacks, each on the examples that are still classified correctly.

    Only `slots` examples are on the device at any time; with a stream of batches, so much and one batch are in memory.

    Args:
      model: canonical pixels to logits; for the version `rand` a stochastic one.
      examples: as in `robust_vit.attacks.run`; a stream must be iterable again for each attack: a list or an object with
        `__iter__`, not a generator.
      threat: the threat model or its name, in place of `epsilon` and `norm`.
      epsilon: radius in pixel units [0, 1].
      norm: of the ball.
      version: `standard`, `plus` or `rand`; see `members`.
      attacks: other attacks by name, in their order, in place of a version's. A minimal attack succeeds within epsilon.
      exact: the published budgets to the last step, at the cost of passes that hardly change a decision; see `members`.
      individual: every attack on all examples that the model gets right, so that attacks can be compared.
      slots: examples attacked at a time, at most: an attack that meets few takes fewer, of a few sizes that each compile it.
      stride: steps between two looks at what is finished; None as in `robust_vit.attacks.run`.
      seed: of the draws, which depend on it and the row alone.
      directory: where finished examples are saved: a killed suite goes on from there, within an attack too. The same call
        with other examples, model or settings is refused.
      mesh: devices that share the slots.

    Raises:
      errors.UserError: what `robust_vit.attacks.run` and `members` refuse; a stream that can be read only once; `exact` with
        `attacks`.
    """
    radius, norm = arguments.ball(epsilon, norm, threat)
    if attacks is not None and exact:
        raise errors.UserError(
            "exact=True asks for a version as published, and attacks= gives others: give one of them."
        )
    if isinstance(examples, Iterator):
        raise errors.UserError(
            "the examples are an iterator, which can be read only once: give a list of batches, or an object that is iterable "
            "again."
        )
    batches = [examples] if isinstance(examples, Mapping) else examples
    notes: tuple[str, ...] = ()
    if attacks is None:
        first = next(iter(batches))["image"]
        model = asked(model, version)
        classes = evaluation.count_classes(model, np.shape(first))
        attacks, notes = members(version, epsilon=float(radius), norm=norm, classes=classes, exact=exact)
    options = {"stride": stride, "seed": seed, "mesh": mesh}

    def attempt(attack: skeleton.Attack, name: str, chosen: Any, size: int) -> runner.RunResult:
        folder = None if directory is None else pathlib.Path(directory) / name
        return runner.run(attack, model, _Chosen(batches, chosen), directory=folder, slots=size, **options)

    clean = attempt(_Clean(norm=norm), "clean", None, slots)
    correct = ~clean.success
    _logger.info("clean accuracy %.2f %% of %d images", 100 * correct.mean(), len(correct))
    shape = (len(correct), len(attacks))
    attempted, success = np.zeros(shape, bool), np.zeros(shape, bool)
    distance = np.full(shape, np.nan, np.float32)
    passes = np.zeros((2, *shape), np.int32)
    log = []
    for column, (name, attack) in enumerate(attacks.items()):
        standing = correct if individual else correct & ~success.any(axis=1)
        attempted[:, column] = standing
        started = time.monotonic()
        line = {"attack": name, "attempted": int(standing.sum()), "fell": 0, "executed": 0, "useful": 0}
        if standing.any():
            size = _shared(int(standing.sum()), slots, 1 if mesh is None else mesh.size)
            found = attempt(attack, f"{column}_{name}", standing, size)
            success[standing, column] = found.success & norms.within(found.distance, float(radius))
            distance[standing, column] = found.distance
            passes[:, standing, column] = found.forward_passes, found.backward_passes
            line["fell"] = int(success[:, column].sum())
            line["executed"] = found.executed_forward_passes + found.executed_backward_passes
            line["useful"] = int(passes[:, :, column].sum())
        line["robust_accuracy"] = float((correct & ~success.any(axis=1)).mean())
        line["seconds"] = time.monotonic() - started
        log.append(line)
        _logger.info(
            "%s: %d of %d fell, robust accuracy %.2f %% (%.1f s, %d passes, %.0f %% of them useful)",
            name,
            line["fell"],
            line["attempted"],
            100 * line["robust_accuracy"],
            line["seconds"],
            line["executed"],
            100 * line["useful"] / max(1, line["executed"]),
        )
    return SuiteResult(
        names=tuple(attacks),
        epsilon=float(radius),
        row=clean.row,
        label=clean.label,
        correct=correct,
        attempted=attempted,
        success=success,
        distance=distance,
        forward_passes=passes[0],
        backward_passes=passes[1],
        log=tuple(log),
        notes=notes,
    )


def asked(model: skeleton.Model, version: str) -> skeleton.Model:
    """The model as a version evaluates it: `rand` with 20 draws, the others as it is.

    Raises:
      errors.UserError: `rand` of a deterministic model.
    """
    if version != "rand":
        return model
    if not getattr(model, "stochastic", False):
        raise errors.UserError(
            "AutoAttack rand is for stochastic models: use version='standard' for a deterministic one."
        )
    if isinstance(model, expectations.Expectation):
        return model.replace(draws=SAMPLES)
    return expectations.expectation(model, samples=SAMPLES)


def programs(
    attacks: Mapping[str, skeleton.Attack],
    model: skeleton.Model,
    images: jax.ShapeDtypeStruct,
    *,
    examples: int,
    stride: int | None = None,
) -> list[compiled.Program]:
    """The compiled programs of `auto_attack` with how often each runs at most, for planning. Arguments as there, and

    Args:
      images: the shape of all slots; an attack that meets few images runs the same programs with fewer.
      examples: how many there are.
    """
    norm = next(iter(attacks.values())).norm
    found = []
    for name, attack in {"clean": _Clean(norm=norm), **attacks}.items():
        for program in runner.programs(attack, model, images, examples=examples, stride=stride):
            found.append(dataclasses.replace(program, name=f"{name}: {program.name}"))
    return found


def _shared(count: int, slots: int, devices: int) -> int:
    """The slots of an attack on `count` examples: at most `slots`, those of a few sizes that make the rounds cheapest.

    Those that are left take all steps together, so that idle slots of the last round would cost what busy ones do. Every size
    compiles every attack anew, so that a suite over many chunks may have few: powers of two a device, and three quarters of
    them, without which few images on a CPU cost 8 % more. None is odd, since odd ones cost a sixth more (13 images against 12, 14
    and 16, ViT on two cores, measured).
    """
    dearer = _DEARER[compiled.backend()]
    doubled = [devices * 2**power for power in range((slots // devices).bit_length())]
    sizes = {slots, *doubled, *(3 * size // 4 for size in doubled if size >= 8 * devices)}
    return min(
        sorted(sizes, reverse=True),
        key=lambda size: -(-count // size) * size * dearer ** math.log2(slots / size),
    )


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """A stream of batches in which all but the chosen examples are masked out.

    Attributes:
      batches: iterable again and again.
      chosen: one truth for each example that the stream does not mask, or None for all.
    """

    batches: Iterable[Mapping[str, np.ndarray]]
    chosen: Bool[np.ndarray, " examples"] | None

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        position = 0
        for batch in self.batches:
            count = len(batch["label"])
            mask = np.asarray(batch["mask"], bool) if "mask" in batch else np.ones(count, bool)
            # The row is the position that the example has without the mask, so that its draws stay the same.
            rows = np.array(batch["row"] if "row" in batch else np.zeros(count), np.int64)
            if "row" not in batch:
                rows[mask] = position + np.arange(mask.sum())
            kept = mask.copy()
            if self.chosen is not None:
                kept[mask] = self.chosen[position : position + mask.sum()]
            position += int(mask.sum())
            if kept.any():
                yield {**batch, "mask": kept, "row": rows}
