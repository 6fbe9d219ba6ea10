"""The programs that a study plans are those that it runs, and "auto" becomes a number that stays."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from conftest import each_study, make_subject

from robust_vit import errors, evaluate, programs, settings, studies
from robust_vit.report import results

SMALL = {
    # One slot: with more, an attack that meets few images takes fewer than were planned.
    "auto_attack": {"examples": 6, "together": 4, "batch": 1},
    "accuracy": {"batch": 64},
    "boundary_travel": {"batch": 16, "examples": 40, "stride": 0.05},
    "calibration": {"batch": 32, "draws": 20},
    "attack_curve": {"batch": 16, "examples": 40, "steps": 2, "multiples": (1.0,)},
    "certificate": {"batch": 16, "examples": 40, "steps": 2, "estimation": 30, "selection": 10, "samples": 10},
    "loss_landscape": {"points": 3, "examples": 20, "microbatch": 8, "block": 4},
    "loss_progression": {"batch": 16, "examples": 40, "steps": 2},
    "transfer": {"batch": 16, "examples": 40, "steps": 2},
    "hessian_density": {"batch": 16, "probes": 2, "rank": 8},
    "hessian_spectrum": {"mini_batches": 2, "rank": 8, "top": 2},
    "input_curvature": {"batch": 16, "examples": 40, "rank": 8},
    "sharpness": {"batch": 8, "mini_batches": 2, "radii": (0.1,), "spreads": (0.1,), "steps": 4, "pairs": 2, "rank": 8},
    "representation_curvature": {"layer": "logits", "examples": 3, "directions": 4, "batch": 8, "steps": 4},
    "spatial_attack": {"batch": 16, "examples": 40, "grid": (3, 3, 3), "tries": 3},
    "patch_attack": {"batch": 16, "examples": 40, "steps": 2, "learned_images": 32, "areas": (0.1, 0.3)},
    "physical_attack": {"batch": 16, "examples": 40, "attack": "pgd(steps=2)", "samples": 2, "strengths": (1.0,)},
}


@pytest.fixture
def compilations(tmp_path):
    """Names of the programs in a compilation cache of the test's own, which keeps all of them."""
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {key: getattr(jax.config, key) for key in keys}
    jax.config.update(keys[0], str(tmp_path / "cache"))
    jax.config.update(keys[1], 0.0)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    jax.clear_caches()
    yield lambda: {path.name.partition("-cache")[0] for path in (tmp_path / "cache").glob("*-cache")}
    for key, value in before.items():
        jax.config.update(key, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.mark.parametrize("name", each_study())
def test_what_is_planned_is_what_runs(name, compilations):
    study = studies.build(name, **SMALL[name])
    subject = make_subject()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), subject.classifier)
    planned = study.programs(dataclasses.replace(subject, classifier=shapes))
    assert planned
    for program in planned:
        programs.inspect(program)
    known = compilations()
    functions = {program.function.__name__ for program in planned}
    for index in range(study.chunks(subject)):
        study.chunk(subject, index)
    for compiled in compilations() - known:
        assert not any(compiled.startswith(f"jit_{function}-") for function in functions), compiled


def test_passes_are_those_of_the_planned_programs():
    subject = make_subject()
    study = studies.build("attack_curve", **SMALL["attack_curve"])
    forward, backward = study.passes(subject)
    # 40 images in 3 chunks of 16, at one epsilon and without a bound: FGSM looks once, PGD three times (2 steps and the end).
    assert backward == 48 * 2 * (1 + 3)
    assert forward == backward + 48 * 2 * 2 + 48 + 16
    assert studies.build("accuracy", batch=64).passes(subject) == (192, 0)
    assert studies.build("hessian_spectrum", mini_batches=2, rank=8, batch=4).passes(subject) == (136, 128)


@pytest.mark.parametrize("name", ["accuracy", "calibration", "attack_curve"])
def test_auto_becomes_a_power_of_two(name):
    study = studies.build(name, **{**SMALL[name], "batch": "auto"})
    subject = make_subject()
    settled = study.settle(subject)
    assert settled.batch == (64 if name == "attack_curve" else 256)  # 40 and 150 images, rounded up.
    assert settled.settle(subject) is settled
    assert study.settle(subject, {"batch": 8}).batch == 8


def test_a_workdir_keeps_the_number_that_was_chosen(tmp_path, monkeypatch):
    subject = make_subject()
    study = studies.build("accuracy", batch="auto")
    first = evaluate.run_study(study, "accuracy", subject, tmp_path)
    assert first.asked["settings"]["batch"] == 256
    written = (tmp_path / results.RESULT).stat().st_mtime_ns
    monkeypatch.setenv(programs.LIMIT_VARIABLE, str(40 / 2**20))
    assert study.settle(subject).batch < 256
    again = evaluate.run_study(study, "accuracy", subject, tmp_path)
    assert again.asked["settings"]["batch"] == 256
    assert (tmp_path / results.RESULT).stat().st_mtime_ns == written


def test_the_mini_batch_of_a_hessian_is_cut_and_not_chosen(monkeypatch):
    subject = make_subject()
    study = studies.build("hessian_spectrum", microbatch="auto", mini_batches=1, rank=4, top=1)
    assert study.settle(subject).microbatch == 16
    with pytest.raises(errors.UserError, match='microbatch="auto" is what saves memory'):
        studies.build("hessian_spectrum", batch="auto")


@pytest.mark.parametrize("value", ["atuo", 0, 2.5, True])
def test_a_batch_is_a_number_or_auto(value):
    with pytest.raises(errors.UserError, match="expected a whole number from 1, or 'auto'"):
        studies.build("accuracy", batch=value)


def test_the_configuration_takes_both():
    entry = settings.study("accuracy")
    assert entry.get_type("batch") is object
    entry.batch = "auto"
    entry.batch = 32
    assert entry.batch == 32
    assert settings.study("hessian_spectrum").get_type("microbatch") is object
    assert settings.study("accuracy").get_type("examples") is int
