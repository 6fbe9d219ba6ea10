"""One run: its configuration made into data, model, objective and optimiser, and what comes back from its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
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
    processes,
    programs,
    settings,
    studies,
)
from robust_vit.training import optimizers, schedules
from robust_vit.training import state as train_state
from robust_vit.training import step as train_step

PyTree = Any
BEST_METRIC = "accuracy"  # On the validation split; decides which checkpoint is the best.
IDENTITY_FILE = "training.json"  # The keys that decided what was trained.


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
      warmup: steps of the warm-up.
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
    warmup: int = 0

    @functools.cached_property
    def milestones(self) -> frozenset[int]:
        """The steps whose checkpoints are kept for ever: `config.checkpoint.milestones`."""
        return _milestones(
            tuple(self.config.checkpoint.milestones),
            steps=self.steps,
            warmup=self.warmup,
            epoch=self.bundle.train.steps_per_epoch,
        )

    def fresh_state(self) -> train_state.TrainState:
        """Initial parameters and optimiser state, compiled as one program; `replicas` seeds of them where asked.

        Every device computes only what it will hold: a state that does not fit one device never lies on one.
        """
        return jax.jit(self._fresh_state, out_shardings=self.state_sharding())(self.keys("init"))

    def abstract_state(self) -> train_state.TrainState:
        """The shapes and shardings of the state, without compute."""
        return self._abstract_state

    @functools.cached_property
    def _abstract_state(self) -> train_state.TrainState:
        shapes = jax.eval_shape(self._fresh_state, self.keys("init"))
        placed = mesh.Rules(tuple(self.config.sharding_rules)).place(self.mesh, shapes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
        )

    def state_sharding(self) -> train_state.TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

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

    def abstract_classifier(self) -> classifier.Classifier:
        """The trained model with shapes in place of arrays, placed as they will be: what programs are planned with."""
        state = self.abstract_state()
        if self.replicas is None:
            return self.classifier(state)

        def first(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=leaf.sharding)

        variables = jax.tree.map(first, train_state.variables(state))
        return classifier.Classifier(variables=variables, module=self.module, spec=self.spec)

    def _fresh_state(self, keys: jax.Array) -> train_state.TrainState:
        metrics = (*self.objective().metrics, *train_step.STEP_METRICS)
        average = self.config.train.average_decay is not None

        def one(key):
            variables = models.init(self.module, self.spec, key)
            return train_state.create(variables, self.optimizer, metrics=metrics, average=average)

        if not keys.shape:
            return one(keys)
        states = jax.vmap(one)(keys)
        return states._replace(step=states.step[0], window=states.window[0])


def prepare(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | str,
    name: str = "main",
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Setup:
    """Opens the data and builds the model of one run; refuses what cannot work before any compute is spent.

    Args:
      config: a resolved configuration (`settings.resolve`).
      workdir: where all runs live.
      name: of this run.
      devices: that share the work; None is all of them.

    Raises:
      errors.UserError: unknown names, data that is not there, a workdir that was trained with another configuration.
    """
    settings.check_names(config)
    folder = pathlib.Path(workdir) / name
    _check_workdir(config, folder)
    settings.build_studies(config)
    with processes.first_alone():
        bundle = data.load({**config.data.to_dict(), "seed": config.seed})
    options = config.model.to_dict()
    for key in ("init", "init_reset"):
        options.pop(key, None)
    module = models.build(options.pop("name"), num_classes=bundle.num_classes, **options)
    steps = config.train.steps or max(round(config.train.epochs * bundle.train.steps_per_epoch), 1)
    optimizer_options = config.optimizer.to_dict()
    reference_batch = optimizer_options.pop("reference_batch") or config.data.batch
    warmup = min(int(optimizer_options.pop("warmup_epochs") * bundle.train.steps_per_epoch), steps // 2)
    schedule = schedules.build(
        optimizer_options.pop("schedule"),
        peak=optimizer_options.pop("learning_rate") * config.data.batch / reference_batch,
        steps=steps,
        warmup=warmup,
        final=optimizer_options.pop("final"),
        boundaries=optimizer_options.pop("boundaries"),
        factor=optimizer_options.pop("factor"),
    )
    optimizer = optimizers.build(optimizer_options.pop("name"), learning_rate=schedule, **optimizer_options)
    shared = mesh.make(devices, sharding=config.sharding)
    mesh.check_batch(shared, config.data.batch, name="data.batch")
    mesh.check_batch(shared, config.data.eval_batch, name="data.eval_batch")
    parts = config.train.accumulate
    if parts != programs.AUTO and (not isinstance(parts, int) or parts < 1 or config.data.batch % parts):
        raise errors.UserError(
            f"train.accumulate={parts!r} does not divide data.batch={config.data.batch}: choose a divisor, or 'auto'."
        )
    replicas = config.replicas if config.replicas > 1 else None
    setup = Setup(config, folder, bundle, module, bundle.spec, shared, schedule, optimizer, steps, replicas, warmup)
    setup.abstract_state()  # Refuses sharding rules that fit nothing,
    _ = setup.milestones  # and this what is no step.
    return setup


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
        preferred = keeper.best_step() if which == "best" else None
        restored = keeper.restore(setup.abstract_state(), preferred=preferred)
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
        found[name] = subject(setup, setup.classifier(state, replica), name, history(setup, replica, until=step))
    return found, step


def history(setup: Setup, replica: int = 0, *, until: int) -> dict[int, studies.Snapshot]:
    """What is kept of a run's training before a step: its milestones on the disk, and those that it has yet to pass.

    Args:
      setup: what `prepare` returned.
      replica: which of the seeds.
      until: milestones before this step.
    """
    folder = setup.folder / "checkpoints"
    passed = processes.first_finds(lambda: max(checkpoints.steps(folder), default=0))
    found = {*checkpoints.milestones(folder), *(step for step in setup.milestones if step > passed)}
    chosen = None if setup.replicas is None else replica
    return {
        step: studies.Snapshot(functools.partial(_past_variables, setup, step, chosen))
        for step in sorted(found)
        if step < until
    }


def _past_variables(setup: Setup, step: int, replica: int | None) -> PyTree:
    variables = _variables_at(setup, step)
    return variables if replica is None else train_state.replica(variables, replica)


@functools.lru_cache(maxsize=1)  # A study reads the same one for each of its chunks.
def _variables_at(setup: Setup, step: int) -> PyTree:
    restored = checkpoints.restore(setup.folder / "checkpoints", setup.abstract_state(), step=step)
    return train_state.variables(restored.state)


def subject(
    setup: Setup,
    model: classifier.Classifier,
    name: str,
    history: Mapping[int, Callable[[], Any]] | None = None,
) -> studies.Subject:
    """The model of a run, with the data and the history of that run, as studies want it."""
    config = setup.config
    return studies.Subject(
        classifier=model,
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
        mixing=_mixing(config.objective),
        seed=config.seed,
        mesh=setup.mesh,
        history=dict(history or {}),
        warmup=setup.warmup,
    )


def _mixing(objective: ml_collections.ConfigDict) -> dict[str, float]:
    found = {"mixup": objective.get("mixup", 0.0), "cutmix": objective.get("cutmix", 0.0)}
    return {**found, "switch": objective.get("mix_switch", 0.5)} if any(found.values()) else {}


def _milestones(asked: tuple, *, steps: int, warmup: int, epoch: int) -> frozenset[int]:
    """The steps that `checkpoint.milestones` names; none of them beyond the end of training.

    Raises:
      errors.UserError: an unknown word, or a number that is no step and no share.
    """
    words = {"warmup": [warmup] if warmup else [], "epochs": range(epoch, steps + 1, epoch)}
    found: set[int] = set()
    for entry in asked:
        if isinstance(entry, str):
            if entry not in words:
                raise errors.unknown("milestone", entry, words)
            found.update(words[entry])
        elif isinstance(entry, float) and 0.0 < entry < 1.0:
            found.add(max(round(entry * steps), 1))
        elif isinstance(entry, int) and not isinstance(entry, bool) and entry >= 1:
            found.add(entry)
        else:
            raise errors.UserError(
                f"checkpoint.milestones has {entry!r}: expected 'warmup', 'epochs', a step from 1, or a share of training "
                "between 0 and 1."
            )
    return frozenset(step for step in found if step <= steps)


def _check_workdir(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    path = folder / IDENTITY_FILE
    if not path.exists():
        return
    stored = settings.flatten(files.read_json(path))
    asked = settings.flatten(files.jsonable(settings.training_identity(config)))
    if asked["train.accumulate"] == programs.AUTO:
        asked["train.accumulate"] = stored.get("train.accumulate")  # What was chosen when the run began.
    differing = sorted(key for key in stored.keys() | asked.keys() if stored.get(key) != asked.get(key))
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise errors.UserError(
            f"{folder} was trained with {key}={stored.get(key)!r}, and {asked.get(key)!r} is asked for{more}: "
            "choose another --workdir, or the old value."
        )
