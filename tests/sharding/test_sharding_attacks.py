"""Attacks whose slots are split over 8 devices decide as on one, and refilling still changes no byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import attacks, classifier, mesh

COUNT, CLASSES, SHAPE = 21, 4, (4, 4, 2)


def _bent(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


def _model():
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE))
    variables = {"u": rng.normal(size=(size, 16)) / 3, "w": rng.normal(size=(16, CLASSES))}
    return classifier.wrap(_bent, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), variables))


def test_a_suite_on_8_devices_decides_as_on_one():
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
    labels = np.array(_model()(images).argmax(axis=-1), np.int32)
    examples = {"image": images, "label": labels, "row": np.arange(COUNT, dtype=np.int32)}
    members = {
        "pgd": attacks.build("pgd", epsilon=0.02, steps=5),
        "apgd_t": attacks.build("apgd_t", epsilon=0.02, steps=8, targets=2),
        "square": attacks.build("square", epsilon=0.02, queries=20),
    }
    found = {}
    for count in (1, 8):
        devices = mesh.make(jax.devices()[:count])
        options = {"epsilon": 0.02, "attacks": members, "slots": 8, "mesh": devices}
        found[count] = attacks.auto_attack(_model(), examples, **options)
    assert 0 < found[1].robust.sum() < COUNT
    for name in ("correct", "attempted", "success"):
        np.testing.assert_array_equal(getattr(found[8], name), getattr(found[1], name), err_msg=name)
    devices = mesh.make(jax.devices())
    options = {"slots": 8, "mesh": devices, "keep_images": True}
    refilled = attacks.run(members["pgd"], _model(), examples, **options)
    plain = attacks.run(members["pgd"], _model(), examples, **options, refill=False)
    np.testing.assert_array_equal(refilled.images, plain.images)
    np.testing.assert_array_equal(refilled.success, plain.success)
