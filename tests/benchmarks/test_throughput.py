"""The throughput benchmark works, and what it counts is right; nothing here is a measurement."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from robust_vit import models

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
    weights = depth * tokens * (4 * width**2 + 2 * width * hidden)
    attention = depth * 2 * tokens**2 * width
    embedding, head = (tokens - 1) * 48 * width, width * classes
    forward = 2 * batch * (weights + attention + embedding + head)
    count = {name: passes.flops(passes.Pass(module, name), batch_of, variables, vector) for name in passes.PASSES}
    assert count["forward"] == forward
    # Every product has two derivatives; the images' is not needed for the parameters.
    assert count["parameter_gradient"] == 3 * forward - 2 * batch * embedding
    assert count["input_gradient"] == 2 * forward + 2 * batch * attention
    # A product's tangent is two products; without the tangent of the images.
    assert 2.9 * count["parameter_gradient"] < count["hvp"] <= 3 * count["parameter_gradient"]


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
    assert backward == forward * 2


def test_floor_runs_every_product(benchmark):
    passes = benchmark["passes"]
    assert passes.floor(lambda x: jnp.sin(x @ x) @ x, jnp.ones((8, 8)), calls=1) > 0.0


@pytest.mark.slow
def test_accelerator_suite_reports_every_row(benchmark, capsys):
    benchmark["accelerator"].report(tiny=True, rows=["ViT-tiny"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ViT-tiny")]
    named = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines]
    explicit = [("ViT-tiny, explicit", name, "2") for name in ("training", "forward", "pgd step", "hvp")]
    fused = [("ViT-tiny, fused", name, "2") for name in ("training", "forward", "pgd step")]
    assert named == explicit + fused
    assert all("%" in line for line in lines)


def test_out_of_memory_is_a_row_and_ends_its_batches(benchmark, capsys, monkeypatch):
    def full(self, variables, images):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")

    monkeypatch.setattr(benchmark["accelerator"].Step, "state", full)
    benchmark["accelerator"].report(tiny=True, rows=["ResNet-tiny"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ResNet-tiny")]
    assert lines == [
        f"| ResNet-tiny | {name} | 2 | out of memory |" for name in ("training", "forward", "pgd step", "hvp")
    ]


@pytest.mark.parity
def test_comparison_with_torch_prints_every_row():
    pytest.importorskip("torch", reason="the parity extra is not installed")
    command = [sys.executable, str(FOLDER / "throughput.py"), "--tiny", "--rounds=1", "--calls=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| ViT-tiny", "| ResNet-20"))]
    assert len(lines) == 8
