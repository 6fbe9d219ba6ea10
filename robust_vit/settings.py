"""The configuration: every key with its default, and how the runs of a workdir are resolved.

A file in `configs/` starts from `default()`, which is locked: an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from robust_vit import errors, models, registry, studies
from robust_vit.training import optimizers, schedules

# Keys that do not change what is trained: a workdir may be continued with other values of them.
FREE_KEYS = (
    "studies", "threat", "runs", "log_every", "profile", "checkpoint", "study_step", "resume", "sharding", "sharding_rules",
)  # fmt: skip
FREE_DATA_KEYS = ("data_dir", "test_split", "test_limit", "eval_batch", "cache", "workers")

_TYPES = {"tuple": tuple, "int": int, "float": float, "str": str, "bool": bool}


def default() -> ml_collections.ConfigDict:
    """Every key of a configuration, locked."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # Of initialisation, data order, augmentation and every draw of a study.
    config.replicas = 1  # Seeds trained at once under one vmap; more than 1 gives intervals over seeds.
    config.runs = ml_collections.ConfigDict()  # Name -> overrides of the keys below; empty: one run named "main".
    config.threat = ""  # Threat model that attacks default to, for example "fashion_mnist/linf-0.1".
    config.study_step = "best"  # Which checkpoint studies read: "best" on the validation split, or "last".
    config.resume = ""  # Run folder whose newest checkpoint this run starts from, where it has none of its own.
    config.log_every = 50  # Steps.
    # Where parameters live: "data" (whole on every device), "fsdp" (split over all), "fsdp=N" (split over groups of N).
    config.sharding = "data"
    config.sharding_rules = ()  # Pairs (pattern, axis) that come before the default, see `mesh.Rules`.

    config.data = ml_collections.ConfigDict()
    config.data.name = "textured_shapes/aligned"  # TFDS name or folder, "textured_shapes/...", "folder=PATH".
    config.data.data_dir = ml_collections.config_dict.placeholder(str)  # Where data sets live; None: their usual place.
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.validation = 0.1  # Share of the training rows, chosen by hash.
    config.data.split_seed = 0  # Of that hash; one value for all seeds, so that runs share their validation rows.
    config.data.options = ml_collections.ConfigDict()  # Of the source, for example size=64 for textured_shapes.
    config.data.image_size = ml_collections.config_dict.placeholder(
        int
    )  # Pixels that the model runs at; None: the data's.
    config.data.channels = ml_collections.config_dict.placeholder(int)  # Of the model's input; None: the data's.
    config.data.augment = ("pad_crop(4)", "flip()")  # Training transforms, in order.
    config.data.preprocess = ()  # Of all images; a leading random_resized_crop in augment takes their place.
    config.data.mean = (0.5,)  # Subtracted inside the classifier, one value or one a channel, pixels in [0, 1].
    config.data.std = (0.5,)  # Divided by.
    config.data.on_bad_image = "raise"  # Or "skip": up to 1 % of the files.
    config.data.on_mode = ml_collections.config_dict.placeholder(
        str
    )  # Grey or transparent files: "error" or "convert".
    config.data.cache = "auto"  # Images in memory: "auto" (up to 2 GiB), "always", "never", or "device" as well.
    config.data.workers = ml_collections.config_dict.placeholder(int)  # Threads that read; None: one a core.
    config.data.train_limit = ml_collections.config_dict.placeholder(
        int
    )  # Train on so many rows, chosen by hash; None: all.
    config.data.test_limit = ml_collections.config_dict.placeholder(int)  # The first so many test rows; None: all.
    config.data.batch = 128
    config.data.eval_batch = 256

    config.model = model("vit", width=64, depth=4, heads=4, patch=4)
    config.objective = ml_collections.ConfigDict({"name": "supervised", "label_smoothing": 0.0})
    config.objective.mixup = 0.0  # Parameter of the beta distribution; 0: off.
    config.objective.cutmix = 0.0  # The same.
    config.objective.mix_switch = 0.5  # Probability of cutmix where both are on.

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # adamw, sgd, lamb, sam.
    config.optimizer.learning_rate = 1e-3  # The peak.
    config.optimizer.reference_batch = ml_collections.config_dict.placeholder(
        int
    )  # That peak is for this batch, else scaled.
    config.optimizer.schedule = "cosine"  # cosine, linear, step, constant.
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.final = 0.0  # Learning rate at the end, as a share of the peak.
    config.optimizer.boundaries = (0.3, 0.6, 0.9)  # Of the step schedule, as shares of training.
    config.optimizer.factor = 0.1  # Of the step schedule.
    config.optimizer.weight_decay = 0.05
    config.optimizer.decay_pattern = r"kernel$"  # Parameters that decay, by regular expression over their paths.
    config.optimizer.clip = ml_collections.config_dict.placeholder(float)  # Largest gradient norm.
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.base = "sgd"  # The optimiser under SAM.
    config.optimizer.rho = 0.05  # SAM's radius.

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 10.0
    config.train.steps = ml_collections.config_dict.placeholder(int)  # Takes precedence over epochs.
    # Parts that a batch is cut into to save memory; "auto": as few as let the step fit.
    config.train.accumulate = ml_collections.config_dict.FieldReference(1, field_type=object)
    config.train.average_decay = ml_collections.config_dict.placeholder(float)  # Of the moving average of parameters.

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1.0  # Validate and save.
    config.checkpoint.every_steps = ml_collections.config_dict.placeholder(int)  # Save in between as well.
    config.checkpoint.keep = 2  # Newest checkpoints kept, beside the best.
    # Kept for ever, and what studies see of a run's history: "warmup" is the last step of the warm-up, "epochs" the last of each
    # epoch, a whole number that step, a number below one that share of training.
    config.checkpoint.milestones = ("warmup",)

    config.profile = ml_collections.ConfigDict()
    config.profile.start = 10  # First step of the trace, counted from where this process begins.
    config.profile.steps = 0  # Length of the trace; 0 writes none. `python -m robust_vit.profile RUN` reads it.

    config.studies = ml_collections.ConfigDict()  # Label -> study and its settings, see `study`.
    return config.lock()


def model(name: str, **options: Any) -> ml_collections.ConfigDict:
    """The `model` part of a configuration with every option of that model, so that each can be overridden.

    Args:
      name: a key of `models.MODELS`.
      **options: the options that differ from the model's defaults; also `init`, a path to weights (`.npz`) or a run
        folder, and `init_reset`, a pattern of the variables that start anew all the same (`"^params/head/"`).
    """
    part = ml_collections.ConfigDict({"name": name, "init": "", "init_reset": ""})
    parameters = inspect.signature(registry.find("model", name, models.MODELS)).parameters.values()
    _fill(
        part,
        f"option of model {name!r}",
        [(p.name, p.default, p.annotation) for p in parameters],
        options,
        {"num_classes"},
    )
    return part.lock()


def study(name: str, **options: Any) -> ml_collections.ConfigDict:
    """One entry of `studies` with every setting of that study, so that each can be overridden."""
    part = ml_collections.ConfigDict({"name": name})
    fields = dataclasses.fields(registry.find("study", name, studies.STUDIES))
    _fill(part, f"option of study {name!r}", [(f.name, f.default, f.type) for f in fields], options, set())
    return part.lock()


def resolve(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The configuration of each run of a workdir: the common keys with the overrides of `config.runs`.

    An override of `model` or `objective` that names another one replaces it whole.

    Raises:
      errors.UserError: an override of an unknown key, naming the nearest; a run name that is no folder name.
    """
    resolved = {}
    runs = config.runs.to_dict() or {"main": {}}
    for name, overrides in runs.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == "report":
            raise errors.UserError(f"run name {name!r}: use letters, digits, '_', '.' and '-', and not 'report'.")
        run = ml_collections.ConfigDict(config.to_dict(preserve_field_references=False))
        del run["runs"]
        _override(run, overrides, path=f"runs.{name}")
        resolved[name] = run.lock()
    return resolved


def training_identity(run: ml_collections.ConfigDict) -> dict[str, Any]:
    """The keys of a run that decide what is trained, as plain JSON-able values."""
    identity = {key: value for key, value in run.to_dict().items() if key not in FREE_KEYS}
    identity["data"] = {key: value for key, value in identity["data"].items() if key not in FREE_DATA_KEYS}
    return identity


def build_studies(run: ml_collections.ConfigDict) -> dict[str, studies.Study]:
    """The studies of a run by label, in the order of the configuration."""
    built = {}
    for label, entry in run.studies.items():
        options = entry.to_dict()
        built[label] = studies.build(options.pop("name", label), **options)
    return built


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b.c` -> value."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def check_names(run: ml_collections.ConfigDict) -> None:
    """Refuses unknown names before any data is read or compiled."""
    for kind, given, known in (
        ("model", run.model.name, models.MODELS),
        ("optimizer", run.optimizer.name, optimizers.OPTIMIZERS),
        ("schedule", run.optimizer.schedule, schedules.SCHEDULES),
        ("study_step", run.study_step, ("best", "last")),
    ):
        if given not in known:
            raise errors.unknown(kind, given, known)
    if run.replicas < 1:
        raise errors.UserError(f"replicas={run.replicas}: expected at least 1.")
    for key, least in (("start", 1), ("steps", 0)):
        if run.profile[key] < least:
            raise errors.UserError(f"profile.{key}={run.profile[key]}: expected a number of steps from {least}.")


def _override(config: ml_collections.ConfigDict, overrides: Mapping[str, Any], path: str) -> None:
    for key, value in overrides.items():
        if key not in config:
            raise _unknown_key(f"{path}.{key}", key, config)
        if key == "studies":
            raise errors.UserError(
                f"{path}.studies: studies are common to all runs, so that these can be compared; set studies."
            )
        nested = isinstance(value, Mapping)
        if nested != isinstance(config[key], ml_collections.ConfigDict):
            raise errors.UserError(
                f"{path}.{key}: expected {'a value' if nested else 'a group of keys'}, got {value!r}."
            )
        if not nested:
            with config.unlocked(), config.ignore_type():
                config[key] = value
        elif key in ("model", "objective") and value.get("name", config[key].name) != config[key].name:
            with config.unlocked():
                config[key] = ml_collections.ConfigDict(value)
        else:
            _override(config[key], value, f"{path}.{key}")


def _unknown_key(full: str, key: str, config: Mapping[str, Any]) -> errors.UserError:
    near = difflib.get_close_matches(key, list(config), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return errors.UserError(f"unknown config key {full}: {hint}Known here: {', '.join(sorted(config))}.")


def _fill(
    part: ml_collections.ConfigDict, kind: str, known: list, options: Mapping[str, Any], hidden: set[str]
) -> None:
    names = [name for name, _, _ in known if name not in hidden]
    for option in options:
        if option not in names and option not in part:
            raise errors.unknown(kind, option, [*names, *part])
    for name, value, annotation in known:
        if name in hidden:
            continue
        if str(annotation).startswith("int | str"):
            # A number or "auto": the study says what it accepts.
            part[name] = ml_collections.config_dict.FieldReference(value, field_type=object)
        elif value is None:
            # An optional value keeps its type, so that the command line can set it.
            kinds = [_TYPES[word] for word in re.findall(r"\w+", str(annotation)) if word in _TYPES]
            part[name] = ml_collections.config_dict.placeholder(kinds[0] if kinds else object)
        elif value not in (inspect.Parameter.empty, dataclasses.MISSING):
            part[name] = value
    for name, value in options.items():
        if value is not None:
            part[name] = value
