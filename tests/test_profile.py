"""A trace is read back as JAX wrote it; times inside of times are counted once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from robust_vit import errors, profile, progress, settings


def test_times_without_what_ran_inside():
    events = [(0, 100, "loop"), (10, 40, "a"), (40, 60, "b"), (45, 50, "c"), (120, 130, "a")]
    assert profile._own_times(events) == [("loop", 50), ("a", 30), ("b", 15), ("c", 5), ("a", 10)]
    assert profile._union([(0, 10), (5, 20), (30, 40), (32, 35)]) == 30


def test_a_window_of_steps_is_read_back(tmp_path, capsys):
    @jax.jit
    def work(x):
        return jnp.tanh(x @ x) @ x

    x = jnp.ones((256, 256))
    work(x).block_until_ready()
    trace = progress.Trace(tmp_path / "profile", start=3, steps=4)
    for step in range(1, 10):
        trace.at(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            work(x).block_until_ready()
    trace.close()
    found = profile.read(tmp_path)
    assert found.steps == 4
    assert 0 < found.busy <= found.window
    assert {one.module for one in found.operations} == {"jit_work"}
    assert sum(one.calls for one in found.operations) >= 4 * 2
    assert found.operations[0].seconds == max(one.seconds for one in found.operations)
    assert profile.main([str(tmp_path), "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 steps in ")
    assert "(jit_work)" in printed


def test_a_folder_without_a_trace(tmp_path, capsys):
    with pytest.raises(errors.UserError, match="train with --config.profile.steps=5"):
        profile.read(tmp_path)
    (tmp_path / "torn.xplane.pb").write_bytes(b"\x0a\xff\xff")
    assert profile.main([str(tmp_path)]) == errors.EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("key", "value"), [("start", 0), ("steps", -1)])
def test_a_window_that_makes_no_sense(key, value):
    config = settings.default()
    config.profile[key] = value
    with pytest.raises(errors.UserError, match=f"profile.{key}={value}: expected"):
        settings.check_names(settings.resolve(config)["main"])
