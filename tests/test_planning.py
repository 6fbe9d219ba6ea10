"""The plan of a tiny run: what it says before, half-way and after; numbers chosen from memory; pods by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image

from robust_vit import (
    errors,
    evaluate,
    files,
    planning,
    processes,
    programs,
    runs,
    settings,
    studies,
    topology,
    train,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Two classes of 8 px noise."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(image).save(root / split / name / f"{index:03d}.png")
    return root


def _config(folder, **flat):
    config = settings.default()
    config.data.update({"name": f"folder={folder}", "validation": 0.2, "augment": (), "batch": 16, "eval_batch": 16})
    with config.unlocked():
        config.model = settings.model("vit", width=16, depth=1, heads=2, mlp_width=16, patch=4)
        config.studies = {
            "accuracy": settings.study("accuracy", batch=8),
            "attack_curve": settings.study("attack_curve", batch=8, steps=2, multiples=(1.0,)),
        }
    config.threat = "cifar10/linf-8"
    config.train.steps = 12
    with config.ignore_type():
        config.update_from_flattened_dict(flat)
    return settings.resolve(config)["main"]


def _rows(text: str) -> dict[str, list[str]]:
    """part -> the cells of its line, which at least two spaces divide."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {line[1]: line[2:] for line in cells if line[0] == "main"}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[pathlib.Path, str, runs.Setup]:
    """A workdir whose run is finished, with one of its studies; and the plan that was made before."""
    workdir = tmp_path_factory.mktemp("work")
    config = _config(folder)
    setup = runs.prepare(config, workdir)
    text = planning.plan({"main": setup}, settings.build_studies(config))
    assert not list(workdir.iterdir()), "a plan writes nothing"
    train.train(setup)
    return workdir, text, setup


def test_passes_and_work_of_each_part(trained):
    rows = _rows(trained[1])
    assert rows["training"][:3] == ["12 steps of 16", "192", "192"]
    # 80 training images less the held out ones; 12 steps are 3 epochs, with one validation each.
    assert rows["validation"][2] == "0"
    assert rows["accuracy"][:3] == ["3 chunks", "24", "0"]
    backward = 24 * 2 * (1 + 3)
    assert rows["attack_curve"][:3] == ["3 chunks", f"{backward + 24 * 2 * 2 + 24 + 8:,}", f"{backward:,}"]
    for cells in rows.values():
        assert float(cells[3].removeprefix("~").replace(",", "")) >= 0
        assert re.fullmatch(r"[\d.]+ (B|KiB|MiB)", cells[4])
    assert "In all about" in trained[1]
    assert "take less than their plan" in trained[1]
    assert "more than" not in trained[1]


def test_what_is_finished_is_said(trained):
    workdir, _, setup = trained
    asked = settings.build_studies(setup.config)
    found, step = runs.subjects(setup)
    evaluate.evaluate_runs(workdir, found, {"accuracy": asked["accuracy"]}, step)
    rows = _rows(planning.plan({"main": setup}, asked))
    assert rows["training"][:4] == ["12 steps of 16, finished", "0", "0", "0.00"]
    assert rows["accuracy"][:3] == ["3 chunks, finished", "0", "0"]
    assert rows["attack_curve"][0] == "3 chunks"
    half = runs.prepare(_config(setup.config.data.name.removeprefix("folder="), **{"train.steps": 12}), workdir)
    part = planning._training(planning.dataclasses.replace(half, steps=48), "main")[0]
    assert (part.state, part.share, part.passes) == ("from step 12", 0.75, (36 * 16, 36 * 16))


def test_a_study_that_does_not_apply_says_why(folder, tmp_path):
    setup = runs.prepare(_config(folder, threat=""), tmp_path)
    rows = _rows(planning.plan({"main": setup}, {"attack": settings.build_studies(setup.config)["attack_curve"]}))
    assert rows["attack"][0].startswith("skipped: no threat model is set")


def test_what_does_not_fit_is_named_with_its_remedy(folder, tmp_path, monkeypatch):
    def measure(program, cost, *, seconds):
        assert program.name == "product", "a plan runs nothing that does not fit"
        return 1e-3

    monkeypatch.setenv(programs.LIMIT_VARIABLE, str(50 / 2**20))
    monkeypatch.setattr(programs, "measure", measure)
    setup = runs.prepare(_config(folder), tmp_path)
    text = planning.plan({"main": setup}, settings.build_studies(setup.config))
    assert "main: training needs" in text
    assert "set train.accumulate=auto" in text
    assert "set studies.attack_curve.batch=auto" in text
    assert planning._probe(setup, product=1e12, seconds=1.0) is None


@pytest.mark.parametrize("name", studies.STUDIES)
def test_the_remedy_that_is_named_is_accepted(name):
    config = settings.default()
    with config.unlocked():
        config.studies = {"label": settings.study(name)}
    part = planning.Part("main", "label", automatic=studies.build(name).automatic)
    key = re.fullmatch(r"set (studies\.label\.\w+)=auto", planning._remedy(part)).group(1)
    config.update_from_flattened_dict({key: programs.AUTO})
    assert getattr(settings.build_studies(config)["label"], part.automatic) == programs.AUTO
    # What the command line says of any study.
    assert part.automatic == ("microbatch" if hasattr(studies.build(name), "microbatch") else "batch")


def test_as_few_parts_as_fit(folder, tmp_path, monkeypatch):
    costs = {}
    for parts in (1, 2):
        setup = runs.prepare(_config(folder, **{"train.accumulate": parts, "data.batch": 64}), tmp_path)
        costs[parts] = programs.inspect(train.step_program(setup))
    sizes = {parts: cost.memory for parts, cost in costs.items()}
    assert sizes[1] > sizes[2]
    automatic = runs.prepare(_config(folder, **{"train.accumulate": "auto", "data.batch": 64}), tmp_path)
    # From here on nothing is compiled again.
    monkeypatch.setattr(
        train, "step_program", lambda setup: types.SimpleNamespace(parts=setup.config.train.accumulate, times=1)
    )
    monkeypatch.setattr(train, "validation_program", lambda setup: None)
    monkeypatch.setattr(programs, "inspect", lambda program: costs[program.parts])
    for parts, size in sizes.items():
        monkeypatch.setenv(programs.LIMIT_VARIABLE, repr(1.001 * size / programs.margin() / 2**30))
        assert train.settle(automatic).config.train.accumulate == parts
    # A pod is planned by the memory of its chips, whatever there is of it here.
    for parts, size in sizes.items():
        memory = 1.001 * size / programs.margin("accelerator") / 2**30
        monkeypatch.setitem(
            topology.GENERATIONS, "v5e", dataclasses.replace(topology.GENERATIONS["v5e"], memory=memory)
        )
        monkeypatch.setattr(topology, "devices", lambda pod: jax.devices()[: pod.chips])
        title = "main: training step of 64 images" + (" in 2 parts" if parts == 2 else "")
        assert f"{title}, compiled in" in topology.plan({"main": automatic}, "v5e-1")
    # Another process may have less: all of them take as many parts as that one needs.
    monkeypatch.setenv(programs.LIMIT_VARIABLE, "1000")
    assert train.settle(automatic).config.train.accumulate == 1
    monkeypatch.setattr(processes, "least", lambda number: int(1.001 * sizes[2]))
    assert train.settle(automatic).config.train.accumulate == 2


def test_a_run_keeps_the_parts_that_it_was_begun_with(folder, tmp_path):
    begun = runs.prepare(_config(folder, **{"train.accumulate": 4}), tmp_path)
    files.write_json(begun.folder / runs.IDENTITY_FILE, settings.training_identity(begun.config))
    again = train.settle(runs.prepare(_config(folder, **{"train.accumulate": "auto"}), tmp_path))
    assert again.config.train.accumulate == 4


@pytest.mark.parametrize("parts", [3, "some", 0])
def test_parts_that_do_not_divide_the_batch(folder, tmp_path, parts):
    with pytest.raises(errors.UserError, match="choose a divisor, or 'auto'"):
        runs.prepare(_config(folder, **{"train.accumulate": parts}), tmp_path)


@pytest.mark.parametrize(
    ("name", "generation", "chips", "grid"),
    [
        ("v5e-64", "v5e", 64, (8, 8)),
        ("v5litepod-16", "v5e", 16, (4, 4)),
        ("v6e-1", "v6e", 1, (1, 1)),
        ("v4-8", "v4", 4, (2, 2, 1)),
        ("v5p-128", "v5p", 64, (4, 4, 4)),
    ],
)
def test_slices_by_name(name, generation, chips, grid):
    found = topology.parse(name)
    assert (found.generation, found.chips, found.grid) == (generation, chips, grid)


def test_an_unknown_slice_lists_the_known():
    with pytest.raises(errors.UserError, match=r"unknown topology 'v5e-65': did you mean .*v5e-64.*Known: .*v6e-256"):
        topology.parse("v5e-65")


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(errors.UserError, match="pip install libtpu"):
        topology.configure("v5e-64", alone=False)


def test_the_plan_of_a_pod(folder, tmp_path, monkeypatch):
    """On this machine's own device in the place of a chip: the compiler for the chips comes with libtpu."""
    monkeypatch.setattr(topology, "devices", lambda pod: jax.devices()[: pod.chips])
    setup = runs.prepare(_config(folder), tmp_path)
    text = topology.plan({"main": setup}, "v5e-1")
    assert "v5e-1: 1 chip of cpu in a grid of 1 x 1, 1 host, 16 GiB and 197 TFLOP/s" in text
    assert "main: training step of 16 images, compiled in" in text
    assert "memory a chip" in text
    assert "0 B sent by each chip a call" in text


def test_a_step_that_no_chip_holds_is_said_in_the_compiler_s_numbers(folder, tmp_path, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (33.54G) exceeds available HBM (15.75G)."

    def refuse(program):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(topology, "devices", lambda pod: jax.devices()[: pod.chips])
    monkeypatch.setattr(programs, "inspect", refuse)
    text = topology.plan({"main": runs.prepare(_config(folder), tmp_path)}, "v5e-1")
    assert "training step of 16 images: does not fit: needs 33.54 GiB of 15.75 on a chip. Set train.accumulate" in text
