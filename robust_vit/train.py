"""Trains one run: data, model, objective and optimiser to checkpoints, killed and resumed without a trace.

The order of resumption: the run's own newest intact checkpoint, `config.resume`, `config.model.init`, scratch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from robust_vit import (
    checkpoints,
    classifier,
    data,
    errors,
    files,
    mesh,
    models,
    objectives,
    progress,
    settings,
    studies,
    trees,
)
from robust_vit.metrics import streaming
from robust_vit.models import weights
from robust_vit.training import optimizers, schedules
from robust_vit.training import state as train_state
from robust_vit.training import step as train_step

PyTree = Any
_logger = logging.getLogger(__name__)
BEST_METRIC = "accuracy"  # On the validation split; decides which checkpoint is the best.
_TRAINING_FILE = "training.json"


class Stopped(Exception):
    """Training was asked to stop and has saved where it was."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Everything that a run is made of, before any compute is spent.

    Attributes:
      config: the resolved configuration of this run.
      folder: `workdir/<run>`.
      bundle: the data streams.
      module: the Linen module.
      spec: what the module expects of an image.
      mesh: the devices.
      schedule: learning rate by step.
      optimizer: the Optax transformation.
      steps: length of training.
      replicas: seeds trained at once, or None for one.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    bundle: data.Bundle
    module: Any
    spec: classifier.ImageSpec
    mesh: Mesh
    schedule: Callable
    optimizer: Any
    steps: int
    replicas: int | None

    def fresh_state(self) -> train_state.TrainState:
        """Initial parameters and optimiser state, compiled as one program; `replicas` seeds of them where asked."""
        return _fresh_state(
            self.module, self.spec, _HashedById(self.optimizer), self._metrics(), self._average(), self.keys("init")
        )

    def abstract_state(self) -> PyTree:
        """The shapes of the state, without compute."""
        shapes = jax.eval_shape(self.fresh_state)
        sharding = mesh.replicated(self.mesh)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)

    def keys(self, purpose: str) -> jax.Array:
        """The key of a purpose: one, or one for each replica."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), ("init", "train").index(purpose))
        if self.replicas is None:
            return key
        return jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(self.replicas))

    def objective(self) -> train_step.Objective:
        """What is minimised."""
        options = self.config.objective.to_dict()
        return objectives.build(options.pop("name"), self.module, self.spec, **options)

    def classifier(self, state: train_state.TrainState, replica: int = 0) -> classifier.Classifier:
        """The trained model, the moving average of its parameters where one is kept."""
        variables = train_state.variables(state)
        if self.replicas is not None:
            variables = train_state.replica(variables, replica)
        return classifier.Classifier(variables=variables, module=self.module, spec=self.spec)

    def _metrics(self) -> tuple[str, ...]:
        return (*self.objective().metrics, *train_step.STEP_METRICS)

    def _average(self) -> bool:
        return self.config.train.average_decay is not None


def prepare(config: ml_collections.ConfigDict, workdir: pathlib.Path | str, name: str = "main") -> Setup:
    """Opens the data and builds the model of one run; refuses what cannot work before any compute is spent.

    Args:
      config: a resolved configuration (`settings.resolve`).
      workdir: where all runs live.
      name: of this run.

    Raises:
      errors.UserError: unknown names, data that is not there, a workdir that was trained with another configuration.
    """
    settings.check_names(config)
    folder = pathlib.Path(workdir) / name
    _check_workdir(config, folder)
    settings.build_studies(config)
    bundle = data.load({**config.data.to_dict(), "seed": config.seed})
    options = config.model.to_dict()
    for key in ("init", "init_reset"):
        options.pop(key, None)
    module = models.build(options.pop("name"), num_classes=bundle.num_classes, **options)
    steps = config.train.steps or max(round(config.train.epochs * bundle.train.steps_per_epoch), 1)
    optimizer_options = config.optimizer.to_dict()
    schedule = schedules.build(
        optimizer_options.pop("schedule"),
        peak=optimizer_options.pop("learning_rate"),
        steps=steps,
        warmup=min(int(optimizer_options.pop("warmup_epochs") * bundle.train.steps_per_epoch), steps // 2),
        final=optimizer_options.pop("final"),
        boundaries=optimizer_options.pop("boundaries"),
        factor=optimizer_options.pop("factor"),
    )
    optimizer = optimizers.build(optimizer_options.pop("name"), learning_rate=schedule, **optimizer_options)
    devices = mesh.make()
    mesh.check_batch(devices, config.data.batch, name="data.batch")
    mesh.check_batch(devices, config.data.eval_batch, name="data.eval_batch")
    if config.data.batch % config.train.accumulate:
        raise errors.UserError(
            f"train.accumulate={config.train.accumulate} does not divide data.batch={config.data.batch}: choose a divisor."
        )
    replicas = config.replicas if config.replicas > 1 else None
    return Setup(config, folder, bundle, module, bundle.spec, devices, schedule, optimizer, steps, replicas)


def train(setup: Setup, *, stop: Callable[[], bool] = lambda: False) -> None:
    """Trains to the last step, or from where an earlier call was cut off; does nothing where training is finished.

    Args:
      setup: what `prepare` returned.
      stop: polled before each step; True saves and raises `Stopped`.

    Raises:
      Stopped: the state is saved; the same call goes on.
      errors.UserError: a metric became non-finite (naming the step and the metric), no space is left.
    """
    config = setup.config
    files.write_json(setup.folder / _TRAINING_FILE, settings.training_identity(config))
    keeper = checkpoints.Checkpoints(setup.folder / "checkpoints", keep=config.checkpoint.keep, best=BEST_METRIC)
    with contextlib.closing(keeper):
        state = _starting_state(setup, keeper)
        start = int(state.step)
        if start >= setup.steps:
            _logger.info("%s: training is finished (step %d)", setup.folder.name, start)
            return
        log = progress.TrainingLog(setup.folder, total=setup.steps, batch=config.data.batch, start=start)
        with contextlib.closing(log):
            _loop(setup, keeper, state, start, log, stop)


def restore(setup: Setup, which: str) -> tuple[train_state.TrainState, int]:
    """The state of a finished or unfinished run and its step.

    Args:
      setup: what `prepare` returned.
      which: "best" on the validation split, or "last".

    Raises:
      errors.UserError: there is no checkpoint.
    """
    keeper = checkpoints.Checkpoints(setup.folder / "checkpoints", keep=setup.config.checkpoint.keep, best=BEST_METRIC)
    with contextlib.closing(keeper):
        step = keeper.best_step() if which == "best" else None
        damage = None if step is None else checkpoints.find_damage(setup.folder / "checkpoints" / str(step))
        if damage is not None:
            _logger.warning(
                "the best checkpoint, of step %d, is damaged (%s): taking the newest intact one", step, damage
            )
            step = None
        restored = keeper.restore(setup.abstract_state(), step=step)
    if restored is None:
        raise errors.UserError(f"no checkpoint in {setup.folder / 'checkpoints'}: train the run first.")
    return restored.state, restored.step


def subjects(setup: Setup) -> tuple[dict[str, studies.Subject], int]:
    """What studies look at: the trained model with its data, one entry for each replica, and the step of its checkpoint."""
    config = setup.config
    state, step = restore(setup, config.study_step)
    found = {}
    for replica in range(setup.replicas or 1):
        name = setup.folder.name if setup.replicas is None else f"{setup.folder.name}.seed{replica}"
        found[name] = studies.Subject(
            classifier=setup.classifier(state, replica),
            test=setup.bundle.test,
            validation=setup.bundle.validation,
            train=setup.bundle.train,
            num_classes=setup.bundle.num_classes,
            class_names=setup.bundle.class_names,
            name=name,
            image_source=setup.bundle.name,
            threat=config.threat or None,
            weight_decay=config.optimizer.weight_decay,
            label_smoothing=config.objective.get("label_smoothing", 0.0),
            seed=config.seed,
        )
    return found, step


def _loop(
    setup: Setup,
    keeper: checkpoints.Checkpoints,
    state: train_state.TrainState,
    start: int,
    log: progress.TrainingLog,
    stop: Callable[[], bool],
) -> None:
    config = setup.config
    step_function = _compiled_step(setup)
    keys = setup.keys("train")
    every = max(round(config.checkpoint.every_epochs * setup.bundle.train.steps_per_epoch), 1)
    trace = progress.Trace(setup.folder / "profile", start=start + config.profile.start, steps=config.profile.steps)
    batches = setup.bundle.train.iterate(start)
    _logger.info("%s: the first step compiles; that can take a minute", setup.folder.name)
    with (
        contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext(),
        contextlib.closing(trace),
    ):
        for step in range(start + 1, setup.steps + 1):
            if stop():
                _check_finite(state)
                keeper.save(step - 1, state)
                keeper.wait()
                raise Stopped(f"training stopped after step {step - 1} of {setup.steps}; it is saved.")
            trace.at(step)
            batch = next(batches)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                images = {"image": batch["image"], "label": batch["label"]}
                state = step_function(state, mesh.put_batch(setup.mesh, images), keys)
            last = step == setup.steps
            if step % config.log_every == 0 or last or step == start + 1:
                _check_finite(state)
            if step % config.log_every == 0 or last:
                log.train(step, _means(state), learning_rate=float(setup.schedule(step - 1)))
                state = train_state.reset_sums(state)
            if step % every == 0 or last:
                _check_finite(state)
                metrics = validate(setup, state)
                log.validation(step, metrics)
                keeper.save(step, state, metrics={name: float(np.mean(value)) for name, value in metrics.items()})
            elif config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0:
                _check_finite(state)
                keeper.save(step, state)
        keeper.wait()


def validate(setup: Setup, state: train_state.TrainState) -> dict[str, Any]:
    """Mean loss, top-1 and top-5 accuracy over the validation split; lists over replicas; empty without such a split."""
    if setup.bundle.validation is None:
        return {}
    variables = train_state.variables(state)
    replicas = range(setup.replicas) if setup.replicas else (None,)
    totals: list[streaming.Sums | None] = [None] * len(replicas)
    for batch in setup.bundle.validation.iterate():
        batch = mesh.put_batch(setup.mesh, {name: batch[name] for name in ("image", "label", "mask")})
        for index, replica in enumerate(replicas):
            chosen = variables if replica is None else train_state.replica(variables, replica)
            sums = _evaluate(classifier.Classifier(chosen, setup.module, setup.spec), batch)
            totals[index] = sums if totals[index] is None else totals[index].merge(sums)
    means = [total.means() for total in totals if total is not None]
    if not means:
        return {}
    return means[0] if setup.replicas is None else {name: [each[name] for each in means] for name in means[0]}


@jax.jit
def _evaluate(model: classifier.Classifier, batch: dict[str, jax.Array]) -> streaming.Sums:
    return streaming.classification(model(batch["image"]), batch["label"], batch["mask"])


def _compiled_step(setup: Setup) -> Callable:
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
        state_sharding=mesh.replicated(setup.mesh),
        batch_sharding=mesh.batched(setup.mesh),
    )


def _starting_state(setup: Setup, keeper: checkpoints.Checkpoints) -> train_state.TrainState:
    config = setup.config
    restored = keeper.restore(setup.abstract_state())
    if restored is None and config.resume:
        folder = pathlib.Path(config.resume) / "checkpoints"
        if not checkpoints.steps(folder):
            raise errors.UserError(f"resume={config.resume}: no checkpoint in {folder}; give the folder of a run.")
        restored = checkpoints.restore(folder, setup.abstract_state())
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
    return mesh.put_replicated(setup.mesh, state)


def _load_variables(path: str, setup: Setup, state: train_state.TrainState) -> PyTree:
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


def _check_workdir(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    path = folder / _TRAINING_FILE
    if not path.exists():
        return
    stored = settings.flatten(files.read_json(path))
    asked = settings.flatten(files.jsonable(settings.training_identity(config)))
    differing = sorted(key for key in stored.keys() | asked.keys() if stored.get(key) != asked.get(key))
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise errors.UserError(
            f"{folder} was trained with {key}={stored.get(key)!r}, and {asked.get(key)!r} is asked for{more}: "
            "choose another --workdir, or the old value."
        )


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


class _HashedById:
    """An optimiser as a static argument: its functions are closures, equal only to themselves."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def __hash__(self) -> int:
        return id(self.optimizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HashedById) and other.optimizer is self.optimizer


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _fresh_state(module, spec, optimizer: _HashedById, metrics, average, keys) -> train_state.TrainState:
    def one(key):
        return train_state.create(models.init(module, spec, key), optimizer.optimizer, metrics=metrics, average=average)

    if not keys.shape:
        return one(keys)
    states = jax.vmap(one)(keys)
    return states._replace(step=states.step[0], window=states.window[0])
