"""Studies over attacks on 8 devices and on one: the same decisions of a linear model, the same lengths."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, data, mesh, studies

SETTINGS = {
    "boundary_travel": {"batch": 16, "stride": 0.01},
    "transfer": {"batch": 16, "steps": 3},
}


def _linear(variables, images):
    return images.reshape(len(images), -1) @ variables


def _subjects(devices):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    weights = generator.normal(size=(2, 16, 3))
    labels = (images.reshape(40, -1) / 255 @ weights[0]).argmax(axis=1)
    stream = data.EvaluationStream(data.from_arrays(images, labels), batch=16)
    made = {
        name: studies.Subject(
            classifier=classifier.wrap(_linear, jnp.asarray(weight, jnp.float32)),
            test=stream,
            num_classes=3,
            name=name,
            threat="noise/linf-0.05",
            mesh=devices,
        )
        for name, weight in (("one", weights[0]), ("other", weights[0] + 0.5 * weights[1]))
    }
    if devices is not None:
        whole = mesh.replicated(devices)
        made = {n: dataclasses.replace(s, classifier=jax.device_put(s.classifier, whole)) for n, s in made.items()}
    return studies.introduce(made)


@pytest.mark.parametrize("name", SETTINGS)
def test_eight_devices_decide_as_one(name):
    study = studies.build(name, **SETTINGS[name])
    findings = [study.run(_subjects(devices)["one"]).records for devices in (None, mesh.make())]
    assert findings[0].keys() == findings[1].keys()
    for key, expected in findings[0].items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(findings[1][key], expected, atol=2e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(findings[1][key], expected, err_msg=key)
