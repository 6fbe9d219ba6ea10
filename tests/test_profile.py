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
        return jnp.tanh(x @ x / 100.0) @ x

    state = jnp.ones((512, 512))
    work(state).block_until_ready()
    trace = progress.Trace(tmp_path / "profile", start=3, steps=4, last=20)
    for step in range(1, 12):  # As in training, no step is waited for: some are in flight at both ends.
        trace.at(step, state)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state = work(state)
    trace.close()
    found = profile.read(tmp_path)
    assert found.steps == 4
    assert 0 < found.busy <= found.window
    assert {one.module for one in found.operations} == {"jit_work"}
    assert len(found.operations) >= 2
    assert {one.calls for one in found.operations} == {4}
    assert found.operations[0].seconds == max(one.seconds for one in found.operations)
    assert profile.main([str(tmp_path), "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 steps in ")
    assert "(jit_work)" in printed


def test_a_window_ends_with_training(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    trace = progress.Trace(tmp_path, start=3, steps=9, last=4)
    for step in range(1, 6):
        calls.append(step)
        trace.at(step, jnp.zeros(()))
    assert calls == [1, 2, 3, "start", 4, 5, "stop"]


def test_a_window_that_is_never_reached_is_said_once(tmp_path, caplog):
    progress.Trace(tmp_path, start=8, steps=5, last=8)
    progress.Trace(tmp_path, start=10, steps=0, last=8)
    assert caplog.messages == []
    progress.Trace(tmp_path, start=10, steps=5, last=8)
    (message,) = caplog.messages
    assert "it would begin at step 10, and training ends at 8; set profile.start lower" in message


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
