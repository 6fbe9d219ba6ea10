"""The throughput benchmark works, and what it counts is right; nothing here is a measurement."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from robust_vit import classifier, models

FOLDER = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def benchmark():
    """The modules of the benchmark, which is a script and no package."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in ("passes", "accelerator")}
    sys.path.remove(str(FOLDER))


def test_operations_of_a_vit_are_the_closed_form(benchmark):
    passes = benchmark["passes"]
    width, depth, hidden, tokens, batch, classes = 16, 2, 64, 5, 3, 7
    module = models.build("vit", num_classes=classes, width=width, depth=depth, heads=2, patch=4)
    batch_of = (jnp.zeros((batch, 8, 8, 3)), jnp.zeros(batch, jnp.int32))
    variables = jax.eval_shape(module.init, jax.random.key(0), batch_of[0])
    vector = variables["params"]
    # Of the last block, all tokens' queries, keys and values, and what the class token makes of them.
    weights = (depth - 1) * tokens * (4 * width**2 + 2 * width * hidden)
    weights += tokens * 3 * width**2 + width**2 + 2 * width * hidden
    attention = (depth - 1) * 2 * tokens**2 * width + 2 * tokens * width
    embedding, head = (tokens - 1) * 48 * width, width * classes
    forward = 2 * batch * (weights + attention + embedding + head)
    count = {name: passes.flops(passes.Pass(module, name), batch_of, variables, vector) for name in passes.PASSES}
    assert count["forward"] == forward
    # Every product has two derivatives; the images' is not needed for the parameters.
    assert count["parameter_gradient"] == 3 * forward - 2 * batch * embedding
    assert count["input_gradient"] == 2 * forward + 2 * batch * attention
    # A product's tangent is two products; the weights' gradient itself is not needed, nor a tangent of the images.
    assert 2.5 * count["parameter_gradient"] < count["hvp"] <= 8 / 3 * count["parameter_gradient"]


def test_loops_count_by_their_length_and_inserted_zeros_do_not(benchmark):
    passes = benchmark["passes"]
    matrix = jnp.ones((4, 4))
    scanned = passes.flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], matrix)
    assert scanned == 5 * 2 * 4**3
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def convolution(images):
        return jax.lax.conv_general_dilated(
            images, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = passes.flops(convolution, images)
    assert forward == 2 * (2 * 4 * 4 * 5) * 27
    backward = passes.flops(lambda x: jax.vjp(convolution, x)[1](jnp.ones((2, 4, 4, 5)))[0], images)
    assert backward == forward  # The convolution itself is not needed: it is linear.


def test_floor_runs_every_product(benchmark):
    passes = benchmark["passes"]
    assert passes.floor(lambda x: jnp.sin(x @ x) @ x, jnp.ones((8, 8)), calls=1) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ViT-tiny", "ResNet-tiny"])
def test_accelerator_suite_reports_every_row(benchmark, capsys, model):
    accelerator = benchmark["accelerator"]
    accelerator.report(tiny=True, chosen=[model], batches=(2,))
    rows = _rows(capsys.readouterr().out, model)
    kinds = {"ViT-tiny, explicit": 6, "ViT-tiny, fused": 5} if model == "ViT-tiny" else {"ResNet-tiny": 6}
    names = [name.replace("_", " ") for name in accelerator.PASSES]
    assert [row[:3] for row in rows] == [
        [title, name, batch] for batch in ("2",) for title, count in kinds.items() for name in names[:count]
    ]
    for row in rows:
        found = dict(zip(accelerator.COLUMNS, row, strict=True))
        assert found["share of the measured rate"].endswith("%")
        assert (found["HVP / gradient"] == "-") == (found["pass"] != "hvp")
        assert (found["attacked/s"] == "-") == (found["pass"] not in ("pgd step", "apgd step"))
        assert float(found["compile, s"]) >= 0


@pytest.mark.slow
def test_accelerator_suite_from_the_command_line():
    command = [sys.executable, str(FOLDER / "throughput.py"), "--suite=accelerator", "--tiny", "--minutes=5"]
    command += ["--models=ResNet-tiny", "--passes=forward,gradient", "--batches=2,3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    named = [row[1:3] for row in _rows(done.stdout, "ResNet-tiny")]
    assert named == [[name, batch] for batch in ("2", "3") for name in ("forward", "gradient")]
    done = subprocess.run([*command, "--passes=backward"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "backward: expected some of training, forward, gradient" in done.stderr


def test_a_training_step_moves_the_statistics_of_batches_and_other_passes_do_not(benchmark):
    accelerator = benchmark["accelerator"]
    module = models.build("resnet", num_classes=10, **accelerator.TINY_ROWS["ResNet-tiny"][1])
    spec = classifier.ImageSpec(size=(8, 8), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    variables = jax.eval_shape(lambda: models.init(module, spec, jax.random.key(0)))
    images, labels = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    for name in accelerator.PASSES:
        step = accelerator.Step(module, spec, name)
        state = jax.eval_shape(step.state, variables, images, labels)
        traced = jax.jit(step).trace(state, images, labels)
        kept = {id(variable) for variable in traced.jaxpr.jaxpr.invars}
        moved = [id(variable) not in kept for variable in traced.jaxpr.jaxpr.outvars]
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(traced.out_info)]
        statistics = {changed for path, changed in zip(paths, moved, strict=True) if "batch_stats" in path}
        assert statistics == {name == "training"}
        assert any(moved)


def test_rows_that_no_time_is_left_for_are_said(benchmark, capsys):
    benchmark["accelerator"].report(tiny=True, chosen=["ResNet-tiny"], minutes=-1.0)
    text = capsys.readouterr().out
    assert _rows(text, "ResNet-tiny") == []
    assert "6 rows were left out after" in text


def test_out_of_memory_is_a_row_and_ends_its_batches(benchmark, capsys, monkeypatch):
    def full(self, variables, images, labels):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")

    monkeypatch.setattr(benchmark["accelerator"].Step, "state", full)
    benchmark["accelerator"].report(tiny=True, chosen=["ResNet-tiny"], batches=(2,))
    assert _rows(capsys.readouterr().out, "ResNet-tiny") == [
        ["ResNet-tiny", name, "2", "out of memory"]
        for name in ("training", "forward", "gradient", "pgd step", "apgd step", "hvp")
    ]


def _rows(text: str, model: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {model}")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parity
def test_comparison_with_torch_prints_every_row():
    pytest.importorskip("torch", reason="the parity extra is not installed")
    command = [sys.executable, str(FOLDER / "throughput.py"), "--tiny", "--rounds=1", "--calls=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| ViT-tiny", "| ResNet-20"))]
    assert len(lines) == 8
