"""Every registered model keeps the model contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, errors, models, trees
from robust_vit.models import initializers

TABLE = {
    "vit": {"width": 16, "depth": 2, "heads": 2, "patch": 4},
    "resnet": {"depth": 8, "width": 4},
}
SPEC = classifier.ImageSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.5,))


@pytest.fixture(scope="module", params=sorted(TABLE))
def model(request, random_variables):
    module = models.build(request.param, num_classes=5, **TABLE[request.param])
    return module, random_variables(module, (1, 8, 8, 1))


def _apply(module, variables, images, gates=None):
    return module.apply(variables, images, gates=gates)


_jitted = jax.jit(_apply, static_argnums=0)


def test_registry_equals_table():
    assert set(models.MODELS) == set(TABLE)


def test_contract(model):
    module, variables = model
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    logits, features = _jitted(module, variables, images)
    assert logits.shape == (3, 5)
    assert logits.dtype == jnp.float32
    assert set(module.branches) <= set(features)
    assert {"stem", "pre_logits"} <= set(features)
    assert all(value.shape[0] == 3 for value in features.values())
    assert hash(module) == hash(module.clone())
    assert module == module.clone()


def test_features_move_logits_by_rounding_only(model):
    module, variables = model
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    alone = jax.jit(lambda v, x: module.apply(v, x)[0])(variables, images)
    beside, _ = _jitted(module, variables, images)
    # Measured: 0 for both models.
    np.testing.assert_allclose(alone, beside, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_init_is_float32_and_a_function_of_the_key(name):
    module = models.build(name, num_classes=5, dtype="bfloat16", **TABLE[name])
    first, again, other = (models.init(module, SPEC, jax.random.key(seed)) for seed in (0, 0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any(np.any(np.asarray(a != b)) for a, b in zip(*map(jax.tree.leaves, (first, other)), strict=True))
    # Kernels keep the size of a signal to a small factor, but for a ViT's head, which is zero.
    kernels = {
        path: leaf for path, leaf in zip(trees.paths(first), jax.tree.leaves(first), strict=True) if "kernel" in path
    }
    for path, kernel in kernels.items():
        gain = float(jnp.sum(jnp.square(kernel)) / kernel.shape[-1])
        assert (gain == 0.0) if (name, path) == ("vit", "params/head/kernel") else 0.2 < gain < 8.0, path


@pytest.mark.parametrize(("name", "given"), [("vit", {}), ("vit", {"scan": True}), ("resnet", {})])
def test_unused_features_take_no_memory(name, given):
    depth = {"vit": 8, "resnet": 26}[name]
    module = models.build(name, num_classes=5, **{**TABLE[name], **given, "depth": depth})
    images = jnp.zeros((256, 8, 8, 1))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    compiled = jax.jit(lambda v, x: module.apply(v, x)[0]).lower(variables, images).compile()
    _, features = jax.eval_shape(module.apply, variables, images)
    held = sum(value.size * value.dtype.itemsize for value in features.values())
    # Measured: 0.29 (scan) to 0.46 (ResNet) of what the features would take.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * held


def test_gates_of_ones_are_the_model(model):
    module, variables = model
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    plain, _ = _jitted(module, variables, images)
    gated, _ = _jitted(module, variables, images, jnp.ones((1, len(module.branches))))
    np.testing.assert_allclose(plain, gated, rtol=1e-5, atol=1e-5)


def test_a_zero_gate_cuts_its_branch_and_no_other(model):
    module, variables = model
    count = len(module.branches)
    image = jax.random.normal(jax.random.key(1), (1, 8, 8, 1))
    images = jnp.repeat(image, count + 1, axis=0)
    gates = jnp.concatenate([1.0 - jnp.eye(count), jnp.ones((1, count))])
    logits, features = _jitted(module, variables, images, gates)
    for row, name in enumerate(module.branches):
        cut = jnp.abs(features[name].reshape(count + 1, -1)).max(axis=1)
        assert cut[row] == 0.0
        assert jnp.all(jnp.delete(cut, row) > 0.0)
        # Branches before the cut are as they were.
        for earlier in module.branches[:row]:
            np.testing.assert_allclose(features[earlier][row], features[earlier][-1], rtol=1e-5, atol=1e-5)
        assert jnp.abs(logits[row] - logits[-1]).max() > 1e-3
    # A sweep in one batch gives what one lesion at a time gives.
    alone, _ = _jitted(module, variables, image, gates[:1])
    np.testing.assert_allclose(alone[0], logits[0], rtol=1e-4, atol=1e-4)


def test_gates_are_linear_in_the_branch(model):
    module, variables = model
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    _, whole = _jitted(module, variables, images, jnp.ones((1, len(module.branches))))
    _, half = _jitted(module, variables, images, jnp.full((1, len(module.branches)), 0.5))
    first = module.branches[0]
    np.testing.assert_allclose(half[first], 0.5 * whole[first], rtol=1e-5, atol=1e-6)


def test_equal_classifiers_share_one_trace(random_variables):
    traces = []

    @jax.jit
    def logits(model, images):
        traces.append(1)
        return model(images)

    images = jnp.full((2, 8, 8, 1), 0.5)
    for name, given in TABLE.items():
        for seed in range(2):
            module = models.build(name, num_classes=5, **given)
            variables = random_variables(module, (1, 8, 8, 1), seed)
            logits(classifier.Classifier(variables, module, SPEC), images)
    assert len(traces) == len(TABLE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.build("vitt", num_classes=2), "did you mean 'vit'"),
        (lambda: models.build("vit", num_classes=2, widht=3), "did you mean 'width'"),
        (lambda: models.build("vit", num_classes=0, size="Ti"), "num_classes"),
        (lambda: models.build("vit", num_classes=2), "no size"),
        (lambda: models.build("vit", num_classes=2, size="XS"), "unknown ViT size"),
        (lambda: models.build("vit", num_classes=2, width=30, depth=1, heads=4), "do not divide"),
        (lambda: models.build("vit", num_classes=2, size="Ti", head="cls"), "unknown ViT head"),
        (lambda: models.build("vit", num_classes=2, size="Ti", position="sincos"), "unknown position embedding"),
        (lambda: models.build("vit", num_classes=2, width=18, depth=1, heads=2, position="sincos2d"), "multiple of 4"),
        (lambda: models.build("vit", num_classes=2, size="Ti", neighbourhood=4), "odd"),
        (lambda: models.build("vit", num_classes=2, size="Ti", dropout=1.0), "probability"),
        (lambda: models.build("vit", num_classes=2, size="Ti", dtype="bf16"), "did you mean 'bfloat16'"),
        (lambda: models.build("vit", num_classes=2, size="Ti", attention="fusd"), "did you mean 'fused'"),
        (lambda: models.build("vit", num_classes=2, size="Ti", patch=0), "positive"),
        (lambda: models.build("resnet", num_classes=2, depth=19), "depth 19"),
        (lambda: models.build("resnet", num_classes=2, depth=18, stem="cifr"), "did you mean 'cifar'"),
        (lambda: models.build("resnet", num_classes=2, norm_sets=("clean",)), '"main"'),
        (lambda: models.build("resnet", num_classes=2, stochastic_depth=-0.1), "probability"),
        (lambda: models.build("resnet", num_classes=2, width=0), "positive"),
        (
            lambda: models.init(models.build("vit", num_classes=2, size="Ti", patch=3), SPEC, jax.random.key(0)),
            "divides",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(call, message):
    with pytest.raises(errors.UserError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gates_of_another_shape_are_told(model):
    module, variables = model
    with pytest.raises(errors.UserError, match="gates have shape"):
        module.apply(variables, jnp.zeros((2, 8, 8, 1)), gates=jnp.ones((3, len(module.branches))))


# The papers' models at the papers' resolution and classes (Dosovitskiy et al. table 1, DeiT table 1, He et al. 2016 tables 1
# and 6), and the exact numbers of timm and torchvision.
PARAMETERS = [
    ("vit", {"size": "Ti"}, 224, 1000, 5_717_416),
    ("vit", {"size": "S"}, 224, 1000, 22_050_664),
    ("vit", {"size": "B"}, 224, 1000, 86_567_656),
    ("vit", {"size": "B", "scan": True}, 224, 1000, 86_567_656),
    ("vit", {"size": "B", "patch": 32}, 224, 1000, 88_224_232),
    ("vit", {"size": "L"}, 224, 1000, 304_326_632),
    ("vit", {"size": "H", "patch": 14}, 224, 1000, 632_045_800),
    ("resnet", {"depth": 18}, 224, 1000, 11_689_512),
    ("resnet", {"depth": 34}, 224, 1000, 21_797_672),
    ("resnet", {"depth": 50}, 224, 1000, 25_557_032),
    ("resnet", {"depth": 101}, 224, 1000, 44_549_160),
    ("resnet", {"depth": 152}, 224, 1000, 60_192_808),
    ("resnet", {"depth": 20}, 32, 10, 269_722),
    ("resnet", {"depth": 32}, 32, 10, 464_154),
    ("resnet", {"depth": 44}, 32, 10, 658_586),
    ("resnet", {"depth": 56}, 32, 10, 853_018),
    ("resnet", {"depth": 110}, 32, 10, 1_727_962),
    ("resnet", {"depth": 18, "stem": "cifar"}, 32, 10, 11_173_962),
]


@pytest.mark.parametrize(("name", "given", "size", "classes", "expected"), PARAMETERS)
def test_parameter_counts(name, given, size, classes, expected):
    module = models.build(name, num_classes=classes, **given)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    assert trees.count(variables["params"]) == expected


@pytest.mark.parametrize(
    ("initializer", "shape", "variance"),
    [
        (initializers.glorot, (3, 3, 16, 48), 2 / (9 * 64)),
        (initializers.glorot, (64, 192), 2 / 256),
        (initializers.square_projections, (64, 192), 1 / 64),
        (initializers.lecun, (64, 192), 1 / 64),
        (initializers.he, (3, 3, 16, 48), 2 / (9 * 48)),
        (initializers.position, (64, 192), 0.02**2),
    ],
)
def test_initial_values_have_the_stated_variance(initializer, shape, variance):
    values = np.asarray(initializer(jax.random.key(0), shape))
    assert values.shape == shape
    assert abs(values.mean()) < 5 * np.sqrt(variance / values.size)
    np.testing.assert_allclose(values.var(), variance, rtol=5 * np.sqrt(2 / values.size))
