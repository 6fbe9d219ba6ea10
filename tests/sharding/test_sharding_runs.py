"""One run on 1, 2 and 8 devices, data parallel, fully sharded and both: the same training, the same decisions."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from robust_vit import (
    checkpoints,
    collectives,
    errors,
    mesh,
    planning,
    programs,
    progress,
    runs,
    settings,
    studies,
    train,
)

LAYOUTS = {"one": (1, "data"), "data": (8, "data"), "fsdp": (8, "fsdp"), "both": (8, "fsdp=4")}
# As shares of the value; measured: 4e-6 (ViT) and 2.9e-5 (ResNet, whose BatchNorm divides by sums over the batch), 5 steps.
BOUNDS = {"vit": 2e-5, "resnet": 2e-4}
MODELS = {
    "vit": settings.model("vit", width=64, depth=1, heads=2, mlp_width=256, patch=8, stochastic_depth=0.1),
    "resnet": settings.model("resnet", depth=8, width=8),
}


def _config(model: str, sharding: str, **flat):
    config = settings.default()
    config.data.update(
        {"name": "textured_shapes/grey", "batch": 32, "eval_batch": 32, "train_limit": 64, "test_limit": 40}
    )
    with config.unlocked():
        config.model = MODELS[model]
        config.studies = {"accuracy": settings.study("accuracy", batch=16)}
        if model == "resnet":
            config.studies["hessian_spectrum"] = settings.study(
                "hessian_spectrum", mini_batches=1, rank=4, top=2, batch=16
            )
        else:  # The attack of a ResNet compiles for half a minute under 8 devices.
            config.studies["attack_curve"] = settings.study(
                "attack_curve", attacks=("pgd",), steps=2, multiples=(0.25, 1.0), examples=16, batch=16, unbounded=False
            )
    config.threat = "textured_shapes/linf-8"
    config.sharding = sharding
    config.train.steps = 5
    config.log_every = 1
    config.optimizer.learning_rate = 1e-3
    with config.ignore_type():
        config.update_from_flattened_dict(flat)
    return settings.resolve(config)["main"]


def _setup(model: str, layout: str, workdir, **flat) -> runs.Setup:
    count, sharding = LAYOUTS[layout]
    return runs.prepare(_config(model, sharding, **flat), workdir, devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, layout) -> a finished run and what the studies found in it; each is trained once."""
    known = {}

    def get(model: str, layout: str):
        if (model, layout) not in known:
            setup = _setup(model, layout, tmp_path_factory.mktemp(f"{model}_{layout}"))
            train.train(setup)
            (subject,) = runs.subjects(setup)[0].values()
            found = {label: study.run(subject) for label, study in settings.build_studies(setup.config).items()}
            known[model, layout] = setup, found
        return known[model, layout]

    return get


@pytest.mark.parametrize(
    ("model", "layout"),
    [("vit", "data"), ("vit", "fsdp"), ("vit", "both"), pytest.param("resnet", "data", marks=pytest.mark.slow)],
)
def test_the_loss_curve_and_the_decisions_are_those_of_one_device(trained, model, layout):
    (one, alone), (many, shared) = trained(model, "one"), trained(model, layout)
    curves = [progress.read(setup.folder / "metrics.jsonl") for setup in (one, many)]
    assert len(curves[0]) == len(curves[1]) > 5
    for left, right in zip(*curves, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_allclose(
                right[key], left[key], rtol=BOUNDS[model], err_msg=f"{key} at step {left['step']}"
            )
    for label, finding in alone.items():
        for name in ("row", "label", "prediction", "correct", "success/pgd"):
            if name in finding.records:
                np.testing.assert_array_equal(
                    shared[label].records[name], finding.records[name], err_msg=f"{label}/{name}"
                )


def _compiled(setup: runs.Setup):
    return programs.inspect(train.step_program(setup)).compiled


def _bytes(leaves) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_data_parallel_sends_the_gradient_once_and_gathers_nothing(tmp_path, count):
    setup = runs.prepare(_config("vit", "data"), tmp_path, devices=jax.devices()[:count])
    found = [each for each in collectives.read(_compiled(setup)) if each.group > 1]
    if count == 1:
        assert found == []
        return
    assert {each.kind for each in found} == {"all-reduce"}
    # The gradient in float32, and two scalars: the mean loss and the accuracy.
    assert collectives.total_bytes(found) == _bytes(jax.tree.leaves(setup.abstract_state().params)) + 8


@pytest.mark.parametrize("layout", ["fsdp", "both"])
def test_fully_sharded_gathers_parameters_once_and_keeps_a_share(tmp_path, layout):
    setup = _setup("vit", layout, tmp_path)
    group = setup.mesh.shape["model"]
    state = setup.abstract_state()
    split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    whole = [leaf for leaf in jax.tree.leaves(state.params) if leaf.sharding.is_fully_replicated]
    assert _bytes(split) > 0.5 * _bytes([*split, *whole])
    # Parameters and Adam's two moments.
    held = mesh.bytes_per_device(state)
    assert held == pytest.approx(3 * (_bytes(split) / group + _bytes(whole)), rel=1e-3)
    found = collectives.read(_compiled(setup))
    gathered = sum(each.bytes * each.count * each.group for each in found if each.kind == "all-gather")
    assert gathered == _bytes(split)
    reduced = sum(each.bytes * each.count for each in found if each.kind in ("all-reduce", "reduce-scatter"))
    # Within a group the gradient of what is split, between groups each device's share of it, of the rest once over all; and a few
    # scalars: loss, accuracy, parts of the gradient's norm.
    between = _bytes(split) // group if layout == "both" else 0
    scalars = reduced - _bytes([*split, *whole]) - between
    assert 0 < scalars < 100


def test_a_checkpoint_of_8_devices_is_restored_by_2(trained, tmp_path):
    setup, _ = trained("vit", "both")
    reader = runs.prepare(_config("vit", "data"), tmp_path, devices=jax.devices()[:2])
    state = checkpoints.restore(setup.folder / "checkpoints", reader.abstract_state()).state
    wanted = checkpoints.restore(setup.folder / "checkpoints", setup.abstract_state()).state
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(left, right)
        assert len(left.sharding.device_set) == 2
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(wanted.params))


def test_training_goes_on_with_other_devices(trained, tmp_path):
    """Three steps on 8 devices, two on 2, against five on one: sharding is no part of what is trained."""
    stopped = _setup("vit", "both", tmp_path)
    polls = iter([False] * 3)
    with pytest.raises(train.Stopped):
        train.train(stopped, stop=lambda: next(polls, True))
    setup = runs.prepare(_config("vit", "fsdp"), tmp_path, devices=jax.devices()[:2])
    train.train(setup)
    one, _ = trained("vit", "one")
    for left, right in zip(*(progress.read(each.folder / "metrics.jsonl") for each in (one, setup)), strict=True):
        for key in left:
            np.testing.assert_allclose(right[key], left[key], rtol=BOUNDS["vit"], err_msg=key)


def test_rules_decide_before_the_default():
    devices = mesh.make(sharding="fsdp")
    tree = {"mlp": {"kernel": np.zeros((64, 512)), "bias": np.zeros(512)}, "count": np.zeros(())}
    default = mesh.Rules().place(devices, tree)
    assert default["mlp"]["kernel"].spec == jax.P(None, "model")
    assert default["mlp"]["bias"].is_fully_replicated  # Too small to be worth a gather.
    ruled = mesh.Rules((("kernel$", 0), ("bias$", -1))).place(devices, tree)
    assert ruled["mlp"]["kernel"].spec == jax.P("model")
    assert ruled["mlp"]["bias"].spec == jax.P("model")
    assert mesh.Rules((("kernel", "whole"),)).place(devices, tree)["mlp"]["kernel"].is_fully_replicated
    with pytest.raises(errors.UserError, match=r"axis 0 of odd is 12 long, which 8 devices do not divide"):
        mesh.Rules((("odd", 0),)).place(devices, {"odd": np.zeros((12, 8))})


def test_batches_that_do_not_divide(tmp_path):
    with pytest.raises(errors.UserError, match=r"data.batch=36 is not divisible by 8 devices: use 32"):
        runs.prepare(_config("vit", "data", **{"data.batch": 36}), tmp_path)
    devices = mesh.make()
    whole = mesh.put_global(devices, np.arange(12.0))
    assert whole.sharding.is_fully_replicated
    split = mesh.put_global(devices, np.arange(16.0))
    assert split.addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(mesh.fetch(split), np.arange(16.0))


@pytest.mark.slow
def test_several_seeds_and_parts_of_a_batch_are_sharded_too(tmp_path):
    """`replicas` adds an axis to every array, `accumulate` cuts the batch: both keep the numbers."""
    found = []
    for layout in ("one", "both"):
        setup = _setup("vit", layout, tmp_path / layout, **{"replicas": 2, "train.accumulate": 2, "train.steps": 2})
        train.train(setup)
        lines = progress.read(setup.folder / "metrics.jsonl")
        found.append([line["train/loss"] for line in lines if "train/loss" in line])
    np.testing.assert_allclose(found[1], found[0], rtol=BOUNDS["vit"])


@pytest.mark.parametrize(("count", "images"), [(6, 12)])
def test_a_plan_times_a_step_that_the_devices_divide(tmp_path, monkeypatch, count, images):
    measured = []
    monkeypatch.setattr(
        programs, "measure", lambda program, cost, *, seconds: measured.append(program.arguments[1]) or 1.0
    )
    config = _config("vit", "data", **{"data.batch": 24, "data.eval_batch": 24})
    setup = runs.prepare(config, tmp_path, devices=jax.devices()[:count])
    one = programs.inspect(train.step_program(setup)).flops / 24
    # As fast as lets 17 images fit in the time; the step is of fewer, that the devices divide.
    seconds = planning.CALIBRATION_SECONDS
    assert planning._probe(setup, 17.5 * 8 * one / seconds, seconds) > 0
    assert measured[0]["image"].shape[0] == images


def test_a_subject_without_a_mesh_still_works(trained):
    setup, _ = trained("vit", "one")
    (subject,) = runs.subjects(setup)[0].values()
    alone = studies.Subject(
        classifier=subject.classifier, test=subject.test, num_classes=subject.num_classes, threat=subject.threat
    )
    found = studies.build("accuracy", batch=16).run(alone)
    assert found.summary["examples"] == 40
