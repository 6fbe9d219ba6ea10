"""Training end to end on a tiny image folder: learning, resuming to the same bytes, what a mistake gets."""

from __future__ import annotations

import contextlib
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from robust_vit import checkpoints, errors, processes, progress, runs, settings, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Two classes of 8 px images that a linear model tells apart: reddish and bluish noise."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for label, name in enumerate(("red", "blue")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = random.integers(0, 60, (8, 8, 3))
                image[:, :, 2 * label] += 150
                Image.fromarray(image.astype(np.uint8)).save(root / split / name / f"{index:03d}.png")
    return root


def _config(folder, **flat) -> ml_collections.ConfigDict:
    config = settings.default()
    config.data.update(
        {"name": f"folder={folder}", "validation": 0.2, "augment": ("pad_crop(1)",), "batch": 16, "eval_batch": 16}
    )
    with config.unlocked():
        config.model = settings.model("vit", width=16, depth=1, heads=2, mlp_width=16, patch=4, dropout=0.1)
    config.train.steps = 12
    config.log_every = 5
    config.optimizer.learning_rate = 3e-3
    with config.ignore_type():
        config.update_from_flattened_dict(flat)
    return settings.resolve(config)["main"]


def _train(folder, workdir, stop=lambda: False, **flat) -> runs.Setup:
    setup = runs.prepare(_config(folder, **flat), workdir)
    train.train(setup, stop=stop)
    return setup


def _after(polls: int):
    count = iter(range(polls))
    return lambda: next(count, None) is None


def _leaves(setup) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(runs.restore(setup, "last")[0])]


def _same(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(_leaves(left), _leaves(right), strict=True))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> runs.Setup:
    """A run that was never interrupted."""
    return _train(folder, tmp_path_factory.mktemp("whole"))


def test_it_learns_and_writes_what_it_did(folder, tmp_path):
    setup = _train(folder, tmp_path, **{"train.steps": 60})
    lines = progress.read(setup.folder / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert [line for line in lines if "validation/accuracy" in line][-1]["validation/accuracy"] > 0.9
    assert list((setup.folder / "events").iterdir())
    subjects, step = runs.subjects(setup)
    assert step in checkpoints.steps(setup.folder / "checkpoints")
    batch = setup.bundle.test.batch(0)
    predicted = np.argmax(subjects["main"].classifier(batch["image"]), axis=-1)
    assert np.mean((predicted == batch["label"])[batch["mask"]]) > 0.9


def test_the_best_checkpoint_is_the_one_of_the_best_validation(folder, tmp_path):
    setup = _train(folder, tmp_path, **{"train.steps": 24})
    scores = {
        line["step"]: line["validation/accuracy"]
        for line in progress.read(setup.folder / "metrics.jsonl")
        if "validation/accuracy" in line
    }
    best = min(step for step, score in scores.items() if score == max(scores.values()))
    assert runs.restore(setup, "best")[1] == best
    assert runs.restore(setup, "last")[1] == 24


def test_a_damaged_best_checkpoint_is_replaced_by_the_newest_intact_one(folder, tmp_path, caplog):
    setup = _train(folder, tmp_path, **{"train.steps": 24})
    best = runs.restore(setup, "best")[1]
    if best == 24:
        (setup.folder / "checkpoints" / "24" / checkpoints.MANIFEST).unlink()
        assert runs.restore(setup, "best")[1] < 24
        return
    victim = max((setup.folder / "checkpoints" / str(best)).rglob("*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes() + b"x")
    assert runs.restore(setup, "best")[1] == 24
    assert f"checkpoint of step {best} is damaged" in caplog.text


def test_without_a_validation_split_the_last_checkpoint_is_read(folder, tmp_path):
    setup = _train(folder, tmp_path, **{"data.validation": 0.0, "train.steps": 4})
    subjects, step = runs.subjects(setup)
    assert step == 4
    assert subjects["main"].validation is None


@pytest.mark.slow
def test_logging_at_another_rhythm_after_a_resume_means_the_same(folder, tmp_path, whole):
    with pytest.raises(train.Stopped):
        _train(folder, tmp_path, stop=_after(7))
    resumed = _train(folder, tmp_path, log_every=12)
    last, expected = (
        [
            line
            for line in progress.read(setup.folder / "metrics.jsonl")
            if "train/loss" in line and line["step"] in (10, 12)
        ]
        for setup in (resumed, whole)
    )
    total = sum(line["train/loss"] * steps for line, steps in zip(expected, (5, 2), strict=True))
    assert last[-1]["train/loss"] == pytest.approx(total / 7, rel=1e-5)


@pytest.mark.parametrize("polls", [1, 4, 5, 8])
def test_stopped_and_resumed_ends_with_the_same_bytes(folder, tmp_path, whole, polls):
    with pytest.raises(train.Stopped, match=f"after step {polls} of 12"):
        _train(folder, tmp_path, stop=_after(polls))
    resumed = _train(folder, tmp_path)
    assert _same(whole, resumed)
    assert (resumed.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_the_end_of_the_warm_up_is_kept_through_kills_and_is_the_history(folder, tmp_path):
    flat = {"checkpoint.keep": 1, "optimizer.warmup_epochs": 0.8, "train.steps": 16, "study_step": "last"}
    kept = tmp_path / "main" / "checkpoints"
    with pytest.raises(train.Stopped):
        _train(folder, tmp_path, stop=_after(4), **flat)
    assert checkpoints.milestones(kept) == [4]
    setup = _train(folder, tmp_path, **flat)
    assert setup.warmup == 4
    # Beside it the newest and the best: the others are gone.
    assert checkpoints.milestones(kept) == [4]
    assert 4 in checkpoints.steps(kept)
    assert len(checkpoints.steps(kept)) <= 3
    subject = runs.subjects(setup)[0]["main"]
    assert list(subject.history) == [4]
    assert subject.early() == subject.warmup == 4
    early = checkpoints.read_raw(kept, 4)["params"]
    for read in (subject.history[4](), subject.past(4).params):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), dict(read), early))
    assert not np.array_equal(jax.tree.leaves(early)[0], jax.tree.leaves(subject.classifier.params)[0])


def test_milestones_are_words_steps_and_shares_and_no_part_of_what_is_trained(folder, tmp_path, whole):
    def steps(*asked, **flat):
        return set(runs.prepare(_config(folder, **flat, **{"checkpoint.milestones": asked}), tmp_path).milestones)

    assert whole.bundle.train.steps_per_epoch == whole.warmup == 5
    assert steps("epochs") == {5, 10}
    assert steps("warmup", 7, 0.5, 500) == {5, 6, 7}
    assert steps("warmup", **{"optimizer.warmup_epochs": 0.0}) == steps() == set()
    for wrong, message in (("warmpu", "did you mean 'warmup'"), (0, "has 0:"), (1.5, "has 1.5:"), (True, "has True:")):
        with pytest.raises(errors.UserError, match=message):
            steps(wrong)
    # A run that was trained without them goes on, and has no history.
    runs.prepare(_config(folder, **{"checkpoint.milestones": (3,)}), whole.folder.parent)
    flat = {"checkpoint.milestones": (), "study_step": "last"}
    with pytest.raises(train.Stopped):
        _train(folder, tmp_path, stop=_after(6), **flat)
    without = runs.prepare(_config(folder, **flat), tmp_path)
    assert checkpoints.milestones(without.folder / "checkpoints") == []
    subject = runs.subjects(without)[0]["main"]
    assert subject.history == {}
    assert subject.early() is None
    assert list(runs.history(whole, until=6)) == [5]
    assert list(runs.history(whole, until=5)) == []
    # The plan of a training that is yet to come knows what there will be.
    later = runs.prepare(_config(folder, **{"checkpoint.milestones": (2, 9)}), tmp_path / "new")
    assert list(runs.history(later, until=12)) == [2, 9]


def test_a_damaged_newest_checkpoint_costs_time_and_nothing_else(folder, tmp_path, whole, caplog):
    with pytest.raises(train.Stopped):
        _train(folder, tmp_path, stop=_after(9))
    newest = tmp_path / "main" / "checkpoints" / "9"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    resumed = _train(folder, tmp_path)
    assert "checkpoint of step 9 is damaged" in caplog.text
    assert _same(whole, resumed)


def test_a_finished_run_is_not_trained_again(folder, whole, caplog):
    before = _leaves(whole)
    caplog.set_level("INFO", logger="robust_vit")
    train.train(runs.prepare(_config(folder), whole.folder.parent))
    assert "training is finished" in caplog.text
    assert all(np.array_equal(a, b) for a, b in zip(before, _leaves(whole), strict=True))


def test_another_seed_is_another_run(folder, tmp_path, whole):
    assert not _same(whole, _train(folder, tmp_path, seed=1))


def test_a_workdir_of_another_configuration_is_refused(folder, whole):
    with pytest.raises(errors.UserError, match=r"was trained with optimizer.learning_rate=0.003, and 0.1 is asked for"):
        runs.prepare(_config(folder, **{"optimizer.learning_rate": 0.1}), whole.folder.parent)
    runs.prepare(_config(folder, **{"log_every": 3}), whole.folder.parent)


def test_a_loss_that_explodes_names_the_step_and_keeps_the_checkpoints(folder, tmp_path):
    with pytest.raises(
        errors.UserError, match=r"(loss|gradient_norm) is not finite at step \d+: lower optimizer.learning_rate"
    ):
        _train(
            folder,
            tmp_path,
            **{"optimizer.learning_rate": 1e30, "optimizer.name": "sgd", "optimizer.warmup_epochs": 0.0},
        )
    assert all(checkpoints.find_damage(path) is None for path in (tmp_path / "main" / "checkpoints").iterdir())


def test_resume_continues_another_run_and_init_takes_its_weights(folder, tmp_path, whole):
    continued = runs.prepare(_config(folder, **{"train.steps": 14, "resume": str(whole.folder)}), tmp_path / "a")
    train.train(continued)
    assert progress.read(continued.folder / "metrics.jsonl")[0]["step"] > 12
    with contextlib.suppress(train.Stopped):
        _train(folder, tmp_path / "b", stop=_after(0), **{"model.init": str(whole.folder)})
    setup = runs.prepare(_config(folder, **{"model.init": str(whole.folder)}), tmp_path / "b")
    state, step = runs.restore(setup, "last")
    assert step == 0
    expected = runs.restore(whole, "last")[0].params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), state.params, expected))


@pytest.mark.slow
def test_replicas_are_trained_together_and_studied_apart(folder, tmp_path):
    setup = _train(folder, tmp_path, replicas=2, study_step="last")
    subjects, _ = runs.subjects(setup)
    assert list(subjects) == ["main.seed0", "main.seed1"]
    kernels = [jax.tree.leaves(subject.classifier.params)[0] for subject in subjects.values()]
    assert not np.array_equal(*kernels)
    for name, subject in subjects.items():
        assert list(subject.history) == [5]
        past = jax.tree.leaves(subject.history[5]())[0]
        assert past.shape == kernels[0].shape
        raw = jax.tree.leaves(checkpoints.read_raw(setup.folder / "checkpoints", 5)["params"])[0]
        np.testing.assert_array_equal(past, raw[int(name[-1])])
    line = progress.read(setup.folder / "metrics.jsonl")[0]
    assert len(line["train/loss"]) == 2


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"model.name": "vitt"}, "did you mean 'vit'"),
        ({"model.patch": 3}, "patch"),
        ({"data.name": "folder=/nowhere"}, "/nowhere"),
        ({"train.accumulate": 3}, "train.accumulate=3 does not divide data.batch=16"),
        ({"objective.label_smoothing": 1.5}, "expected a share in"),
        ({"optimizer.decay_pattern": "weights"}, "finds none of the"),
        ({"resume": "/nowhere"}, "resume=/nowhere: no checkpoint"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, flat, message):
    with pytest.raises(errors.UserError) as raised:
        _train(folder, tmp_path, **flat)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flat",
    [{"train.accumulate": 2}, {"optimizer.name": "sam"}, {"optimizer.name": "lamb"}, {"train.average_decay": 0.9}],
)
def test_every_way_to_train_takes_steps(folder, tmp_path, flat):
    setup = _train(folder, tmp_path, **{"train.steps": 3}, **flat)
    state, step = runs.restore(setup, "last")
    assert step == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_the_learning_rate_scales_with_the_batch_from_its_reference(folder, tmp_path):
    setup = runs.prepare(_config(folder, **{"optimizer.reference_batch": 8, "optimizer.warmup_epochs": 0.0}), tmp_path)
    assert float(setup.schedule(0)) == pytest.approx(3e-3 * 16 / 8)


def test_a_profile_window_writes_a_trace(folder, tmp_path):
    setup = _train(folder, tmp_path, **{"train.steps": 4, "profile.start": 2, "profile.steps": 1})
    assert list((setup.folder / "profile").rglob("*.xplane.pb"))


def test_a_profile_of_a_run_that_is_finished_is_said_to_be_none(folder, whole, caplog):
    again = runs.prepare(_config(folder, **{"profile.steps": 5}), whole.folder.parent)
    train.train(again)
    assert "no profiler trace will be written: it would begin at step 22, and training ends at 12" in caplog.text


def test_between_cpu_processes_no_validation_batch_is_in_flight_with_the_next(whole, monkeypatch):
    state, waited = runs.restore(whole, "last")[0], []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: waited.append(result) or result)
    train.validate(whole, state)
    assert len(waited) == len(whole.bundle.validation)
