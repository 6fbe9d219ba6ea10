"""Landscapes on 8 devices: points spread over them give the same bytes as one device, split parameters the same numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, curvature, data, errors, losses, mesh, studies
from robust_vit.curvature import landscapes

KEY = jax.random.key(0)


def _network(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["first"]["kernel"])
    return {
        "loss": losses.cross_entropy(hidden @ params["second"]["kernel"], batch["y"]),
        "mean": jnp.mean(hidden),
    }


def _convolving(params, batch):
    kernel = mesh.whole(params["kernel"])
    found = jax.lax.conv_general_dilated(batch["x"], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return {"loss": jnp.mean(jnp.square(found), axis=(1, 2, 3))}


def _problem(kind):
    generator = np.random.default_rng(0)
    if kind == "convolving":
        params = {"kernel": generator.normal(size=(3, 3, 2, 8)).astype(np.float32)}
        return _convolving, params, {"x": generator.normal(size=(6, 5, 5, 2)).astype(np.float32)}
    params = {
        "first": {"kernel": generator.normal(size=(64, 256)).astype(np.float32)},
        "second": {"kernel": generator.normal(size=(256, 8)).astype(np.float32)},
    }
    return _network, params, {"x": generator.normal(size=(16, 64)).astype(np.float32), "y": np.arange(16) % 8}


@pytest.mark.parametrize("microbatch", [None, 4])
@pytest.mark.parametrize("kind", ["dense", "convolving"])
def test_points_spread_over_8_devices_give_the_same_bytes(kind, microbatch):
    loss, params, batch = _problem(kind)
    points = curvature.grid(*[curvature.offsets(-1, 1, 5)] * 2)  # 25: the last device has points to spare.
    alone = curvature.random_directions(KEY, params)
    expected = curvature.landscape(loss, params, alone, points, batch, microbatch=microbatch)
    devices = mesh.make()
    placed = jax.device_put(params, mesh.replicated(devices))
    rows = curvature.random_directions(KEY, placed)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(rows))
    found = curvature.landscape(loss, placed, rows, points, batch, microbatch=microbatch, mesh=devices)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    # Each device does an eighth of the points: four rounds of 25 over 8, a step a microbatch.
    sweeps = landscapes._sweeps(loss, placed, rows, points, batch, (), microbatch, devices)
    assert sweeps[0].length == 4 * sweeps[0].count
    text = landscapes.planned(loss, placed, rows, 25, batch, microbatch=microbatch, mesh=devices)[0]
    compiled = text.function.lower(*text.static, *text.arguments).compile().as_text()
    assert not any(word in compiled for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("sharding", ["fsdp", "fsdp=4"])
def test_split_parameters_stay_split(sharding):
    loss, params, batch = _problem("dense")
    points = curvature.grid(*[curvature.offsets(-1, 1, 3)] * 2)
    expected = curvature.landscape(loss, params, curvature.random_directions(KEY, params), points, batch)
    devices = mesh.make(sharding=sharding)
    placed = mesh.put(params, mesh.Rules().place(devices, params))
    assert not placed["first"]["kernel"].sharding.is_fully_replicated
    with mesh.context(devices):
        rows = curvature.random_directions(KEY, placed)
        found = curvature.landscape(loss, placed, rows, points, batch, mesh=devices)
    for row, leaf in zip(jax.tree.leaves(rows), jax.tree.leaves(placed), strict=True):
        assert mesh.bytes_per_device(row) == 2 * mesh.bytes_per_device(leaf)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6)  # Measured: 2e-6 relative.


def _linear(variables, images):
    return images.reshape(len(images), -1) @ variables["kernel"]


def test_the_study_on_8_devices_is_that_on_one():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    kernel = generator.normal(size=(16, 3))
    labels = (images.reshape(40, -1) / 255 @ kernel).argmax(axis=1)
    source = data.from_arrays(images, labels)
    subject = studies.Subject(
        classifier=classifier.wrap(_linear, {"kernel": jnp.asarray(kernel, jnp.float32)}),
        test=data.EvaluationStream(source, batch=16),
        train=data.TrainingStream(source, batch=16, seed=0),
        num_classes=3,
        weight_decay=0.1,
    )
    devices = mesh.make()
    spread = dataclasses.replace(
        subject, mesh=devices, classifier=jax.device_put(subject.classifier, mesh.replicated(devices))
    )
    for options in ({"plane": "random"}, {"plane": "eigenvectors", "rank": 20, "tolerance": 1e-5}):
        study = studies.build("loss_landscape", points=5, examples=16, microbatch=8, block=9, **options)
        expected, found = (study.run(each).records for each in (subject, spread))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if options["plane"] == "random" or value.dtype.kind != "f":
                np.testing.assert_array_equal(found[key], value, err_msg=key)
            elif "residual" not in key:  # Lanczos sums over devices in another order.
                np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-4, err_msg=key)


def test_coordinates_that_do_not_fit_are_refused_on_a_mesh_too():
    loss, params, batch = _problem("dense")
    devices = mesh.make()
    rows = curvature.random_directions(KEY, jax.device_put(params, mesh.replicated(devices)))
    with pytest.raises(errors.UserError, match="expected \\[points, 2\\]"):
        curvature.landscape(loss, params, rows, np.zeros((3, 1)), batch, mesh=devices)
