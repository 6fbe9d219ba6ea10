"""Attacks whose slots are split over 8 devices decide as on one, and refilling still changes no byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, loops, mesh
from robust_vit.attacks import skeleton

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


BUILT = {
    "pgd": {"epsilon": 0.02, "norm": "l1", "restarts": 2},
    "apgd_t": {"epsilon": 0.02, "targets": 2},
    "fab_t": {"norm": "l1", "targets": 2},
}


def _collectives(program):
    text = program.function.trace(*program.static, *program.arguments).lower().compile().as_text()
    return sum(text.count(f" {kind}(") for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("name", BUILT)
def test_no_device_waits_for_another(name):
    attack, devices = attacks.build(name, **BUILT[name]), mesh.make()
    model = jax.device_put(_model(), mesh.replicated(devices))
    images, labels, rows = mesh.put_global(
        devices, (np.full((16, *SHAPE), 0.5, np.float32), np.zeros(16, np.int32), np.arange(16))
    )
    state = skeleton.start(attack, attacks.example_keys(0, rows), images, labels)
    # What the compiler makes of it by itself.
    assert _collectives(loops.plan(skeleton.advance, state, 3, attack, model)) > 0
    step = skeleton.by_device(skeleton.advance, images, model)
    assert _collectives(loops.plan(step, state, 3, attack, model)) == 0
    assert _collectives(skeleton.judge_program(attack, model, images, state)) == 0


def test_a_model_that_devices_share_is_attacked_by_all_together():
    devices = mesh.make(sharding="fsdp")
    split = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, mesh.AXES))
    shared = classifier.wrap(_bent, {**_model().variables, "u": jax.device_put(_model().variables["u"], split)})
    images, labels, rows = mesh.put_global(
        devices, (np.full((8, *SHAPE), 0.5, np.float32), np.zeros(8, np.int32), np.arange(8))
    )
    assert skeleton.by_device(skeleton.advance, images, shared) is skeleton.advance
    attack, keys = attacks.build("pgd", epsilon=0.02, steps=3), attacks.example_keys(0, rows)
    found = attack(shared, keys, images, labels)
    whole = attack(jax.device_put(_model(), mesh.replicated(devices)), keys, images, labels)
    np.testing.assert_array_equal(found.success, whole.success)
    np.testing.assert_allclose(found.images, whole.images, rtol=0, atol=1e-6)


def test_an_attack_compiles_its_step_once(caplog):
    attack = attacks.build("pgd", epsilon=0.02, steps=5, restarts=3)
    images = np.random.default_rng(1).uniform(size=(COUNT, *SHAPE)).astype(np.float32)
    examples = {"image": images, "label": np.zeros(COUNT, np.int32)}
    with jax.log_compiles():
        attacks.run(attack, _model(), examples, slots=8, mesh=mesh.make())
    compiled = [
        record.getMessage() for record in caplog.records if "Compiling jit(_scan_in_place)" in record.getMessage()
    ]
    assert len(compiled) == 1
