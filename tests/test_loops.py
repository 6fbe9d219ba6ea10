"""Loops: the same result by every route, a host loop exactly where a convolution meets a CPU, and no trace twice."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import classifier, errors, loops


def _double_and_add(state, index, offset):
    return {"x": 2.0 * state["x"] + offset + index}


def _convolve(state, index, kernel):
    del index
    return jax.lax.conv_general_dilated(state, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_in_a_branch(state, index, kernel):
    @jax.custom_vjp
    def hidden(state):
        return jax.lax.cond(index > 0, lambda s: jax.jit(_convolve)(s, index, kernel), lambda s: s, state)

    hidden.defvjp(lambda state: (hidden(state), None), lambda _, cotangent: (cotangent,))
    return jax.lax.scan(lambda s, _: (hidden(s), None), state, None, length=2)[0]


@pytest.fixture
def image_and_kernel():
    return jax.random.normal(jax.random.key(0), (1, 5, 5, 2)), 0.3 * jax.random.normal(jax.random.key(1), (3, 3, 2, 2))


def _python_loop(step, state, length, *operands):
    for index in range(length):
        state = step(state, index, *operands)
    return state


@pytest.mark.parametrize("length", [0, 1, 5])
def test_repeat_is_the_python_loop(length):
    state, offset = {"x": jnp.arange(3.0)}, jnp.float32(0.5)
    found = loops.repeat(_double_and_add, state, length, offset)
    np.testing.assert_array_equal(found["x"], _python_loop(_double_and_add, state, length, offset)["x"])
    np.testing.assert_array_equal(state["x"], np.arange(3.0))  # Not donated.


def test_donated_state_is_given_up():
    state = {"x": jnp.arange(3.0)}
    loops.repeat(_double_and_add, state, 2, jnp.float32(1.0), donate=True)
    assert state["x"].is_deleted()


@pytest.mark.parametrize("length", [1, 4, loops.UNROLL_LIMIT + 1])
@pytest.mark.parametrize("route", ["concrete", "jit", "vmap"])
def test_a_convolution_gives_the_same_by_every_route(image_and_kernel, length, route):
    image, kernel = image_and_kernel
    expected = _python_loop(_convolve, image, length, kernel)
    if route == "concrete":
        found = loops.repeat(_convolve, image, length, kernel)
    elif route == "jit":
        found = jax.jit(lambda i, k: loops.repeat(_convolve, i, length, k))(image, kernel)
    else:
        found = jax.vmap(lambda i: loops.repeat(_convolve, i, length, kernel))(image[None])[0]
    # Powers of a random kernel decay: compare relative to the largest entry. Measured: 3e-7.
    np.testing.assert_allclose(found, expected, atol=2e-6 * float(jnp.abs(expected).max()))
    np.testing.assert_array_equal(image, image_and_kernel[0])


@pytest.mark.parametrize(
    ("step", "expected"), [(_double_and_add, False), (_convolve, True), (_convolve_in_a_branch, True)]
)
def test_convolutions_are_found_however_deep(image_and_kernel, step, expected):
    image, kernel = image_and_kernel
    operands = ({"x": image}, jnp.float32(0.0)) if step is _double_and_add else (image, kernel)
    assert loops.convolves(step, *operands) is expected


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the host loop is for convolutions on a CPU")
def test_only_a_convolution_on_a_cpu_leaves_the_scan(image_and_kernel, monkeypatch):
    scans = []
    scan = loops._scan
    monkeypatch.setattr(loops, "_scan", lambda *arguments: scans.append(arguments[0]) or scan(*arguments))
    image, kernel = image_and_kernel
    loops.repeat(_double_and_add, {"x": image}, 3, jnp.float32(0.0))
    assert scans == [_double_and_add]
    loops.repeat(_convolve, image, loops.UNROLL_LIMIT + 1, kernel)
    unrolled = jax.make_jaxpr(lambda i: loops.repeat(_convolve, i, 3, kernel))(image)
    assert scans == [_double_and_add]
    assert "scan" not in str(unrolled)
    assert "scan" in str(jax.make_jaxpr(lambda i: loops.repeat(_convolve, i, loops.UNROLL_LIMIT + 1, kernel))(image))


class _Network(nn.Module):
    convolves: bool

    @nn.compact
    def __call__(self, images, *, gates=None):
        _TRACES.append(self.convolves)
        x = nn.Conv(3, (3, 3))(images) if self.convolves else images
        return nn.Dense(4)(x.reshape(x.shape[0], -1)), {}


_TRACES: list[bool] = []


@dataclasses.dataclass(frozen=True)
class _Nudge:
    """A step that is a fresh but equal object every time."""

    size: float

    def __call__(self, state, index, model):
        return state + self.size * index * jnp.mean(model(state))


@pytest.mark.parametrize("convolves", [False, True])
def test_equal_classifiers_cost_one_trace(convolves):
    images = jnp.ones((2, 4, 4, 3))
    models = []
    for seed in range(3):
        variables = _Network(convolves).init(jax.random.key(seed), images)
        models.append(classifier.Classifier(variables, _Network(convolves), classifier.ImageSpec((4, 4))))
    _TRACES.clear()
    results = [loops.repeat(_Nudge(0.1), images, 3, model) for model in models]
    assert len(_TRACES) == 1
    assert not np.array_equal(results[0], results[1])


def _sums(batch, factor):
    return {"sum": factor * jnp.sum(batch["x"], axis=0), "count": jnp.int32(batch["x"].shape[0])}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_accumulate_sums_in_float32(dtype):
    x = jax.random.normal(jax.random.key(0), (200, 4, 3)).astype(dtype)
    found = loops.accumulate(_sums, {"x": x}, jnp.asarray(2.0, dtype))
    per_batch = np.asarray(jax.vmap(lambda b: jnp.asarray(2.0, dtype) * jnp.sum(b, axis=0))(x), np.float64)
    assert found["sum"].dtype == jnp.float32
    # bfloat16 accumulators would be off by 1e-1 here. Measured: 4e-6.
    np.testing.assert_allclose(found["sum"], per_batch.sum(axis=0), atol=2e-5)
    assert found["count"] == 800


def _convolved_sum(batch, kernel):
    return jnp.sum(_convolve(batch, 0, kernel) ** 2)


def test_accumulate_takes_convolutions(image_and_kernel):
    _, kernel = image_and_kernel
    batches = jax.random.normal(jax.random.key(2), (3, 2, 5, 5, 2))
    expected = sum(_convolved_sum(batch, kernel) for batch in batches)
    np.testing.assert_allclose(loops.accumulate(_convolved_sum, batches, kernel), expected, rtol=1e-6)
    gradient = jax.grad(lambda k: loops.accumulate(_convolved_sum, batches, k))(kernel)
    direct = jax.grad(lambda k: sum(_convolved_sum(batch, k) for batch in batches))(kernel)
    np.testing.assert_allclose(gradient, direct, rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A function of each example alone; with a convolution, which takes the host loop on a CPU."""

    convolved: bool

    def __call__(self, batch, kernel):
        images, labels = batch
        out = _convolve(images, 0, kernel) if self.convolved else images * kernel.sum()
        return {"out": out, "twice": 2 * labels}


@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_slices_joined_are_the_batch(convolved, size, image_and_kernel):
    _, kernel = image_and_kernel
    batch = (jax.random.normal(jax.random.key(2), (6, 5, 5, 2)), jnp.arange(6))
    function = _Rows(convolved)
    found = loops.concatenate(function, batch, kernel, size=size)
    expected = function(batch, kernel)
    np.testing.assert_array_equal(found["twice"], expected["twice"])
    np.testing.assert_allclose(found["out"], expected["out"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0, 4, 7])
def test_a_slice_that_does_not_divide_the_batch_is_told(size):
    with pytest.raises(errors.UserError, match=f"6 examples cannot be taken {size} at a time: choose a divisor of 6"):
        loops.split({"x": jnp.zeros((6, 2))}, size)
