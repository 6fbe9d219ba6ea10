"""Trains one run: data, model, objective and optimiser to checkpoints, killed and resumed without a trace.

The order of resumption: the run's own newest intact checkpoint, `config.resume`, `config.model.init`, scratch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from robust_vit import (
    checkpoints,
    classifier,
    errors,
    files,
    mesh,
    processes,
    programs,
    progress,
    runs,
    settings,
    trees,
)
from robust_vit.metrics import streaming
from robust_vit.models import weights
from robust_vit.training import optimizers
from robust_vit.training import state as train_state
from robust_vit.training import step as train_step

PyTree = Any
_logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Training was asked to stop and has saved where it was."""


def settle(setup: runs.Setup, *, limit: int | None = None) -> runs.Setup:
    """The set-up with a number in place of `train.accumulate="auto"`.

    The number that the run was begun with, else the smallest power of two for which the step fits in the memory of a device: of
    several processes, the device that has least.

    Args:
      setup: what `runs.prepare` returned.
      limit: bytes that the step may take on a device; None is what these processes have.

    Raises:
      errors.UserError: single images do not fit either.
    """
    if setup.config.train.accumulate != programs.AUTO:
        return setup
    batch, size = setup.config.data.batch, setup.mesh.size
    path = setup.folder / runs.IDENTITY_FILE
    begun = processes.first_finds(lambda: files.read_json(path)["train"]["accumulate"] if path.exists() else 0)
    if begun:
        return _cut(setup, begun)
    candidates = [2**n for n in range(batch.bit_length()) if batch % (2**n * size) == 0]
    if len(candidates) == 1:
        return _cut(setup, 1)
    if limit is None:
        limit = processes.least(programs.usable_memory())
    parts = programs.choose(
        candidates, lambda parts: [step_program(_cut(setup, parts))], what="train.accumulate", limit=limit
    )
    return _cut(setup, parts)


def _cut(setup: runs.Setup, parts: int) -> runs.Setup:
    config = ml_collections.ConfigDict(setup.config.to_dict())
    with config.ignore_type():
        config.train.accumulate = parts
    return dataclasses.replace(setup, config=config.lock())


def step_program(setup: runs.Setup) -> programs.Program:
    """The training step with the shapes that it is called with: lowered and compiled without data, parameters or compute."""
    shapes = {
        "image": ((setup.config.data.batch, *setup.bundle.train.image_shape), np.float32),
        "label": ((setup.config.data.batch,), np.int32),
    }
    sharding = mesh.batched(setup.mesh)
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}
    keys = jax.eval_shape(lambda: setup.keys("train"))
    state = setup.abstract_state()
    return programs.Program("training step", _compiled_step(setup), (state, batch, keys), times=setup.steps, carry=0)


def validation_program(setup: runs.Setup) -> programs.Program | None:
    """The evaluation of a validation batch with its shapes, as often as the whole of training calls it; None without a split."""
    stream = setup.bundle.validation
    if stream is None:
        return None
    sharding = mesh.batched(setup.mesh)
    shapes = {
        "image": ((stream.batch_size, *stream.image_shape), np.float32),
        "label": ((stream.batch_size,), np.int32),
        "mask": ((stream.batch_size,), np.bool_),
    }
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}
    times = math.ceil(setup.steps / _validate_every(setup)) * len(stream) * (setup.replicas or 1)
    return programs.Program("validation", _evaluate, (setup.abstract_classifier(), batch), times=times)


def train(setup: runs.Setup, *, stop: Callable[[], bool] = lambda: False) -> None:
    """Trains to the last step, or from where an earlier call was cut off; does nothing where training is finished.

    Args:
      setup: what `prepare` returned.
      stop: polled before each step, by every process alike; True saves and raises `Stopped`.

    Raises:
      Stopped: the state is saved; the same call goes on.
      errors.UserError: a metric became non-finite (naming the step and the metric), no space is left.
    """
    with mesh.context(setup.mesh):
        _train(setup, stop)


def _train(setup: runs.Setup, stop: Callable[[], bool]) -> None:
    config = setup.config
    identity = setup.folder / runs.IDENTITY_FILE
    processes.first_does(lambda: files.write_json(identity, settings.training_identity(config)))
    keeper = checkpoints.Checkpoints(setup.folder / "checkpoints", keep=config.checkpoint.keep, best=runs.BEST_METRIC)
    with contextlib.closing(keeper):
        state = _starting_state(setup, keeper)
        start = int(state.step)
        window = {"start": start + config.profile.start, "steps": config.profile.steps, "last": setup.steps}
        trace = progress.Trace(setup.folder / "profile", **window)
        if start >= setup.steps:
            _logger.info("%s: training is finished (step %d)", setup.folder.name, start)
            return
        log = progress.TrainingLog(setup.folder, total=setup.steps, batch=config.data.batch, start=start)
        with contextlib.closing(log), contextlib.closing(trace):
            _loop(setup, keeper, state, log, trace, stop)


def _loop(
    setup: runs.Setup,
    keeper: checkpoints.Checkpoints,
    state: train_state.TrainState,
    log: progress.TrainingLog,
    trace: progress.Trace,
    stop: Callable[[], bool],
) -> None:
    config, start = setup.config, int(state.step)
    step_function = _compiled_step(setup)
    reset_sums = jax.jit(train_state.reset_sums, donate_argnums=0, out_shardings=setup.state_sharding())
    keys = setup.keys("train")
    every = _validate_every(setup)
    batches = setup.bundle.train.of_process(jax.process_index(), jax.process_count()).on_devices(setup.mesh, start)
    _logger.info("%s: the first step compiles; that can take a minute", setup.folder.name)
    with contextlib.closing(batches):
        for step in range(start + 1, setup.steps + 1):
            if stop():
                _check_finite(state)
                keeper.save(step - 1, state)
                keeper.wait()
                raise Stopped(f"training stopped after step {step - 1} of {setup.steps}; it is saved.")
            trace.at(step, state)
            batch = next(batches)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state = _in_turn(step_function(state, batch, keys))
            last, milestone = step == setup.steps, step in setup.milestones
            if last:
                trace.at(step + 1, state)
            if step % config.log_every == 0 or last or step == start + 1:
                _check_finite(state)
            if step % config.log_every == 0 or last:
                log.train(step, _means(state), learning_rate=float(setup.schedule(step - 1)))
                state = reset_sums(state)
            if step % every == 0 or last:
                _check_finite(state)
                metrics = validate(setup, state)
                log.validation(step, metrics)
                means = {name: float(np.mean(value)) for name, value in metrics.items()}
                keeper.save(step, state, metrics=means, milestone=milestone)
            elif milestone or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
                _check_finite(state)
                keeper.save(step, state, milestone=milestone)
        keeper.wait()


def validate(setup: runs.Setup, state: train_state.TrainState) -> dict[str, Any]:
    """Mean loss, top-1 and top-5 accuracy over the validation split; lists over replicas; empty without such a split."""
    if setup.bundle.validation is None:
        return {}
    variables = train_state.variables(state)
    replicas = range(setup.replicas) if setup.replicas else (None,)
    totals: list[streaming.Sums | None] = [None] * len(replicas)
    stream = setup.bundle.validation.of_process(jax.process_index(), jax.process_count())
    for batch in stream.on_devices(setup.mesh):
        for index, replica in enumerate(replicas):
            chosen = variables if replica is None else train_state.replica(variables, replica)
            sums = _in_turn(_evaluate(classifier.Classifier(chosen, setup.module, setup.spec), batch))
            totals[index] = sums if totals[index] is None else totals[index].merge(sums)
    means = [total.means() for total in totals if total is not None]
    if not means:
        return {}
    return means[0] if setup.replicas is None else {name: [each[name] for each in means] for name in means[0]}


@jax.jit
def _evaluate(model: classifier.Classifier, batch: dict[str, jax.Array]) -> streaming.Sums:
    return streaming.classification(model(batch["image"]), batch["label"], batch["mask"])


def _in_turn(result: PyTree) -> PyTree:
    """What a program returned; waited for between CPU processes, whose collectives may hang when programs pile up.

    Measured with several devices a process: of nine runs that did not wait, one came to its end.
    """
    return jax.block_until_ready(result) if processes.several() and jax.default_backend() == "cpu" else result


def _validate_every(setup: runs.Setup) -> int:
    return max(round(setup.config.checkpoint.every_epochs * setup.bundle.train.steps_per_epoch), 1)


def _compiled_step(setup: runs.Setup) -> Callable:
    config = setup.config
    step = train_step.build(
        setup.objective(),
        setup.optimizer,
        gradient_function=optimizers.takes_gradient_function(config.optimizer.name),
        accumulate=config.train.accumulate,
        average_decay=config.train.average_decay,
    )
    return train_step.compile_step(
        step,
        replicas=setup.replicas,
        state_sharding=setup.state_sharding(),
        batch_sharding=mesh.batched(setup.mesh),
    )


def _starting_state(setup: runs.Setup, keeper: checkpoints.Checkpoints) -> train_state.TrainState:
    config = setup.config
    restored = keeper.restore(setup.abstract_state())
    if restored is None and config.resume:
        folder = pathlib.Path(config.resume) / "checkpoints"
        restored = checkpoints.restore(folder, setup.abstract_state())
        if restored is None:
            raise errors.UserError(f"resume={config.resume}: no checkpoint in {folder}; give the folder of a run.")
    if restored is not None:
        _logger.info("%s: going on from step %d of %d", setup.folder.name, restored.step, setup.steps)
        return restored.state
    state = setup.fresh_state()
    optimizers.check_decay_pattern(config.optimizer.decay_pattern, state.params)
    if config.model.get("init"):
        loaded = _load_variables(config.model.init, setup, state)
        state = state._replace(params=loaded["params"], model_state={k: v for k, v in loaded.items() if k != "params"})
        if state.average is not None:
            state = state._replace(average=jax.tree.map(lambda leaf: leaf.copy(), state.params))
    overview = parameter_overview.count_parameters(state.params) // (setup.replicas or 1)
    _logger.info("%s: %s parameters, %d steps", setup.folder.name, f"{overview:,}", setup.steps)
    return mesh.put(state, setup.state_sharding())


def _load_variables(path: str, setup: runs.Setup, state: train_state.TrainState) -> PyTree:
    variables = {"params": state.params, **state.model_state}
    reset = setup.config.model.get("init_reset") or None
    if setup.replicas is not None:
        raise errors.UserError(
            "model.init with replicas > 1: every seed would start from the same weights; use replicas=1."
        )
    if pathlib.Path(path).is_dir():
        raw = checkpoints.read_variables(pathlib.Path(path) / "checkpoints")
        arrays = dict(zip(trees.paths(raw), map(np.asarray, jax.tree.leaves(raw)), strict=True))
        return weights.fit(arrays, variables, reset=reset, source=path)
    return weights.load_weights(path, variables, reset=reset)


def _check_finite(state: train_state.TrainState) -> None:
    bad = {name: int(np.min(step)) for name, step in jax.device_get(state.first_bad_step).items()}
    name = min(bad, key=bad.get)
    if bad[name] != train_state.NEVER:
        raise errors.UserError(
            f"{name} is not finite at step {bad[name]}: lower optimizer.learning_rate, set optimizer.clip=1.0, or warm up "
            "longer; the checkpoints before it are kept."
        )


def _means(state: train_state.TrainState) -> dict[str, Any]:
    window = max(int(state.window), 1)
    return {
        name: (np.asarray(value, np.float64) / window).tolist() for name, value in jax.device_get(state.sums).items()
    }
