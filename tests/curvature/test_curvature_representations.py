"""Bends of paths against curves whose curvature is known, kinks that derivatives do not see, rounding, and draws."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, curvature, errors, models
from robust_vit.curvature import representations

TRACES = []


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def helix(inputs, radius, rise):
    """`(r cos x, r sin x, b x, 0)` of each single number x; a circle for b = 0."""
    x = inputs[:, 0]
    return jnp.stack([radius * jnp.cos(x), radius * jnp.sin(x), rise * x, 0.0 * x], axis=1)


def latitude(inputs, tilt):
    """A circle of latitude on a sphere of radius 2, turned about an axis."""
    x = inputs[:, 0]
    circle = 2.0 * jnp.stack([np.cos(0.6) * jnp.cos(x), np.cos(0.6) * jnp.sin(x), np.sin(0.6) + 0.0 * x], axis=1)
    return circle @ tilt


def linear(inputs, kernel):
    TRACES.append(None)
    return inputs.reshape(len(inputs), -1) @ kernel


@dataclasses.dataclass(frozen=True)
class Network:
    """Two hidden layers."""

    activation: str

    def __call__(self, inputs, weights):
        activation = {"relu": jax.nn.relu, "tanh": jnp.tanh}[self.activation]
        hidden = inputs.reshape(len(inputs), -1)
        for kernel in weights[:-1]:
            hidden = activation(hidden @ kernel + 0.1)
        return hidden @ weights[-1]


def make_weights(*sizes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), len(sizes))
    return [
        jax.random.normal(key, (rows, columns), dtype) / np.sqrt(rows)
        for key, rows, columns in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]


def line(values, dtype=jnp.float64):
    return jnp.asarray(values, dtype)[:, None]


def test_on_a_circle_the_angle_is_the_step(double):
    starts, directions = line([0.0, 1.3, -2.0]), line([1.0, 1.0, -1.0])
    for radius in (1e-3, 1.0, 50.0):
        found = curvature.direction_change(helix, starts, directions, radius, 0.0, span=2.0, steps=8)
        np.testing.assert_allclose(found.angles, 0.25, rtol=1e-11)
        np.testing.assert_allclose(found.lengths, 2 * radius * np.sin(0.125), rtol=1e-11)
        np.testing.assert_allclose(found.straightness, np.sin(1.0) / (8 * np.sin(0.125)), rtol=1e-11)
        turning = curvature.turning(helix, starts, directions, radius, 0.0)
        np.testing.assert_allclose(turning.curvature, 1 / radius, rtol=1e-11)
        np.testing.assert_allclose(turning.rate, 1.0, rtol=1e-11)
        np.testing.assert_allclose(turning.speed, radius, rtol=1e-11)
    tangents = curvature.tangent_change(helix, starts, 2 * directions, 3.0, 0.0, step=0.1)
    np.testing.assert_allclose(tangents, 0.2, rtol=1e-11)
    # The arc cosine of a number next to one would give 0 or 1.5e-8: here the smallest angles keep their digits.
    found = curvature.direction_change(helix, starts, directions, 1.0, 0.0, span=8e-6, steps=8)
    np.testing.assert_allclose(found.angles, 1e-6, rtol=5e-3)
    assert np.all(found.noise < 1e-8)
    tangents = curvature.tangent_change(helix, starts, directions, 1.0, 0.0, step=1e-9)
    np.testing.assert_allclose(tangents, 1e-9, rtol=1e-6)


def test_helix_and_sphere_have_their_curvature_whatever_the_speed(double):
    radius, rise = 2.0, 0.7
    tilt = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    for speed in (0.3, 5.0):
        turning = curvature.turning(helix, line([0.4, 0.0, 0.0]), line([speed] * 3), radius, rise)
        np.testing.assert_allclose(turning.curvature, radius / (radius**2 + rise**2), rtol=1e-11)
        np.testing.assert_allclose(turning.rate, speed * radius / np.hypot(radius, rise), rtol=1e-11)
        around = curvature.turning(latitude, line([0.4]), line([speed]), tilt)
        np.testing.assert_allclose(around.curvature, 1 / (2 * np.cos(0.6)), rtol=1e-11)


def test_a_linear_map_goes_straight_and_its_rounding_is_the_noise():
    inputs = jax.random.uniform(jax.random.key(0), (64, 5, 5, 1))
    directions = curvature.line_directions(inputs, jax.random.split(jax.random.key(1), 64), count=1)[:, 0]
    kernel = make_weights(25, 40, 1)[0]
    for span in (1e-4, 1e-2, 1.0):
        found = curvature.direction_change(linear, inputs, directions, kernel, span=span, steps=10)
        ratio = np.sqrt(np.mean(np.square(found.angles / found.noise)))
        # Measured: 0.40 each time; a straight path's angles are all rounding, at each step size.
        assert 0.2 < ratio < 1.0
        np.testing.assert_allclose(found.linearity, 1.0, atol=1e-4)
    np.testing.assert_allclose(found.straightness, 1.0, atol=1e-6)
    turning = curvature.turning(linear, inputs, directions, kernel)
    assert np.all(turning.rate == 0.0)
    assert np.all(turning.curvature == 0.0)
    np.testing.assert_allclose(
        turning.speed, np.linalg.norm(np.asarray(directions).reshape(64, -1) @ kernel, axis=1), rtol=1e-5
    )


def small_vit():
    module = models.build("vit", num_classes=3, width=16, depth=1, heads=2, patch=4)
    spec = classifier.ImageSpec(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))
    return classifier.Classifier(models.init(module, spec, jax.random.key(0)), module, spec)


def pre_logits(images, model):
    return model.features(images)[1]["pre_logits"]


@pytest.mark.parametrize("name", ["network", pytest.param("vit", marks=pytest.mark.slow)])
def test_noise_is_what_float64_says_it_is(name):
    features, context = (
        (Network("tanh"), make_weights(64, 48, 48, 32)) if name == "network" else (pre_logits, small_vit())
    )
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        inputs = jnp.asarray(generator.uniform(size=(32, 8, 8, 1)))
        directions = jnp.asarray(generator.normal(size=(32, 8, 8, 1)))
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), context)
        if name == "vit":
            exact = exact.replace(module=exact.module.clone(dtype="float64"))
        truth = curvature.direction_change(features, inputs, directions, exact, span=4e-5, steps=4)
        assert truth.angles.dtype == jnp.float64
        truth = np.asarray(truth.angles)
    inputs, directions = jnp.asarray(inputs, jnp.float32), jnp.asarray(directions, jnp.float32)
    found = curvature.direction_change(features, inputs, directions, context, span=4e-5, steps=4)
    assert truth.max() < 0.2 * np.median(found.noise)
    ratio = np.sqrt(np.mean(np.square((np.asarray(found.angles) - truth) / np.asarray(found.noise))))
    # Measured: 0.9 for the network, 0.7 for the ViT.
    assert 0.2 < ratio < 2.0, ratio


def test_small_steps_turn_by_the_step_times_the_rate(double):
    weights = make_weights(30, 40, 40, 20, dtype=jnp.float64)
    inputs = jax.random.normal(jax.random.key(0), (6, 30), jnp.float64)
    directions = jax.random.normal(jax.random.key(1), (6, 30), jnp.float64)
    network = Network("tanh")
    errors_of = []
    for step in (1e-2, 1e-3):
        # The angle belongs to the middle of its three points.
        found = curvature.direction_change(
            network, inputs - step * directions, directions, weights, span=2 * step, steps=2
        )
        rate = curvature.turning(network, inputs, directions, weights).rate
        errors_of.append(np.max(np.abs(found.angles[:, 0] / (step * rate) - 1)))
        np.testing.assert_allclose(
            curvature.tangent_change(network, inputs - step / 2 * directions, directions, weights, step=step),
            step * rate,
            rtol=100 * step**2,
        )
    # The error of the difference falls with the square of the step.
    assert errors_of[0] < 1e-2
    assert errors_of[1] < 2e-2 * errors_of[0]


def test_the_sum_of_angles_is_the_integral_of_the_rate(double):
    weights = make_weights(30, 40, 40, 20, dtype=jnp.float64)
    inputs = jax.random.normal(jax.random.key(0), (3, 30), jnp.float64)
    directions = jax.random.normal(jax.random.key(1), (3, 30), jnp.float64)
    network = Network("tanh")
    found = curvature.direction_change(network, inputs, directions, weights, span=1.0, steps=200)
    places = np.arange(1, 200) / 200
    rates = [curvature.turning(network, inputs + place * directions, directions, weights).rate for place in places[::3]]
    total = np.trapezoid(np.asarray(rates), dx=3 / 200, axis=0)
    np.testing.assert_allclose(np.sum(found.angles[:, : 3 * 66], axis=1), total, rtol=2e-2)
    # Points that lie on an arc are not on a line: of all the variance, what the principal direction leaves.
    path = np.asarray(curvature.feature_path(network, inputs, directions, weights, span=1.0, steps=200))
    for index in range(3):
        values = np.linalg.svd(path[index] - path[index].mean(axis=0), compute_uv=False) ** 2
        np.testing.assert_allclose(found.linearity[index], values[0] / values.sum(), rtol=1e-10)


def test_a_network_of_relus_has_no_turning_rate_and_turns_all_the_same():
    weights = make_weights(30, 64, 64, 20)
    inputs = jax.random.normal(jax.random.key(0), (8, 30))
    directions = jax.random.normal(jax.random.key(1), (8, 30))
    network = Network("relu")
    turning = curvature.turning(network, inputs, directions, weights)
    assert np.all(turning.rate == 0.0)
    assert np.all(turning.speed > 0.0)
    found = curvature.direction_change(network, inputs, directions, weights, span=0.2, steps=4)
    assert np.all(np.max(found.angles, axis=1) > 100 * np.max(found.noise, axis=1))
    tangents = curvature.tangent_change(network, inputs, directions, weights, step=0.05)
    assert np.median(tangents) > 1e-2
    # Below the first kink there is nothing.
    assert np.median(curvature.tangent_change(network, inputs, directions, weights, step=1e-6)) < 1e-6


@pytest.mark.slow
def test_a_resnet_has_no_turning_rate():
    module = models.build("resnet", num_classes=3, depth=8, width=4)
    spec = classifier.ImageSpec(size=(8, 8))
    model = classifier.Classifier(models.init(module, spec, jax.random.key(0)), module, spec)
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    turning = curvature.turning(pre_logits, images, jnp.ones_like(images), model)
    assert np.all(turning.rate == 0.0)
    assert np.all(turning.speed > 0.0)


def test_the_sweep_is_the_paths_one_by_one_in_one_compilation():
    weights = make_weights(12, 20, 20, 6)
    inputs = jax.random.uniform(jax.random.key(0), (3, 2, 2, 3))
    keys = jax.random.split(jax.random.key(5), 3)
    network, options = Network("tanh"), {"span": 0.5, "steps": 5}
    before = representations._measure_drawn._cache_size()
    found = curvature.sweep_directions(network, inputs, keys, weights, directions=7, batch=4, **options)
    assert found.angles.shape == (3, 7, 4)
    assert found.straightness.shape == (3, 7)
    other = [2 * kernel for kernel in weights]
    curvature.sweep_directions(network, inputs, keys, other, directions=7, batch=4, span=0.1, steps=5)
    assert representations._measure_drawn._cache_size() == before + 1
    directions = curvature.line_directions(inputs, keys, count=7)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(directions**2, axis=(2, 3, 4))), 1.0, rtol=1e-6)
    starts, flat = np.repeat(inputs, 7, axis=0), np.asarray(directions).reshape(21, *inputs.shape[1:])
    alone = curvature.direction_change(network, starts, flat, weights, **options)
    np.testing.assert_allclose(found.angles.reshape(21, -1), alone.angles, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.linearity.ravel(), alone.linearity, rtol=1e-5)
    # A direction is a function of its image's key and its own number: not of its neighbours, nor of how many there are.
    turned = curvature.sweep_directions(network, inputs[::-1], keys[::-1], weights, directions=2, batch=4, **options)
    np.testing.assert_allclose(turned.angles[::-1], found.angles[:, :2], rtol=1e-4, atol=1e-6)
    assert representations._measure_drawn._cache_size() == before + 1
    assert np.abs(np.diff(found.angles, axis=1)).max() > 1e-3


def test_a_new_span_compiles_nothing_and_clipping_bends():
    kernel = make_weights(12, 5, 1)[0]
    inputs, directions = jnp.full((2, 2, 2, 3), 0.9), jax.random.normal(jax.random.key(0), (2, 2, 2, 3))
    curvature.direction_change(linear, inputs, directions, kernel, span=0.5, steps=4)
    count = len(TRACES)
    straight = curvature.direction_change(linear, inputs, directions, 2 * kernel, span=0.7, steps=4)
    # One more trace of shapes alone, for the check.
    assert len(TRACES) <= count + 1
    clipped = curvature.direction_change(linear, inputs, directions, 2 * kernel, span=0.7, steps=4, clip=True)
    assert np.max(straight.angles) < 1e-5
    assert np.max(clipped.angles) > 1e-2


def test_what_stands_still_has_no_angle_and_says_so():
    inputs = jnp.ones((2, 4))
    directions = jnp.stack([jnp.zeros(4), jnp.ones(4)])
    found = curvature.direction_change(linear, inputs, directions, jnp.eye(4), span=1.0, steps=3)
    np.testing.assert_array_equal(found.angles[0], 0.0)
    np.testing.assert_allclose(found.noise[0], np.pi)
    assert found.straightness[0] == found.linearity[0] == 1.0
    assert curvature.turning(linear, inputs, directions, jnp.eye(4)).rate[0] == 0.0
    # What is not a number is not zero.
    broken = curvature.direction_change(linear, inputs, directions, jnp.full((4, 4), np.nan), span=1.0, steps=3)
    assert np.isnan(broken.angles).all()
    assert np.isnan(broken.straightness).all()


def test_projections_keep_plane_curves_and_their_shape():
    angles = np.linspace(0, np.pi / 2, 21)
    arc = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 2)))[0]
    line_path = np.linspace(0, 3, 21)[:, None] * np.ones(50)[None]
    planes, shares = curvature.project_paths(np.stack([7 * arc @ basis.T + 5, line_path]))
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    np.testing.assert_allclose(shares[1], [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(planes[:, 0], 0.0, atol=1e-12)
    np.testing.assert_allclose(planes[1, :, 1], 0.0, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(planes[:, -1], axis=1), 1.0)
    lengths = np.linalg.norm(planes[0][:, None] - planes[0][None], axis=-1)
    np.testing.assert_allclose(lengths * np.sqrt(2), np.linalg.norm(arc[:, None] - arc[None], axis=-1), atol=1e-9)
    np.testing.assert_allclose(planes[:, -1], [[1.0, 0.0]] * 2, atol=1e-7)
    assert planes[0, :, 1].min() > -1e-9
    assert planes[0, :, 1].max() > 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1}, "whole number from 2"),
        ({"span": 0.0}, "positive length"),
        ({"directions": jnp.ones((2, 3))}, "one direction an input"),
        ({"features": lambda x, kernel: x.sum()}, "examples, dim"),
        ({"features": lambda x, kernel: (x @ kernel).astype(jnp.bfloat16)}, "in_float32"),
    ],
)
def test_what_is_no_path_is_told(change, message):
    given = {"features": linear, "directions": jnp.ones((2, 4)), "span": 1.0, "steps": 3, **change}
    features, directions = given.pop("features"), given.pop("directions")
    with pytest.raises(errors.UserError, match=message):
        curvature.direction_change(features, jnp.ones((2, 4)), directions, jnp.eye(4), **given)


def test_attention_logits_are_not_additive_by_exactly_the_cross_terms(double):
    """Kim et al. 2022: A(X + P) = A(X) + A(P) + cross terms, where a convolution without bias is additive."""
    model = small_vit()
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.variables)
    block = jax.tree.map(np.asarray, variables["params"]["block00"])
    bias = generator.normal(size=48)
    variables["params"]["block00"]["query_key_value"]["bias"] = jnp.asarray(bias)
    model = model.replace(variables=variables, module=model.module.clone(dtype="float64"))
    images = generator.uniform(size=(2, 8, 8, 1))
    features = jax.tree.map(np.asarray, jax.jit(lambda model, x: model.features(x)[1])(model, images))

    def split(matrix):
        return np.moveaxis(matrix.reshape(*matrix.shape[:-1], 3, 2, 8), (-3, -2), (0, 1))

    (query, key, _), (query_bias, key_bias, _) = split(block["query_key_value"]["kernel"]), split(bias)

    def product(left, right, offsets=(0.0, 0.0)):
        """`[heads, batch, tokens, tokens]`: (left W_q + b_q) (right W_k + b_k)' / sqrt(d)."""
        left = np.einsum("btw,hwd->hbtd", left, query) + offsets[0]
        right = np.einsum("btw,hwd->hbtd", right, key) + offsets[1]
        return left @ right.swapaxes(-1, -2) / np.sqrt(8)

    def logits(tokens):
        return product(tokens, tokens, (query_bias[:, None, None], key_bias[:, None, None]))

    centred = features["stem"] - features["stem"].mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    tokens = scaled * block["attention_norm"]["scale"] + block["attention_norm"]["bias"]
    # These are the weights that this model attends with.
    weights = np.exp(logits(tokens)) / np.exp(logits(tokens)).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(weights.swapaxes(0, 1), features["block00/attention_weights"], atol=1e-12)

    change = generator.normal(size=tokens.shape)
    cross = product(tokens, change) + product(change, tokens)
    whole = product(tokens, tokens) + product(change, change) + cross
    np.testing.assert_allclose(product(tokens + change, tokens + change), whole, atol=1e-12)
    assert np.abs(cross).max() > 0.1
    # With the biases of query and key A(0) is not zero, and the sum on the right counts it once too often.
    both = logits(tokens) + logits(change) + cross - logits(0 * tokens)
    np.testing.assert_allclose(logits(tokens + change), both, atol=1e-12)
    # What is left over is linear in P, and A(P) is quadratic.
    for factor in (1e-3, 7.0):
        moved = factor * change
        left_over = product(tokens + moved, tokens + moved) - product(tokens, tokens) - product(moved, moved)
        np.testing.assert_allclose(left_over, factor * cross, atol=1e-11)
        np.testing.assert_allclose(product(moved, moved), factor**2 * product(change, change), rtol=1e-12, atol=1e-12)

    convolution = nn.Conv(4, (3, 3), use_bias=False)
    kernel = {"params": {"kernel": jnp.asarray(generator.normal(size=(3, 3, 1, 4)))}}
    other = generator.normal(size=images.shape)
    one, two, both = (convolution.apply(kernel, given) for given in (images, other, images + other))
    np.testing.assert_allclose(both, one + two, atol=1e-12)
