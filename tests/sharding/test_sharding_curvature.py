"""Curvature on 1, 2, 4 and 8 devices: the same eigenvalues, vectors that lie as the parameters do, and what is sent for them."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, collectives, curvature, loops, mesh, models, trees
from robust_vit.curvature import ascents, batches, growth, krylov, per_example
from robust_vit.studies import training_loss
from robust_vit.training import optimizers
from robust_vit.training import state as train_state
from robust_vit.training import step as train_step

IMAGES, RANK = 16, 12
KEY = jax.random.key(0)
LOSS = training_loss.MeanLoss()


@functools.cache
def _model():
    spec = classifier.ImageSpec(size=(16, 16))
    # Kernels of 64 x 256 are large enough to be split. All tokens are read: class tokens are few numbers, which the compiler
    # rather exchanges than a tangent of the kernel.
    module = models.build("vit", num_classes=10, patch=4, width=64, depth=1, heads=4, head="gap")
    return classifier.Classifier(models.init(module, spec, jax.random.key(1)), module, spec)


def _batch(images=IMAGES):
    rng = np.random.default_rng(0)
    return {
        "image": rng.uniform(size=(images, 16, 16, 3)).astype(np.float32),
        "label": (np.arange(images) % 10).astype(np.int32),
    }


def _operator(devices, images=IMAGES, microbatch=None):
    model = _model()
    placed = jax.device_put(model.variables, mesh.Rules().place(devices, model.variables))
    model = model.replace(variables=placed)
    batch = mesh.put_global(devices, _batch(images))
    return curvature.hessian(LOSS, model.params, batch, model, separable=False, microbatch=microbatch)


def _sent(compiled) -> list:
    return [each for each in collectives.read(compiled) if each.group > 1]


def _step(operator, decomposition):
    arguments = (krylov._step, decomposition, jnp.int32(0), (operator,))
    return loops._apply_in_place.lower(*arguments).compile()


@functools.cache
def _alone():
    """The extreme eigenvalues on one device, from either end."""
    return curvature.lanczos(_operator(mesh.make(jax.devices()[:1])), KEY, rank=RANK, top=4, which="both ends")


@pytest.mark.parametrize(("count", "sharding"), [(2, "data"), (4, "fsdp=2"), (8, "data"), (8, "fsdp")])
def test_more_devices_change_eigenvalues_by_rounding_alone(count, sharding):
    devices = mesh.make(jax.devices()[:count], sharding=sharding)
    with mesh.context(devices):
        operator = _operator(devices)
        found = curvature.lanczos(operator, KEY, rank=RANK, top=4, which="both ends", vectors=True)
        asymmetry = float(curvature.asymmetry(operator, KEY))
    scale = np.abs(_alone().values).max()
    np.testing.assert_allclose(found.values, _alone().values, atol=1e-6 * scale)  # Measured: 9e-8.
    np.testing.assert_allclose(found.ritz, _alone().ritz, atol=2e-6 * scale)  # Measured: 2e-7.
    assert asymmetry < 1e-7  # Measured: 2e-9.


def test_under_data_parallelism_a_step_sends_sums_only():
    devices = mesh.make(jax.devices())
    operator = _operator(devices)
    parameters = 4 * trees.count(operator.like)
    for compiled in (
        batches._apply.lower(operator, operator.like).compile(),
        _step(operator, krylov.start(operator, KEY, rank=RANK)),
    ):
        sent = _sent(compiled)
        assert {each.kind for each in sent} == {"all-reduce"}
        # XLA for CPU sums the two terms of a kernel's tangent apart; for TPU, together (results/curvature.md).
        assert parameters <= collectives.total_bytes(sent) <= 2 * parameters + 64


@pytest.mark.parametrize(("microbatch", "passes"), [(3, 8), (16, 4), (24, 3)])
def test_under_data_parallelism_a_microbatch_has_rows_of_every_device_and_sends_sums_only(microbatch, passes):
    """64 images: 8 (3, rounded up) at a time, 16, and 24, 24 and the 16 left over."""
    devices = mesh.make(jax.devices())
    operator = _operator(devices, 64, microbatch)
    sent = _sent(batches._apply.lower(operator, operator.like).compile())
    parameters = 4 * trees.count(operator.like)
    assert {(each.kind, each.group) for each in sent} == {("all-reduce", 8)}
    assert sum(each.count for each in sent if each.bytes >= parameters) == passes
    assert collectives.total_bytes(sent) <= passes * (2 * parameters + 64)
    vector = trees.normal_like(KEY, operator.like)
    expected, found = _operator(devices, 64)(vector), operator(vector)
    assert float(trees.norm(trees.add(found, expected, -1.0)) / trees.norm(expected)) < 2e-6  # Measured: 3e-7.


def test_under_data_parallelism_an_ascent_sends_sums_only_too():
    operator = _operator(mesh.make(jax.devices()), 64, 16)
    parts = operator.like, operator.batch, operator.context
    slope = batches.assemble(ascents.Slope(LOSS), *parts, None, 16)
    sent = _sent(jax.jit(batches.mean).lower(slope, operator.like).compile())
    assert {(each.kind, each.group) for each in sent} == {("all-reduce", 8)}


def test_under_data_parallelism_parts_hold_rows_of_all_devices_and_join_to_the_batch():
    devices = mesh.make(jax.devices())
    rows = mesh.put_global(devices, {"row": np.arange(64, dtype=np.int32)})
    placed = mesh.sharing(rows)
    for size in (8, 16, 24):
        stacked, rest = jax.jit(mesh.parts, static_argnums=(1, 2))(rows, size, placed)
        for part in [*np.asarray(stacked["row"]), *([] if rest is None else [np.asarray(rest["row"])])]:
            assert set(np.bincount(part // 8, minlength=8)) == {len(part) // 8}
        np.testing.assert_array_equal(mesh.joined(stacked, rest, placed)["row"], np.arange(64))
    alone, rest = mesh.parts({"row": np.arange(7)}, 3, None)
    np.testing.assert_array_equal(alone["row"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(rest["row"], [6])


def test_under_data_parallelism_labels_are_drawn_as_on_one_device():
    drawn = []
    for count in (1, 8):
        devices = mesh.make(jax.devices()[:count])
        model = _model()
        model = model.replace(variables=jax.device_put(model.variables, mesh.replicated(devices)))
        batch = mesh.put_global(devices, _batch(64))
        options = {"kind": "sampled", "key": KEY, "microbatch": 24, "separable": False}
        drawn.append(np.asarray(curvature.fisher(_logits, model.params, batch, model, **options).batch[1]))
    np.testing.assert_array_equal(*drawn)


def _logits(params, batch, model):
    return model.with_params(params)(batch["image"])


@dataclasses.dataclass(frozen=True)
class _Objective:
    """The training loss of the model, and nothing else."""

    metrics: ClassVar[tuple[str, ...]] = ("loss",)

    def __call__(self, params, model_state, batch, key):
        loss = LOSS(params, batch, _model())
        return loss, (model_state, {"loss": loss})


def test_under_data_parallelism_parts_of_a_training_batch_send_sums_only():
    devices, optimizer = mesh.make(jax.devices()), optimizers.build("sgd", learning_rate=0.1)
    variables = jax.device_put(_model().variables, mesh.replicated(devices))
    start = train_state.create(variables, optimizer, metrics=("loss", *train_step.STEP_METRICS), average=False)
    batch = mesh.put_global(devices, _batch(64))
    compiled = train_step.compile_step(
        train_step.build(_Objective(), optimizer, accumulate=4),
        state_sharding=mesh.replicated(devices),
        batch_sharding=mesh.batched(devices),
    )
    sent = _sent(compiled.lower(start, batch, KEY).compile())
    parameters = 4 * trees.count(variables["params"])
    assert {(each.kind, each.group) for each in sent} == {("all-reduce", 8)}
    assert 4 * parameters <= collectives.total_bytes(sent) <= 4 * parameters + 256


def test_under_fsdp_no_vector_is_gathered_beyond_a_layer_and_the_basis_lies_as_the_parameters():
    devices = mesh.make(jax.devices(), sharding="fsdp")
    with mesh.context(devices):
        operator = _operator(devices)
        split = [leaf for leaf in jax.tree.leaves(operator.like) if not leaf.sharding.is_fully_replicated]
        assert split
        product = _sent(batches._apply.lower(operator, operator.like).compile())
        decomposition = krylov.start(operator, KEY, rank=RANK)
        step = _sent(_step(operator, decomposition))
        extended = krylov.extend(operator, decomposition, steps=2)
    gathered = [each for each in product if each.kind == "all-gather"]
    # A layer's kernel, and the tangent in it: each once, one layer after the other.
    share = max(leaf.size for leaf in split) * 4 // devices.size
    assert {each.bytes for each in gathered} == {share}
    assert sum(each.count for each in gathered) == 2 * len(split)
    # Lanczos itself sends inner products and norms.
    rest = [each for each in step if each not in product]
    assert {each.kind for each in rest} == {"all-reduce"}
    assert collectives.total_bytes(rest) < 8 * 4 * (RANK + 4)
    leaves, layout = jax.tree.leaves(operator.like), extended.layout
    assert sorted(sum(layout.groups, ())) == list(range(len(leaves)))
    for rows, group in zip(extended.basis, layout.groups, strict=True):
        for leaf in (leaves[index] for index in group):
            wanted = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, None, *leaf.sharding.spec))
            assert rows.shape[1:] == (len(group), *leaf.shape)
            assert rows.sharding.is_equivalent_to(wanted, rows.ndim)


def test_what_8_devices_saved_2_go_on_with(tmp_path):
    options = {"rank": RANK, "top": 4, "which": "both ends", "check_every": 4, "tolerance": 1e-12}
    operators = {}
    for count in (8, 2):
        devices = mesh.make(jax.devices()[:count], sharding="fsdp")
        with mesh.context(devices):
            operators[count] = devices, _operator(devices)
    devices, operator = operators[8]
    with mesh.context(devices):
        state = krylov.start(operator, KEY, rank=RANK)
        saved = growth.Saved(tmp_path, operator, state)
        saved.save(krylov.extend(operator, state, steps=4), 4)
        saved.close()
    devices, operator = operators[2]
    with mesh.context(devices):
        found = curvature.lanczos(operator, KEY, folder=tmp_path, **options)
    assert found.applications == RANK
    np.testing.assert_allclose(found.values, _alone().values, atol=2e-6 * np.abs(_alone().values).max())


def test_mini_batches_in_lock_step_share_the_devices_and_send_nothing():
    rng, devices = np.random.default_rng(2), mesh.make(jax.devices())
    model = _model()
    model = model.replace(variables=jax.device_put(model.variables, mesh.replicated(devices)))
    operators = []
    for _ in range(8):
        batch = {
            "image": jnp.asarray(rng.uniform(size=(2, 16, 16, 3)), jnp.float32),
            "label": jnp.asarray(rng.integers(0, 10, 2), jnp.int32),
        }
        operators.append(curvature.hessian(LOSS, model.params, batch, model, separable=False))
    keys, options = jax.random.split(KEY, 8), {"rank": 8, "top": 2}
    stacked = curvature.together(operators, mesh=devices)
    found = curvature.example_eigenvalues(stacked, keys, **options)
    one = curvature.lanczos(operators[5], keys[5], **options)
    np.testing.assert_allclose(found.values[5], one.values, atol=1e-6 * np.abs(one.values).max())
    planned = per_example.planned(stacked, keys, rank=8)[0]
    arguments = (*planned.static, *planned.arguments)
    assert not _sent(planned.function.lower(*arguments).compile())
