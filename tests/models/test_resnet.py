"""The ResNet: shapes of the published forms, shortcuts, batch normalisation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import errors, models
from robust_vit.models import batch_norm

SHAPE = (4, 8, 8, 1)


def _build(**given):
    return models.build("resnet", num_classes=3, **{"depth": 8, "width": 4, **given})


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _run(module, variables, images, gates=None, train=False, norm_set="main", key=None):
    rngs = None if key is None else {"dropout": key}
    return module.apply(
        variables, images, train=train, gates=gates, norm_set=norm_set, rngs=rngs, mutable=["batch_stats"]
    )


def _images(seed=0, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("given", "size", "stem", "last"),
    [
        ({"depth": 18}, 224, (56, 64), (7, 512)),
        ({"depth": 50}, 224, (56, 64), (7, 2048)),
        ({"depth": 50, "width": 32}, 160, (40, 32), (5, 1024)),
        ({"depth": 18, "stem": "cifar"}, 32, (32, 64), (4, 512)),
        ({"depth": 20}, 32, (32, 16), (8, 64)),
        ({"depth": 20}, 28, (28, 16), (7, 64)),
        ({"depth": 56}, 32, (32, 16), (8, 64)),
    ],
)
def test_shapes_of_the_published_forms(given, size, stem, last):
    module = models.build("resnet", num_classes=10, **given)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    logits, features = jax.eval_shape(module.apply, variables, images)
    assert features["stem"].shape == (1, stem[0], stem[0], stem[1])
    assert features[module.branches[-1].replace("branch", "out")].shape == (1, last[0], last[0], last[1])
    assert features["pre_logits"].shape == (1, last[1])
    assert logits.shape == (1, 10)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152, 8, 20, 110])
def test_depth_counts_the_layers_with_weights(depth):
    module = models.build("resnet", num_classes=10, depth=depth)
    convolutions = 3 if module.bottleneck else 2
    assert 2 + convolutions * len(module.branches) == depth


def test_a_cut_identity_block_passes_its_input(random_variables):
    module = _build(depth=14)
    variables = random_variables(module, SHAPE)
    assert module.branches[1] == "stage1/block01/branch"
    (_, features), _ = _run(module, variables, _images(), jnp.ones((1, 6)).at[0, 1].set(0.0))
    np.testing.assert_array_equal(features["stage1/block01/out"], features["stage1/block00/out"])


def test_option_a_shortcut_subsamples_and_pads_with_zeros(random_variables):
    module = _build()
    variables = random_variables(module, SHAPE)
    (_, features), _ = _run(module, variables, _images(), jnp.zeros((1, 3)))
    before = features["stage1/block00/out"]
    after = features["stage2/block00/out"]
    assert after.shape == (4, 4, 4, 8)
    np.testing.assert_array_equal(after[..., 2:6], before[:, ::2, ::2])
    np.testing.assert_array_equal(after[..., :2], 0.0)
    np.testing.assert_array_equal(after[..., 6:], 0.0)
    assert not any("shortcut" in name for name in variables["params"]["stage2_block00"])


def test_zero_init_starts_every_branch_at_nothing():
    module = _build(zero_init_residual=True)
    variables = jax.jit(lambda key: module.init(key, _images()))(jax.random.key(0))
    (_, features), _ = _run(module, variables, _images())
    assert all(jnp.all(features[name] == 0.0) for name in module.branches)
    assert jnp.any(features["pre_logits"] != 0.0)


def _norm(norm_sets=("main",)):
    return batch_norm.BatchNorm(norm_sets)


def test_batch_norm_trains_on_the_batch_and_moves_the_statistics():
    x = 3.0 + 2.0 * _images(shape=(5, 4, 4, 3))
    norm = _norm()
    variables = norm.init(jax.random.key(0), x, train=False, norm_set="main")
    params = {"scale": jnp.asarray([1.0, 2.0, 0.5]), "bias": jnp.asarray([0.0, 1.0, -1.0])}
    variables = {**variables, "params": params}
    out, changed = norm.apply(variables, x, train=True, norm_set="main", mutable=["batch_stats"])
    wide = np.asarray(x, np.float64)
    mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    expected = (wide - mean) / np.sqrt(variance + 1e-5) * np.asarray(params["scale"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.9 + 0.1 * variance, rtol=1e-5)
    # Evaluation uses the running statistics, which are 0 and 1 here, and moves nothing.
    out, unchanged = norm.apply(variables, x, train=False, norm_set="main", mutable=["batch_stats"])
    expected = wide / np.sqrt(1 + 1e-5) * np.asarray(params["scale"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unchanged["batch_stats"], variables["batch_stats"])


def test_training_without_mutable_statistics_is_allowed():
    norm = _norm()
    x = _images(shape=(5, 4, 4, 3))
    variables = norm.init(jax.random.key(0), x, train=False, norm_set="main")
    frozen = norm.apply(variables, x, train=True, norm_set="main")
    moving, _ = norm.apply(variables, x, train=True, norm_set="main", mutable=["batch_stats"])
    np.testing.assert_array_equal(frozen, moving)


def test_norm_sets_are_apart(random_variables):
    module = _build(norm_sets=("main", "adversarial"))
    variables = random_variables(module, SHAPE)
    images = _images()
    (main, _), moved = _run(module, variables, images, None, True, "main")
    (other, _), moved_other = _run(module, variables, images, None, True, "adversarial")
    assert jnp.abs(main - other).max() > 1e-3

    def changed(after):
        flat = jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool(np.any(np.asarray(a != b))), after["batch_stats"], variables["batch_stats"])
        )
        return {jax.tree_util.keystr(path[-1:], simple=True) for path, different in flat if different}

    assert changed(moved) == {"mean", "var"}
    assert changed(moved_other) == {"mean_adversarial", "var_adversarial"}
    # The main set is the network that has only that one.
    alone = _build()
    names = jax.eval_shape(alone.init, jax.random.key(0), images)

    def only(tree, like):
        return {name: only(tree[name], like[name]) if isinstance(like[name], dict) else tree[name] for name in like}

    (expected, _), _ = _run(alone, only(variables, names), images, None, True, "main")
    np.testing.assert_allclose(main, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(errors.UserError, match="did you mean 'adversarial'"):
        module.apply(variables, images, norm_set="adversarail")


def test_stochastic_depth_drops_branches_of_single_examples(random_variables):
    module = _build(stochastic_depth=0.8)
    variables = random_variables(module, SHAPE)
    images = _images(shape=(32, 8, 8, 1))
    (_, features), _ = _run(module, variables, images, None, True, "main", jax.random.key(3))
    dropped = np.stack([np.abs(features[name]).max(axis=(1, 2, 3)) == 0 for name in module.branches], axis=1)
    assert 0 < dropped[:, 0].sum() < dropped[:, -1].sum() < 32


def test_bfloat16_keeps_statistics_and_logits_in_float32(random_variables):
    half, full = _build(dtype="bfloat16"), _build()
    variables = random_variables(full, SHAPE)
    (logits, features), moved = _run(half, variables, _images(), None, True)
    (expected, _), _ = _run(full, variables, _images(), None, True)
    assert logits.dtype == jnp.float32
    assert features["stage1/block00/branch"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))
