"""What a program costs: operations and bytes against closed forms, and numbers chosen from memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import errors, programs


def _product(x, w):
    return x @ w


def _loops(x, w):
    def inner(carry, _):
        return carry @ w, None

    def outer(carry, _):
        return jax.lax.scan(inner, carry, None, length=3)[0], None

    return jax.lax.scan(outer, x, None, length=5)[0]


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _program(function, *arguments, **options):
    return programs.Program("test", jax.jit(function), arguments, **options)


def test_operations_and_bytes_of_a_product():
    cost = programs.inspect(_program(_product, _shape(64, 128), _shape(128, 32)))
    assert cost.flops == 2 * 64 * 128 * 32
    assert cost.argument_bytes == 4 * (64 * 128 + 128 * 32)
    assert cost.output_bytes == 4 * 64 * 32
    assert cost.memory == cost.argument_bytes + cost.temporary_bytes + cost.output_bytes


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    once = programs.inspect(_program(_product, _shape(64, 64), _shape(64, 64))).flops
    looped = programs.inspect(_program(_loops, _shape(64, 64), _shape(64, 64))).flops
    assert looped == pytest.approx(15 * once, rel=1e-4)  # The loops' own counters add a few.


def test_convolutions_count_too():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def often(x, kernel):
        return jax.lax.scan(
            lambda carry, _: (carry + convolve(x, kernel), None), jnp.zeros((2, 6, 6, 5)), None, length=4
        )[0]

    jaxpr = jax.make_jaxpr(often)(jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))).jaxpr
    assert programs.loop_factor(jaxpr) == 4


def test_a_donated_argument_is_not_counted_twice():
    program = programs.Program("test", jax.jit(lambda x: x + 1.0, donate_argnums=0), (_shape(1000),), carry=0)
    cost = programs.inspect(program)
    assert (cost.argument_bytes, cost.output_bytes) == (4000, 0)
    assert 0 < programs.measure(program, cost, seconds=0.001) < 10  # Donated buffers are handed on, not used again.


def test_arrays_made_of_shapes():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    made = programs.materialise({"x": _shape(2, 3), "i": jax.ShapeDtypeStruct((4,), jnp.int32), "keys": keys, "n": 7})
    assert made["x"].shape == (2, 3)
    assert np.all(np.asarray(made["x"]) >= 0)
    assert made["i"].dtype == jnp.int32
    assert made["keys"].dtype == keys.dtype
    assert made["keys"].shape == (3,)
    assert made["n"] == 7


def test_memory_of_the_device_and_its_override(monkeypatch):
    monkeypatch.delenv(programs.LIMIT_VARIABLE, raising=False)
    assert 2**28 < programs.device_memory() < 2**50
    monkeypatch.setenv(programs.LIMIT_VARIABLE, "1.5")
    assert programs.device_memory() == 3 * 2**29
    monkeypatch.setenv(programs.LIMIT_VARIABLE, "16G")
    with pytest.raises(errors.UserError, match="expected a number of GiB"):
        programs.device_memory()


def _batched(batch):
    """16 KiB of weights, and 512 bytes an image."""
    return [_program(_product, _shape(batch, 64), _shape(64, 64))]


@pytest.mark.parametrize(("kibibytes", "expected"), [(1800, 256), (116, 64), (36, 4)])
def test_the_largest_power_of_two_that_fits(monkeypatch, kibibytes, expected):
    monkeypatch.setenv(programs.LIMIT_VARIABLE, str(kibibytes / 2**20))
    assert programs.choose_batch(_batched, most=200, what="batch") == expected
    limit = programs.margin() * kibibytes * 1024
    assert 16384 + 512 * expected <= limit
    assert expected == 256 or 16384 + 512 * 2 * expected > limit


def test_more_work_than_enough_is_no_use(monkeypatch):
    monkeypatch.setitem(programs.ENOUGH, "cpu", 2 * 64 * 64 * 10)  # Ten images.
    assert programs.choose_batch(_batched, most=1000, what="batch") == 16


def test_nothing_fits(monkeypatch):
    monkeypatch.setenv(programs.LIMIT_VARIABLE, str(8 / 2**20))
    with pytest.raises(errors.UserError, match="accuracy: batch=auto: even 1 needs 17 KiB, more than the 4.0 KiB"):
        programs.choose_batch(_batched, most=8, what="accuracy: batch")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"), True),
        (RuntimeError("INTERNAL: Ran out of memory in memory space hbm"), True),
        (RuntimeError("INVALID_ARGUMENT"), False),
    ],
)
def test_an_error_of_memory_is_known(error, expected):
    assert programs.out_of_memory(error) is expected


def test_sizes_in_words():
    assert [programs.size_text(n) for n in (12, 5 * 1024, 3.5 * 2**20, 15.75 * 2**30, 2**40)] == [
        "12 B", "5.0 KiB", "3.5 MiB", "15.8 GiB", "1024 GiB",
    ]  # fmt: skip
