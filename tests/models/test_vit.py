"""The ViT: each option against what it is defined as."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from robust_vit import classifier, models

SHAPE = (2, 8, 8, 1)
SMALL = {"width": 16, "depth": 1, "heads": 2, "patch": 2}


def _build(**given):
    return models.build("vit", num_classes=3, **{**SMALL, **given})


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(module, variables, images, train=False, key=None, gates=None):
    rngs = None if key is None else {"dropout": key}
    return module.apply(variables, images, train=train, rngs=rngs, gates=gates)


def _images(seed=0, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _layer_norm(x, params):
    x = np.asarray(x, np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_embedding_is_a_strided_convolution(random_variables):
    module = _build(head="gap", position="none")
    variables = random_variables(module, SHAPE)
    _, features = _run(module, variables, _images())
    embedding = variables["params"]["embedding"]
    expected = jax.lax.conv_general_dilated(
        _images(),
        embedding["kernel"].reshape(2, 2, 1, 16),
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(2, 16, 16)
    np.testing.assert_allclose(features["stem"], expected + embedding["bias"][None, None], rtol=1e-5, atol=1e-5)


def test_without_branches_the_logits_are_a_closed_form(random_variables):
    module = _build()
    variables = random_variables(module, SHAPE)
    params = variables["params"]
    logits, features = _run(module, variables, _images(), gates=jnp.zeros((1, 2)))
    # The class token has seen nothing: its logits are a function of the parameters alone.
    token = _layer_norm(params["class_token"][0, 0] + params["position"][0], params["norm"])
    expected = token @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(logits, np.broadcast_to(expected, (2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(features["block00/out"], features["stem"])


def test_a_block_is_its_formula(random_variables):
    module = _build(layer_scale=0.1)
    variables = random_variables(module, SHAPE)
    block = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["block00"])
    _, features = _run(module, variables, _images())
    x = np.asarray(features["stem"], np.float64)
    normed = _layer_norm(x, block["attention_norm"])
    query_key_value = normed @ block["query_key_value"]["kernel"] + block["query_key_value"]["bias"]
    mixed = []
    for head in range(2):
        query, key, value = (query_key_value[..., 16 * i + 8 * head : 16 * i + 8 * head + 8] for i in range(3))
        weights = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(8))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(features["block00/attention_weights"][:, head], weights, rtol=1e-4, atol=1e-6)
        mixed.append(weights @ value)
    branch = np.concatenate(mixed, axis=-1) @ block["project"]["kernel"] + block["project"]["bias"]
    branch = branch * block["attention_scale"]
    np.testing.assert_allclose(features["block00/attention"], branch, rtol=1e-4, atol=1e-5)
    x = x + branch
    hidden = _layer_norm(x, block["mlp_norm"]) @ block["mlp"]["expand"]["kernel"] + block["mlp"]["expand"]["bias"]
    gelu = 0.5 * hidden * (1 + scipy.special.erf(hidden / np.sqrt(2)))
    branch = (gelu @ block["mlp"]["contract"]["kernel"] + block["mlp"]["contract"]["bias"]) * block["mlp_scale"]
    np.testing.assert_allclose(features["block00/mlp"], branch, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features["block00/out"], x + branch, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scan_and_loop_give_the_same_numbers(random_variables):
    given = {"depth": 2, "position": "relative", "layer_scale": 0.5}
    loop = _build(**given)
    variables = random_variables(loop, SHAPE)
    stacked = models.stack_blocks(variables)
    jax.tree.map(np.testing.assert_array_equal, models.unstack_blocks(stacked), variables)
    gates = jnp.asarray([[1.0, 0.5, 0.7, 1.0]])

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(module, variables):
        def loss(variables):
            logits, features = module.apply(variables, _images(), gates=gates)
            return jnp.sum(jnp.sin(logits)), (logits, features)

        return jax.grad(loss, has_aux=True)(variables)

    ours, (logits, features) = gradient(loop, variables)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for remat in (False, True):
        scan = _build(**given, scan=True, remat=remat)
        assert loop.branches == scan.branches
        theirs, (scanned_logits, scanned_features) = gradient(scan, stacked)
        close(logits, scanned_logits)
        assert features.keys() == scanned_features.keys()
        jax.tree.map(close, features, scanned_features)
        jax.tree.map(close, ours, models.unstack_blocks(theirs))


@pytest.mark.slow
def test_scan_and_loop_draw_the_same(random_variables):
    given = {"depth": 2, "dropout": 0.2, "stochastic_depth": 0.3}
    loop, scan = _build(**given), _build(**given, scan=True)
    variables = random_variables(loop, SHAPE)
    key = jax.random.key(7)
    logits, _ = _run(loop, variables, _images(), True, key)
    scanned, _ = _run(scan, models.stack_blocks(variables), _images(), True, key)
    np.testing.assert_allclose(logits, scanned, rtol=1e-4, atol=1e-5)
    assert jnp.abs(logits - _run(loop, variables, _images())[0]).max() > 1e-2


@pytest.mark.parametrize(
    "given",
    [
        {"depth": 2},
        {"position": "relative", "neighbourhood": 3, "layer_scale": 0.5},
        {"attention": "fused", "remat": True},
    ],
)
def test_the_class_token_alone_is_the_class_token_among_all(given, random_variables):
    module = _build(**given)
    variables = random_variables(module, SHAPE)
    head = variables["params"]["head"]
    gates = jnp.linspace(0.5, 1.5, 2 * module.depth)[None, :]

    def alone(pixels):
        return module.apply(variables, pixels, gates=gates)[0]

    def among_all(pixels):
        tokens = module.apply(variables, pixels, gates=gates)[1]["tokens"]
        return tokens[:, 0] @ head["kernel"] + head["bias"][None]

    found = []
    for read in (alone, among_all):
        logits, pull = jax.vjp(jax.jit(read), _images())
        found.append((logits, pull(jnp.cos(logits))[0]))
    # Measured: 4e-7.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *found)


def test_what_no_logit_reads_is_not_computed(random_variables):
    module = _build(width=32, depth=1)
    variables = random_variables(module, SHAPE)

    def count(read):
        run = jax.jit(lambda pixels: read(*module.apply(variables, pixels)))
        return run.lower(_images()).compile().cost_analysis()["flops"]

    # Query, key and value are a quarter of a block's products. Measured: 0.28, with embedding and head.
    assert count(lambda logits, _: logits) < 0.4 * count(lambda _, features: features["tokens"])


def test_remat_of_the_loop_changes_no_gradient(random_variables):
    plain, remat = _build(), _build(remat=True)
    variables = random_variables(plain, SHAPE)
    gradients = [
        jax.jit(jax.grad(lambda v, m=module: jnp.sum(jnp.sin(m.apply(v, _images())[0]))))(variables)
        for module in (plain, remat)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *gradients)


@pytest.mark.parametrize("head", ["gap", "map"])
def test_without_positions_patches_are_a_set(head, random_variables):
    module, ordered = _build(head=head, position="none"), _build(head=head)
    images = _images()
    order = np.random.default_rng(1).permutation(16)
    patches = images.reshape(2, 4, 2, 4, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 2, 2, 1)[:, order]
    shuffled = patches.reshape(2, 4, 4, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(SHAPE)
    for model, moved in ((module, False), (ordered, True)):
        variables = random_variables(model, SHAPE)
        difference = jnp.abs(_run(model, variables, images)[0] - _run(model, variables, shuffled)[0]).max()
        assert (difference > 1e-3) if moved else (difference < 1e-5)


def test_attention_pooling_reads_every_token_by_its_weights(random_variables):
    module = _build(head="map")
    _, features = _run(module, random_variables(module, SHAPE), _images())
    weights = features["pool/attention_weights"]
    assert weights.shape == (2, 2, 1, 16)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)


def test_gap_reads_the_mean_of_the_tokens(random_variables):
    module = _build(head="gap")
    _, features = _run(module, random_variables(module, SHAPE), _images())
    np.testing.assert_allclose(features["pre_logits"], features["tokens"].mean(axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["sincos1d", "sincos2d", "relative", "none"])
def test_only_learned_positions_are_parameters_of_the_stem(position, random_variables):
    module = _build(position=position)
    params = random_variables(module, SHAPE)["params"]
    assert "position" not in params
    assert ("relative_position" in params["block00"]) == (position == "relative")


@pytest.mark.parametrize("position", ["learned", "sincos1d", "sincos2d"])
def test_positions_are_added_to_the_stem(position, random_variables):
    module = _build(position=position)
    variables = random_variables(module, SHAPE)
    without = _build(position="none")
    params = {name: value for name, value in variables["params"].items() if name != "position"}
    difference = _run(module, variables, _images())[1]["stem"] - _run(without, {"params": params}, _images())[1]["stem"]
    np.testing.assert_allclose(difference[0], difference[1], atol=1e-5)
    assert jnp.abs(difference[0, 1:]).max() > 0.1
    if position == "sincos2d":
        np.testing.assert_array_equal(difference[:, 0], 0.0)


def test_relative_positions_move_the_attention_by_offset(random_variables):
    module = _build(position="relative", head="gap")
    variables = random_variables(module, SHAPE)
    block = variables["params"]["block00"]
    # Without queries only the bias is left, so two pairs of one offset have one ratio of weights.
    silent = jax.tree.map(jnp.zeros_like, block["query_key_value"])
    variables = {"params": {**variables["params"], "block00": {**block, "query_key_value": silent}}}
    weights = np.asarray(_run(module, variables, _images())[1]["block00/attention_weights"][0, 0]).reshape(4, 4, 4, 4)
    ratio = weights[1, 1, 1, 2] / weights[1, 1, 1, 1]
    np.testing.assert_allclose(weights[2, 0, 2, 1] / weights[2, 0, 2, 0], ratio, rtol=1e-4)
    assert abs(weights[1, 1, 1, 0] / weights[1, 1, 1, 1] - ratio) > 1e-3


@pytest.mark.parametrize(("window", "reach"), [(1, 0), (3, 1)])
def test_a_neighbourhood_bounds_what_a_patch_sees(window, reach, random_variables):
    module = _build(neighbourhood=window, head="gap")
    variables = random_variables(module, SHAPE)

    def centre(images):
        return jnp.sum(module.apply(variables, images)[1]["block00/out"].reshape(1, 4, 4, 16)[0, 1, 1])

    seen = np.abs(np.asarray(jax.jit(jax.grad(centre))(_images(shape=(1, 8, 8, 1)))))[0, :, :, 0]
    seen = seen.reshape(4, 2, 4, 2).max(axis=(1, 3)) > 0
    expected = np.zeros((4, 4), bool)
    expected[max(0, 1 - reach) : 2 + reach, max(0, 1 - reach) : 2 + reach] = True
    np.testing.assert_array_equal(seen, expected)


def test_a_neighbourhood_of_the_whole_grid_is_global_attention(random_variables):
    local, everywhere = _build(neighbourhood=7), _build()
    variables = random_variables(local, SHAPE)
    np.testing.assert_allclose(
        _run(local, variables, _images())[0], _run(everywhere, variables, _images())[0], rtol=1e-5, atol=1e-6
    )


def test_stochastic_depth_drops_branches_of_single_examples(random_variables):
    module = _build(stochastic_depth=0.8)
    variables = random_variables(module, SHAPE)
    images = _images(shape=(32, 8, 8, 1))
    key = jax.random.key(3)
    logits, features = _run(module, variables, images, True, key)
    dropped = np.stack([np.abs(features[name]).max(axis=(1, 2)) == 0 for name in module.branches], axis=1)
    assert 0 < dropped[:, 0].sum() < dropped[:, -1].sum() < 32
    # An example of which nothing was dropped is not the plain model's: what is kept is divided by its probability.
    again, _ = _run(module, variables, images, True, key)
    np.testing.assert_array_equal(logits, again)
    other, _ = _run(module, variables, images, True, jax.random.key(4))
    assert jnp.any(other != logits)
    plain = _build()
    np.testing.assert_array_equal(_run(module, variables, images)[0], _run(plain, variables, images)[0])


def test_dropout_zeroes_its_share_and_keeps_the_mean(random_variables):
    module = _build(dropout=0.25)
    variables = random_variables(module, SHAPE)
    images = jnp.repeat(_images(shape=(1, 8, 8, 1)), 256, axis=0)
    _, features = _run(module, variables, images, True, jax.random.key(0))
    _, plain = _run(module, variables, images)
    stem = np.asarray(features["stem"])
    np.testing.assert_allclose((stem == 0).mean(), 0.25, atol=0.01)
    kept = np.where(stem == 0, np.asarray(plain["stem"]) / 0.75, stem)
    np.testing.assert_allclose(kept, np.asarray(plain["stem"]) / 0.75, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((np.asarray(features["block00/mlp"]) == 0).mean(), 0.25, atol=0.01)


def test_training_without_randomness_is_evaluation(random_variables):
    module = _build()
    variables = random_variables(module, SHAPE)
    np.testing.assert_array_equal(_run(module, variables, _images(), True)[0], _run(module, variables, _images())[0])


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(random_variables):
    half, full = _build(dtype="bfloat16"), _build()
    variables = random_variables(full, SHAPE)
    logits, features = _run(half, variables, _images())
    expected, _ = _run(full, variables, _images())
    assert logits.dtype == jnp.float32
    assert {features[name].dtype for name in (*half.branches, "stem", "pre_logits")} == {jnp.dtype("bfloat16")}
    # Measured: 0.8 % of the largest logit.
    np.testing.assert_allclose(logits, expected, atol=0.04 * float(jnp.abs(expected).max()))


def test_without_qkv_bias_and_with_tanh_gelu(random_variables):
    module = _build(qkv_bias=False, approximate_gelu=True)
    variables = random_variables(module, SHAPE)
    assert set(variables["params"]["block00"]["query_key_value"]) == {"kernel"}
    exact = _build(qkv_bias=False)
    difference = jnp.abs(_run(module, variables, _images())[0] - _run(exact, variables, _images())[0]).max()
    assert 0.0 < difference < 1e-2


def test_a_named_size_with_another_width_keeps_its_proportions():
    module = models.build("vit", num_classes=2, size="Ti", width=64, patch=4)
    assert (module.width, module.depth, module.heads, module.mlp_width) == (64, 12, 2, 256)
    module = models.build("vit", num_classes=2, size="B", depth=3)
    assert (module.width, module.depth, module.heads, module.mlp_width) == (768, 3, 12, 3072)


@pytest.mark.parametrize("given", [{}, {"position": "relative", "neighbourhood": 3}, {"head": "map", "scan": True}])
def test_fused_attention_is_the_same_model(given, random_variables):
    explicit, fused = _build(**given), _build(**given, attention="fused")
    variables = random_variables(explicit, SHAPE)
    assert jax.tree.map(jnp.shape, random_variables(fused, SHAPE)) == jax.tree.map(jnp.shape, variables)
    ours, theirs = (_run(module, variables, _images()) for module in (explicit, fused))
    assert ours[1].keys() == theirs[1].keys()
    # Measured: 2e-6.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), ours, theirs)
    alone = jax.jit(lambda v, x: fused.apply(v, x)[0])(variables, _images())
    np.testing.assert_allclose(alone, theirs[0], rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


def test_explicit_gives_the_model_of_which_every_derivative_exists():
    fused = _build(attention="fused")
    assert models.explicit(fused) == _build()
    resnet = models.build("resnet", num_classes=3, depth=8)
    assert models.explicit(resnet) is resnet
    spec = classifier.ImageSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.5,))
    half = classifier.Classifier(variables={}, module=_build(attention="fused", dtype="bfloat16"), spec=spec)
    assert classifier.in_float32(half).module == _build()
