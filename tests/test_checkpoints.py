"""Checkpoints: what is restored is what was saved, every damaged byte is noticed, no kill leaves half a step."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import checkpoints, errors

REPOSITORY = pathlib.Path(__file__).parents[1]


def _state(seed: int = 0):
    random = np.random.default_rng(seed)
    kernel = jnp.asarray(random.normal(size=(64, 33)), jnp.float32)
    return {"params": {"dense": {"kernel": kernel, "bias": jnp.arange(3.0)}}, "average": None, "step": jnp.int32(seed)}


def _save(folder, *seeds, **options):
    with contextlib.closing(checkpoints.Checkpoints(folder, **options)) as keeper:
        for seed in seeds:
            keeper.save(seed, _state(seed), metrics={"accuracy": 1.0 / seed})
    return folder


def _equal(left, right) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), left, right))


def test_what_is_restored_is_what_was_saved(tmp_path):
    _save(tmp_path, 3)
    restored = checkpoints.restore(tmp_path, _state())
    assert restored.step == 3
    assert restored.metrics == {"accuracy": pytest.approx(1 / 3)}
    assert _equal(restored.state, _state(3))


def test_no_checkpoint_is_none_and_a_missing_step_is_an_error(tmp_path):
    assert checkpoints.restore(tmp_path / "nowhere", _state()) is None
    _save(tmp_path, 3)
    with pytest.raises(errors.UserError, match=r"no checkpoint of step 4 .* there are \[3\]"):
        checkpoints.restore(tmp_path, _state(), step=4)


def test_the_newest_and_the_best_are_kept(tmp_path):
    _save(tmp_path, 1, 2, 3, 4, keep=2, best="accuracy")
    assert checkpoints.steps(tmp_path) == [1, 3, 4]
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, best="accuracy")) as keeper:
        assert keeper.best_step() == 1


def test_milestones_are_kept_whatever_a_later_configuration_says(tmp_path):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=1)) as keeper:
        for step in (1, 2, 3, 4):
            keeper.save(step, _state(step), milestone=step == 2)
    assert checkpoints.steps(tmp_path) == [2, 4]
    assert checkpoints.milestones(tmp_path) == [2]
    _save(tmp_path, 5, 6, keep=1)
    assert checkpoints.steps(tmp_path) == [2, 6]
    assert checkpoints.restore(tmp_path, _state()).step == 6
    assert _equal(checkpoints.restore(tmp_path, _state(), step=2).state, _state(2))
    assert checkpoints.milestones(tmp_path / "nowhere") == []
    (tmp_path / "2" / checkpoints.MANIFEST).write_bytes(b"{}")  # Who cannot be read is no milestone.
    assert checkpoints.milestones(tmp_path) == []


def test_the_earliest_of_equally_good_steps_is_the_best(tmp_path):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=3, best="accuracy")) as keeper:
        for step in (1, 2, 3):
            keeper.save(step, _state(step), metrics={"accuracy": 0.5})
        keeper.wait()
        assert keeper.best_step() == 1


def test_the_state_may_be_donated_at_once(tmp_path):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as keeper:
        state = {"kernel": jnp.ones((512, 512))}
        keeper.save(1, state)
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0.0, tree), donate_argnums=0)(state)
        keeper.wait()
        restored = keeper.restore({"kernel": jnp.zeros((512, 512))})
    assert float(jnp.min(restored.state["kernel"])) == 1.0


def test_every_flipped_byte_is_noticed(tmp_path):
    source = _save(tmp_path / "whole", 7)
    present = sorted(path for path in (source / "7").rglob("*") if path.is_file())
    assert checkpoints.find_damage(source / "7") is None
    draw = random.Random(0)
    weights = [path.stat().st_size for path in present]
    for index in range(50):
        # Half of the places by size, half of them by file: small files are as dangerous as large ones.
        path = draw.choices(present, weights)[0] if index % 2 else draw.choice(present)
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        whole = content[place]
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert checkpoints.find_damage(source / "7") is not None, (path.name, place)
        content[place] = whole
        path.write_bytes(content)
    assert checkpoints.find_damage(source / "7") is None


@pytest.mark.parametrize("harm", ["truncate", "remove", "add", "remove manifest"])
def test_a_damaged_step_falls_back_to_the_one_before_and_says_so(tmp_path, caplog, harm):
    _save(tmp_path, 1, 2)
    largest = max(
        (path for path in (tmp_path / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    if harm == "truncate":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif harm == "remove":
        largest.unlink()
    elif harm == "add":
        (tmp_path / "2" / "stray").write_text("x")
    else:
        (tmp_path / "2" / checkpoints.MANIFEST).unlink()
    restored = checkpoints.restore(tmp_path, _state())
    assert restored.step == 1
    assert _equal(restored.state, _state(1))
    assert "checkpoint of step 2 is damaged" in caplog.text


def test_a_damaged_step_is_written_again_and_set_aside(tmp_path):
    _save(tmp_path, 1, 2)
    (tmp_path / "2" / checkpoints.MANIFEST).unlink()
    _save(tmp_path, 2)
    assert checkpoints.find_damage(tmp_path / "2") is None
    assert (tmp_path / "2.damaged").is_dir()
    assert checkpoints.steps(tmp_path) == [1, 2]


def test_all_damaged_is_an_error_and_never_a_silent_fresh_start(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / "1" / checkpoints.MANIFEST).unlink()
    with pytest.raises(errors.UserError, match="every checkpoint in .* is damaged"):
        checkpoints.restore(tmp_path, _state())


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    _save(tmp_path, 1)
    other = _state()
    other["params"]["dense"]["kernel"] = jnp.zeros((64, 10))
    with pytest.raises(
        errors.UserError, match=r"params/dense/kernel is float32\[64, 33\] in the checkpoint and float32\[64, 10\]"
    ):
        checkpoints.restore(tmp_path, other)
    with pytest.raises(
        errors.UserError, match="other is absent in the checkpoint and float32.* in the config, and 3 more differ"
    ):
        checkpoints.restore(tmp_path, {"other": jnp.zeros(3)})


def test_variables_are_read_without_knowing_the_optimizer(tmp_path):
    _save(tmp_path, 5)
    assert _equal(checkpoints.read_variables(tmp_path)["params"], _state(5)["params"])
    with pytest.raises(errors.UserError, match="no checkpoint in"):
        checkpoints.read_variables(tmp_path / "nowhere")


def test_leftovers_of_a_kill_are_swept_and_never_restored(tmp_path):
    _save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.partial")
    shutil.copytree(tmp_path / "1", tmp_path / "0.deleted")
    assert checkpoints.steps(tmp_path) == [1]
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_a_full_disk_is_one_line_and_keeps_what_was_whole(tmp_path, monkeypatch):
    _save(tmp_path, 1)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as keeper:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints.files, "write_bytes", full)
        keeper.save(2, _state(2))
        with pytest.raises(errors.UserError, match="no space left while saving a checkpoint"):
            keeper.wait()
    assert checkpoints.restore(tmp_path, _state()).step == 1


_SAVER = """
import contextlib, sys
import jax.numpy as jnp
from robust_vit import checkpoints
with contextlib.closing(checkpoints.Checkpoints(sys.argv[1], keep=2)) as keeper:
    for step in range(1, 10_000):
        keeper.save(step, {"kernel": jnp.full((256, 1024), float(step))})
        print(step, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_only_whole_steps(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        saver = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(4 + attempt):
                assert saver.stdout.readline()
            time.sleep(0.003 * attempt)
        finally:
            saver.send_signal(signal.SIGKILL)
            saver.wait(timeout=30)
            saver.stdout.close()
        present = checkpoints.steps(folder)
        assert present
        assert all(checkpoints.find_damage(folder / str(step)) is None for step in present)
        restored = checkpoints.restore(folder, {"kernel": jnp.zeros((256, 1024))})
        assert float(jnp.min(restored.state["kernel"])) == float(jnp.max(restored.state["kernel"])) == restored.step
