"""The runner: the same bytes with and without refill, in any order and after a kill; every pass counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors, processes
from robust_vit.attacks import runner

COUNT, CLASSES, SHAPE = 23, 4, (4, 4, 2)


def _dense(variables, images):
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


def _convolution(variables, images):
    return _dense(
        variables,
        jax.nn.relu(
            jax.lax.conv_general_dilated(
                images, variables["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        ),
    )


def _model(kind=_dense, seed: int = 0):
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    shapes = {"u": (size, 16), "w": (16, CLASSES), "k": (3, 3, 2, 2)}
    variables = {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for name, shape in shapes.items()}
    return classifier.wrap(kind, variables)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
    labels = np.array(_model()(images).argmax(axis=-1), np.int32)
    labels[::6] = (labels[::6] + 1) % CLASSES
    return {"image": images, "label": labels, "row": np.arange(100, 100 + COUNT, dtype=np.int32)}


@pytest.fixture(scope="module")
def attack():
    return attacks.build("pgd", epsilon=0.03, steps=4, restarts=2)


OPTIONS = {"slots": 5, "stride": 3, "keep_images": True}


def _assert_same(found, expected, order=slice(None)):
    for name, array in expected.records().items():
        np.testing.assert_array_equal(getattr(found, name), array[order], err_msg=name)
    np.testing.assert_array_equal(found.images, expected.images[order])


@pytest.mark.parametrize("kind", [_dense, _convolution])
def test_refilling_saves_passes_and_changes_no_byte(kind, attack, examples):
    refilled = attacks.run(attack, _model(kind), examples, **OPTIONS)
    plain = attacks.run(attack, _model(kind), examples, refill=False, **OPTIONS)
    _assert_same(refilled, plain)
    assert refilled.executed_backward_passes < plain.executed_backward_passes
    assert plain.useful < refilled.useful <= 1
    order = np.random.default_rng(2).permutation(COUNT)
    shuffled = attacks.run(attack, _model(kind), {name: array[order] for name, array in examples.items()}, **OPTIONS)
    _assert_same(shuffled, refilled, order)


def test_the_runner_finds_what_the_attack_finds(attack, examples):
    found = attacks.run(attack, _model(), examples, **OPTIONS)
    keys = attacks.example_keys(0, examples["row"])
    direct = attack(_model(), keys, examples["image"], examples["label"])
    np.testing.assert_array_equal(found.success, direct.success)
    np.testing.assert_array_equal(found.backward_passes, direct.backward_passes)
    np.testing.assert_allclose(found.images, direct.images, atol=1e-6)
    np.testing.assert_array_equal(found.row, examples["row"])
    np.testing.assert_array_equal(found.label, examples["label"])
    assert 0.2 < found.success.mean() < 1


def test_passes_are_counted(attack, examples):
    found = attacks.run(attack, _model(), examples, refill=False, **OPTIONS)
    # Without refilling, every batch of 5 runs until its slowest example is through, rounded up to the stride of 3.
    slowest = [found.backward_passes[start : start + 5].max() for start in range(0, COUNT, 5)]
    assert found.executed_backward_passes == sum(5 * 3 * -(-int(count) // 3) for count in slowest)
    assert found.executed_forward_passes == found.executed_backward_passes + 5 * len(slowest)
    assert (found.forward_passes == found.backward_passes + 1).all()
    assert (found.backward_passes[::6] == 1).all()  # Misclassified: one look at the clean image.
    assert found.backward_passes.max() == attack.evaluations


def test_batches_with_padding_are_examples(attack, examples):
    def batches():
        for start in range(0, COUNT, 8):
            rows = np.minimum(np.arange(start, start + 8), COUNT - 1)
            batch = {name: array[rows] for name, array in examples.items()}
            mask = np.arange(start, start + 8) < COUNT
            batch["image"][~mask], batch["label"][~mask] = np.nan, -1  # Padding may be anything.
            yield {**batch, "mask": mask}

    whole = attacks.run(attack, _model(), examples, **OPTIONS)
    _assert_same(attacks.run(attack, _model(), batches(), **OPTIONS), whole)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("after", [9, 14, COUNT])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(after, attack, examples, tmp_path):
    def until_killed():
        for index in range(COUNT):
            if index == after:
                raise _Killed
            yield {name: array[index : index + 1] for name, array in examples.items()}
        raise _Killed

    whole = attacks.run(attack, _model(), examples, **OPTIONS)
    with pytest.raises(_Killed):
        attacks.run(attack, _model(), until_killed(), directory=tmp_path, **OPTIONS)
    saved = len(list(tmp_path.glob("part_*.npz")))
    assert 0 < saved < -(-COUNT // OPTIONS["slots"])
    resumed = attacks.run(attack, _model(), examples, directory=tmp_path, **OPTIONS)
    _assert_same(resumed, whole)
    assert resumed.executed_backward_passes >= resumed.backward_passes.sum()
    # A finished run costs nothing more.
    before = sorted(path.name for path in tmp_path.iterdir())
    _assert_same(attacks.run(attack, _model(), examples, directory=tmp_path, **OPTIONS), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": {"epsilon": np.float32(0.04)}}, "another attack"),
        ({"model": 7}, "another model"),
        ({"seed": 3}, "another seed"),
        ({"slots": 6}, "another slots"),
        ({"rows": 1}, "other examples"),
    ],
)
def test_a_directory_of_another_run_is_refused(change, message, attack, examples, tmp_path):
    few = {name: array[:6] for name, array in examples.items()}
    attacks.run(attack, _model(), few, directory=tmp_path, **OPTIONS)
    changed = {**few, "row": few["row"] + change.get("rows", 0)}
    other = attack.replace(**change.get("attack", {}))
    options = {**OPTIONS, **{name: change[name] for name in ("seed", "slots") if name in change}}
    with pytest.raises(errors.UserError, match=message):
        attacks.run(other, _model(seed=change.get("model", 0)), changed, directory=tmp_path, **options)


def test_a_directory_of_other_pixels_is_refused(attack, examples, tmp_path):
    few = {name: array[:6] for name, array in examples.items()}
    attacks.run(attack, _model(), few, directory=tmp_path, **OPTIONS)
    with pytest.raises(errors.UserError, match="label . of other pixels"):
        attacks.run(attack, _model(), {**few, "image": few["image"][:, ::-1]}, directory=tmp_path, **OPTIONS)


def test_of_a_directory_only_the_given_examples_are_returned(attack, examples, tmp_path):
    whole = attacks.run(attack, _model(), examples, directory=tmp_path, **OPTIONS)
    few = {name: array[:6] for name, array in examples.items()}
    _assert_same(attacks.run(attack, _model(), few, directory=tmp_path, **OPTIONS), whole, slice(6))
    none = {name: array[:0] for name, array in examples.items()}
    with pytest.raises(errors.UserError, match="no examples"):
        attacks.run(attack, _model(), none, directory=tmp_path, **OPTIONS)


def _affine(weights):
    def affine(images):
        return images.reshape(images.shape[0], -1) @ weights

    return affine


def test_functions_are_known_by_their_names_and_what_they_were_made_with(attack, examples, tmp_path):
    """As in another process, the same function is another object; the same name with other weights is another model."""
    weights = np.random.default_rng(0).normal(size=(2, int(np.prod(SHAPE)), CLASSES)).astype(np.float32)
    few = {name: array[:3] for name, array in examples.items()}
    whole = attacks.run(attack, classifier.wrap(_affine(weights[0])), few, directory=tmp_path, **OPTIONS)
    again = attacks.run(attack, classifier.wrap(_affine(weights[0].copy())), few, directory=tmp_path, **OPTIONS)
    _assert_same(again, whole)
    assert len(list(tmp_path.glob("part_*.npz"))) == 1
    with pytest.raises(errors.UserError, match="another model"):
        attacks.run(attack, classifier.wrap(_affine(weights[1])), few, directory=tmp_path, **OPTIONS)


def test_an_attack_is_known_by_its_class(attack, examples, tmp_path):
    class Other(type(attack)):
        def step(self, model, state):
            return super().step(model, state)

    few = {name: array[:3] for name, array in examples.items()}
    attacks.run(attack, _model(), few, directory=tmp_path, **OPTIONS)
    with pytest.raises(errors.UserError, match="another attack"):
        attacks.run(Other(**vars(attack)), _model(), few, directory=tmp_path, **OPTIONS)


def test_only_the_first_process_writes(attack, examples, tmp_path, monkeypatch):
    few = {name: array[:3] for name, array in examples.items()}
    monkeypatch.setattr(processes, "is_first", lambda: False)
    alone = attacks.run(attack, _model(), few, directory=tmp_path, **OPTIONS)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    _assert_same(attacks.run(attack, _model(), few, directory=tmp_path, **OPTIONS), alone)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "part_00000.npz"}


def test_memory_is_that_of_the_slots(attack, monkeypatch):
    """Of arrays on the device: a few images a slot, and no more for ten times as many examples."""
    slots, side = 4, 32
    image = side * side * 4
    before = None
    peaks = {}

    def watched(function):
        def run(*arguments, **options):
            found = function(*arguments, **options)
            peak.append(sum(array.nbytes for array in jax.live_arrays()) - before)
            return found

        return run

    for name in ("fill", "advance", "judge"):
        monkeypatch.setattr(runner._Pool, name, watched(getattr(runner._Pool, name)))
    model = classifier.wrap(_brightness)
    for rounds in (2, 10):
        generator = np.random.default_rng(0)
        stream = (
            {"image": generator.uniform(size=(3, side, side, 1)).astype(np.float32), "label": np.zeros(3, np.int32)}
            for _ in range(rounds * slots // 3 + 1)
        )
        before, peak = sum(array.nbytes for array in jax.live_arrays()), []
        attacks.run(attack, model, stream, slots=slots)
        peaks[rounds] = max(peak)
    assert peaks[10] < peaks[2] + image
    # Of each slot the clean image, the current one and the best.
    assert peaks[10] <= 3 * slots * image + 4096


def _brightness(images):
    means = jnp.mean(images, axis=(1, 2, 3))
    return jnp.stack([means, 0.95 - means], axis=-1)


_TRACES = []


def _counted(variables, images):
    _TRACES.append(images.shape)
    return _dense(variables, images)


def test_a_second_run_traces_nothing(attack, examples):
    counts = []
    for seed in (0, 1):
        _TRACES.clear()
        attacks.run(attack.replace(epsilon=np.float32(0.01 + seed)), _model(_counted, seed), examples, **OPTIONS)
        counts.append(len(_TRACES))
    # The step, the judging pass, the look at how many logits there are, and the three passes before the first step.
    assert counts == [4, 0]


def _poisoned(variables, images):
    return _dense(variables, images) / (images[:, 0, 0, :1] > 0.05)


def _probabilities(variables, images):
    return jax.nn.softmax(_dense(variables, images))


def _batch_statistics(variables, images):
    logits = _dense(variables, images)
    return logits - jnp.mean(logits, axis=0, keepdims=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": lambda a: 255 * a}, "in \\[0, 1\\]"),
        ({"image": lambda a: (255 * a).astype(np.uint8)}, "divide uint8"),
        ({"image": lambda a: np.where(a > 0.9, np.nan, a)}, "in \\[0, 1\\]"),
        ({"label": lambda a: a + CLASSES - 1}, "0 to 3"),
        ({"label": lambda a: a[:4]}, "one class index"),
        ({"image": lambda a: (a - 0.5) / 0.25}, "normalised already"),
        ({"label": lambda a: np.eye(CLASSES, dtype=np.int32)[a]}, "argmax of one-hot rows"),
        ({"label": lambda a: a.astype(np.float32)}, "class indices"),
        ({"row": lambda a: a[:4]}, "row is"),
        ({"image": lambda a: a[:0], "label": lambda a: a[:0], "row": lambda a: a[:0]}, "no examples"),
        ({"model": _probabilities}, "before the softmax"),
        ({"model": _batch_statistics}, "training mode"),
        ({"goal": "targeted"}, "look like the labels"),
        ({"epsilon": -0.1}, "from 0"),
        ({"epsilon": 8.0}, "ends at 1"),
    ],
)
def test_a_mistake_says_what_to_do_before_the_first_step(change, message, examples, monkeypatch):
    def advance(self):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(runner._Pool, "advance", advance)
    changed = {**examples, **{name: change[name](examples[name]) for name in examples if name in change}}
    options = {"epsilon": 0.03, "steps": 4, **{name: change[name] for name in ("goal", "epsilon") if name in change}}
    with pytest.raises(errors.UserError, match=message):
        attacks.run(attacks.build("pgd", **options), _model(change.get("model", _dense)), changed, **OPTIONS)


def test_a_loss_that_is_not_finite_names_a_row(attack, examples):
    images = examples["image"].copy()
    images[13, 0, 0, 0] = 0.0
    with pytest.raises(errors.UserError, match=r"row 1\d\d"):
        attacks.run(attack, _model(_poisoned), {**examples, "image": images}, **OPTIONS)


@pytest.mark.parametrize("change", [{"slots": 0}, {"stride": 0}])
def test_slots_and_stride_start_at_one(change, attack, examples):
    with pytest.raises(errors.UserError, match="from 1"):
        attacks.run(attack, _model(), examples, **{**OPTIONS, **change})


def test_keys_come_from_the_row_alone():
    keys = attacks.example_keys(5, np.array([3, 9, 3]))
    data = np.asarray(jax.random.key_data(keys))
    np.testing.assert_array_equal(data[0], data[2])
    assert (data[0] != data[1]).any()
    assert (data[0] != np.asarray(jax.random.key_data(attacks.example_keys(6, np.array([3]))))[0]).any()
