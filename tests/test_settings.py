"""Configurations: every key has a default, runs are resolved, mistakes name the nearest key."""

from __future__ import annotations

import importlib.util
import pathlib

import ml_collections
import pytest

from robust_vit import errors, files, models, presets, settings, studies

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def _load(name: str, argument: str = ""):
    specification = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.get_config(argument)


def _with_runs(runs):
    config = settings.default()
    with config.unlocked():
        config.runs = ml_collections.ConfigDict(runs)
    return config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
@pytest.mark.parametrize("argument", ["", "smoke"])
def test_every_configuration_resolves_and_builds(path, argument):
    config = _load(path.stem, argument)
    for run in settings.resolve(config).values():
        settings.check_names(run)
        built = settings.build_studies(run)
        assert built
        options = run.model.to_dict()
        del options["init"], options["init_reset"]
        assert models.build(options.pop("name"), num_classes=10, **options).branches
        files.jsonable(settings.training_identity(run))


@pytest.mark.parametrize("name", ["vit_b16", "resnet50"])
def test_the_argument_chooses_the_data(name):
    assert _load(name).data.name == "imagenet2012"
    assert _load(name, "cifar10").data.name == "cifar10"
    assert _load(name, "cifar10").data.image_size == 224
    assert _load(name, "fashion_mnist").data.mean == (0.2860,)
    assert _load(name, "folder=/a/b").data.name == "folder=/a/b"
    assert _load(name, "cifar10,smoke").train.steps < 10
    with pytest.raises(errors.UserError, match="did you mean 'cifar10'"):
        _load(name, "cifar")
    with pytest.raises(errors.UserError, match="names 2 data sets"):
        _load(name, "cifar10,imagenet")


def test_no_runs_is_one_run_named_main():
    assert list(settings.resolve(settings.default())) == ["main"]


def test_overrides_are_merged_and_another_model_replaces_the_whole():
    runs = {"a": {"train": {"epochs": 3.0}}, "b": {"model": {"name": "resnet", "init": "", "depth": 8}, "seed": 7}}
    resolved = settings.resolve(_with_runs(runs))
    assert resolved["a"].train.epochs == 3.0
    assert resolved["a"].model.name == "vit"
    assert resolved["b"].model.to_dict() == {"name": "resnet", "init": "", "depth": 8}
    assert resolved["b"].seed == 7
    assert "runs" not in resolved["a"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"a": {"trian": {"epochs": 3.0}}}, "unknown config key runs.a.trian: did you mean train"),
        ({"a": {"train": {"epoch": 3.0}}}, "unknown config key runs.a.train.epoch: did you mean epochs?"),
        ({"a": {"studies": {}}}, "studies are common to all runs"),
        ({"a": {"train": 3}}, "runs.a.train: expected a group of keys"),
        ({"a": {"seed": {"x": 3}}}, "runs.a.seed: expected a value"),
        ({"report": {}}, "run name 'report'"),
        ({"a/b": {}}, "run name 'a/b'"),
    ],
)
def test_a_mistaken_override_is_named(runs, message):
    with pytest.raises(errors.UserError) as raised:
        settings.resolve(_with_runs(runs))
    assert message in str(raised.value)


def test_names_are_checked_before_any_work():
    for key, value, message in [
        ("optimizer.name", "adam", "did you mean 'adamw'"),
        ("optimizer.schedule", "cosin", "did you mean 'cosine'"),
        ("study_step", "latest", "Known: best, last"),
        ("model.name", "resnett", "did you mean 'resnet'"),
        ("replicas", 0, "expected at least 1"),
    ]:
        config = settings.default()
        config.update_from_flattened_dict({key: value})
        with pytest.raises(errors.UserError, match=message):
            settings.check_names(config)


def test_every_option_of_a_model_and_of_a_study_can_be_overridden():
    assert set(models.options("vit")) <= set(settings.model("vit", size="Ti"))
    for name in studies.STUDIES:
        entry = settings.study(name)
        assert settings.build_studies(ml_collections.ConfigDict({"studies": {"label": entry}}))["label"].name == name
    with pytest.raises(errors.UserError, match="did you mean 'patch'"):
        settings.model("vit", pach=4)


def test_a_workdir_may_be_continued_with_other_free_keys_only():
    first, second = settings.default(), settings.default()
    second.log_every, second.threat, second.data.eval_batch = 7, "x", 8
    assert settings.training_identity(first) == settings.training_identity(second)
    second.seed = 1
    assert settings.training_identity(first) != settings.training_identity(second)


def test_every_preset_names_keys_that_exist():
    for preset in presets.DATA_PRESETS.values():
        settings.default().data.update(preset)
