"""Streams: what a batch may depend on, and that memory, disk, shards and resumption agree to the byte."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from robust_vit import data, errors, mesh
from robust_vit.data import decoding, prefetch, resident, sources, streams

AUGMENT = ("pad_crop(2)", "flip()")


def _source(n: int = 50, size: int = 12, channels: int = 3) -> data.ArraySource:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (n, size, size, channels), np.uint8)
    return data.from_arrays(images, np.arange(n) % 5, name="random pixels")


class _Encoded:
    """PNGs, some damaged, decoded at each access."""

    name, num_classes, class_names, fingerprint, shape = "pngs", 2, ("a", "b"), "0", (None, None, 3)

    def __init__(self, n: int, bad: tuple[int, ...] = (), on_bad_image: str = "skip"):
        self.rows = np.arange(n) + 1000
        self.bad, self.on_bad_image, self.reads = bad, on_bad_image, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        self.reads += 1
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(buffer, "PNG")
        content = buffer.getvalue()[: 40 if index in self.bad else None]
        image = decoding.decode(content, channels=3, name=f"file{index}.png")
        return {"image": image, "label": index % 2, "row": int(self.rows[index])}


def _assert_equal(first: data.Batch, second: data.Batch) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        np.testing.assert_array_equal(first[key], second[key])


def test_the_contract_of_a_batch():
    batch = data.TrainingStream(_source(), batch=8).batch(0)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "image": ("float32", (8, 12, 12, 3)),
        "label": ("int32", (8,)),
        "row": ("int32", (8,)),
        "mask": ("bool", (8,)),
    }
    assert batch["mask"].all()
    assert batch["image"].min() >= 0
    assert batch["image"].max() <= 1


def test_pixels_are_the_sources_divided_by_255():
    source = _source()
    batch = data.TrainingStream(source, batch=8, seed=1).batch(3)
    for image, label, row in zip(batch["image"], batch["label"], batch["row"], strict=True):
        np.testing.assert_array_equal(image, source.images[row].astype(np.float32) / np.float32(255))
        assert label == source.labels[row]


def test_every_epoch_is_a_different_permutation_with_different_draws():
    stream = data.TrainingStream(_source(), batch=10, augment=AUGMENT)
    epochs = [[stream.batch(step) for step in range(5 * e, 5 * e + 5)] for e in range(2)]
    orders = [np.concatenate([batch["row"] for batch in epoch]) for epoch in epochs]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert not np.array_equal(*orders)
    images = [np.concatenate([b["image"] for b in e])[np.argsort(o)] for e, o in zip(epochs, orders, strict=True)]
    same = (images[0] == images[1]).all((1, 2, 3)).mean()
    assert same < 0.2  # 1 in 50 is expected to have the same crop and the same side.


def test_a_batch_straddles_two_epochs():
    stream = data.TrainingStream(_source(), batch=16, seed=2)
    assert stream.steps_per_epoch == 4
    rows = np.concatenate([stream.batch(step)["row"] for step in range(25)])  # 400 positions: 8 epochs.
    for epoch in rows.reshape(8, 50):
        assert sorted(epoch) == list(range(50))


@pytest.mark.parametrize("augment", [AUGMENT, ("random_resized_crop(10, 0.3, 1.0)", "flip()")])
@pytest.mark.parametrize("batch", [6, 64])
def test_memory_and_disk_give_the_same_bytes_by_step_and_by_iteration(augment, batch):
    made = [
        data.TrainingStream(_source(), batch=batch, seed=5, augment=augment, cache=c, workers=3) for c in (True, False)
    ]
    for start in (0, 7):
        for step, (first, second) in enumerate(zip(*(stream.iterate(start) for stream in made), strict=True), start):
            _assert_equal(first, second)
            _assert_equal(first, made[0].batch(step))
            _assert_equal(first, made[1].batch(step))
            if step == start + 4:
                break


def test_shards_are_slices_of_the_global_batch():
    whole = data.TrainingStream(_source(), batch=12, seed=1, augment=AUGMENT)
    parts = [data.TrainingStream(_source(), batch=12, seed=1, augment=AUGMENT, shard=(i, 3)) for i in range(3)]
    for step in (0, 4, 9):
        together = [part.batch(step) for part in parts]
        _assert_equal(whole.batch(step), {key: np.concatenate([p[key] for p in together]) for key in together[0]})


def test_seeds_differ():
    first, second = (data.TrainingStream(_source(), batch=32, seed=seed).batch(0)["row"] for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("cache", [True, False])
def test_the_last_evaluation_batch_is_padded_and_masked(cache):
    stream = data.EvaluationStream(_source(), batch=16, cache=cache)
    batches = list(stream.iterate())
    assert len(batches) == len(stream) == 4
    assert [int(batch["mask"].sum()) for batch in batches] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([b["row"][b["mask"]] for b in batches]), np.arange(50))
    assert (batches[-1]["row"][2:] == 0).all()
    np.testing.assert_array_equal(batches[-1]["image"][5], batches[0]["image"][0])
    for index in (3, 1):
        _assert_equal(stream.batch(index), batches[index])
    _assert_equal(next(stream.iterate(2)), batches[2])
    assert list(stream.iterate(4)) == []
    with pytest.raises(IndexError):
        stream.batch(4)


def test_with_batch_shares_images_and_limits():
    source = _Encoded(60)
    stream = data.EvaluationStream(source, batch=16, cache=True)
    stream.batch(0)
    reads = source.reads
    other = stream.with_batch(7, limit=20)
    assert (len(other), other.num_examples, other.batch_size) == (3, 20, 7)
    assert sum(int(batch["mask"].sum()) for batch in other.iterate()) == 20
    assert source.reads == reads
    assert len(stream) == 4


@pytest.mark.parametrize("cache", [True, False])
def test_bad_images_are_skipped_and_counted(cache, caplog):
    source = _Encoded(200, bad=(3, 150))
    stream = data.EvaluationStream(source, batch=64, cache=cache)
    with caplog.at_level(logging.WARNING):
        batches = list(stream.iterate())
    mask = np.concatenate([batch["mask"] for batch in batches])[:200]
    assert list(np.flatnonzero(~mask)) == [3, 150]
    assert caplog.text.count("skipped image") == 2
    assert "file150.png" in caplog.text
    train = data.TrainingStream(source, batch=50, cache=cache)
    rows = np.concatenate([train.batch(step)["row"] for step in range(4)]) - 1000
    assert set(rows) == set(range(200)) - {3, 150}
    assert list(np.bincount(rows)[[4, 151]]) == [2, 2]


@pytest.mark.parametrize("cache", [True, False])
def test_more_than_one_percent_of_bad_images_stops(cache):
    stream = data.EvaluationStream(_Encoded(200, bad=(3, 50, 150)), batch=64, cache=cache)
    with pytest.raises(errors.UserError, match="3 of the 200 images of pngs cannot be decoded, more than 1%"):
        list(stream.iterate())


@pytest.mark.parametrize("cache", [True, False])
def test_a_bad_image_is_named(cache):
    stream = data.EvaluationStream(_Encoded(200, bad=(150,), on_bad_image="raise"), batch=64, cache=cache)
    with pytest.raises(errors.UserError, match=r"file150\.png cannot be decoded .*on_bad_image='skip'") as caught:
        list(stream.iterate())
    assert "\n" not in str(caught.value)


def test_sizes_that_differ_are_told():
    images = [np.zeros((8, 8 + i % 2, 3), np.uint8) for i in range(8)]
    source = _Encoded(8)
    source.__class__ = type(
        "_Uneven", (_Encoded,), {"__getitem__": lambda s, i: {"image": images[i], "label": 0, "row": i}}
    )
    for cache in (True, False):
        with pytest.raises(errors.UserError, match=r"8 x 8 and 8 x 9.*set data\.preprocess"):
            data.TrainingStream(source, batch=8, cache=cache).batch(0)


def test_auto_keeps_small_data_in_memory_and_leaves_large_on_disk(monkeypatch):
    source = _Encoded(20)
    data.EvaluationStream(source, batch=20).batch(0)
    assert source.reads == 21  # One to learn the size, then each once.
    monkeypatch.setattr("robust_vit.data.memory.MEMORY_LIMIT", 19 * 8 * 8 * 3)
    for cache, reads in (("auto", 41), ("never", 40), ("always", 20)):
        stream = data.EvaluationStream(_Encoded(20), batch=20, cache=cache)
        stream.batch(0)
        stream.batch(0)
        assert stream.source.reads == reads


@pytest.mark.parametrize("cache", [True, False])
def test_reading_threads_end_with_the_iterator(cache):
    before = threading.active_count()
    for _ in range(5):
        iterator = data.TrainingStream(_source(), batch=8, cache=cache, workers=4).iterate()
        next(iterator)
        iterator.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)"])
def test_an_interpreter_with_a_running_prefetch_exits_at_once(ending):
    script = textwrap.dedent(f"""
        import numpy as np
        from robust_vit import data
        source = data.from_arrays(np.zeros((500, 8, 8, 3), np.uint8), np.arange(500) % 2)
        streams = [data.TrainingStream(source, batch=64, cache=cache, workers=4).iterate() for cache in (True, False)]
        for iterator in streams:
            next(iterator)
        {ending}
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, text=True)
    assert result.returncode == (3 if "3" in ending else 0), result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 10, "shard": (0, 3)}, "multiple of the 3 processes"),
        ({"batch": 0}, "batch size is 0"),
        ({"batch": 8, "cache": "yes"}, "data.cache is 'yes'"),
        ({"batch": 8, "preprocess": ("flip()",)}, "move it to data.augment"),
        ({"batch": 8, "workers": -1}, "data.workers is -1"),
        ({"batch": 8, "extras": ("shape_label",)}, "unknown extra"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(errors.UserError, match=message):
        data.TrainingStream(_source(), **options).batch(0)


def test_a_limit_must_be_positive():
    with pytest.raises(errors.UserError, match="limit is 0"):
        data.EvaluationStream(_source(), batch=8, limit=0)


def test_a_chunk_boundary_is_no_boundary():
    stream = data.TrainingStream(_source(), batch=100, augment=AUGMENT)
    step = streams._CHUNK // 100
    batch = stream.batch(step)
    fresh = data.TrainingStream(_source(), batch=4, augment=AUGMENT)
    pieces = [fresh.batch(i) for i in range(step * 25, step * 25 + 25)]
    _assert_equal(batch, {key: np.concatenate([piece[key] for piece in pieces]) for key in batch})


MESH = mesh.make()


def test_float_pixels_of_the_device_are_the_hosts_to_the_last_bit():
    values = np.arange(256, dtype=np.uint8)
    for made in (jax.jit(prefetch.to_float)(values), prefetch.to_float(jnp.asarray(values))):
        np.testing.assert_array_equal(made, values.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("augment", [(), AUGMENT, ("flip()", "pad_crop(3, 'reflect')")])
@pytest.mark.parametrize("cache", ["device", "always", "never"])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_on_the_devices_are_the_hosts_to_the_byte(augment, cache, channels):
    source = sources.Subset(_source(channels=channels), np.arange(3, 47), name="part")
    stream = data.TrainingStream(source, batch=12, seed=3, augment=augment, cache=cache)
    for start in (0, 5):
        batches = stream.on_devices(MESH, start)
        for step in range(start, start + 6):
            batch, expected = next(batches), stream.batch(step)
            assert set(batch) == {"image", "label"}
            for name, array in batch.items():
                assert isinstance(array, jax.Array)
                assert array.dtype == expected[name].dtype
                np.testing.assert_array_equal(array, expected[name])
        batches.close()


def test_images_that_stay_on_the_device_are_not_read_again(monkeypatch):
    stream = data.TrainingStream(_source(), batch=8, augment=AUGMENT, cache="device")
    batches = stream.on_devices(MESH)
    next(batches)
    monkeypatch.setattr(stream._images, "read", None)
    next(batches)
    batches.close()


def test_bad_images_are_skipped_on_the_device_too():
    stream = data.TrainingStream(_Encoded(200, bad=(3, 150)), batch=50, augment=("flip()",), cache="device")
    batches = stream.on_devices(MESH)
    for step in range(4):
        np.testing.assert_array_equal(next(batches)["image"], stream.batch(step)["image"])


def test_auto_stays_on_the_host_of_a_cpu_and_goes_to_an_accelerator(monkeypatch):
    taken = []
    monkeypatch.setattr(resident, "batches", lambda *_: taken.append("device") or iter(()))
    stream = data.TrainingStream(_source(), batch=8, augment=AUGMENT)
    next(stream.on_devices(MESH))
    assert not taken

    class Accelerator:
        platform = "gpu"

    class FakeMesh:
        devices = np.asarray([Accelerator()])

    stream.on_devices(FakeMesh())
    assert taken == ["device"]
    monkeypatch.setattr(resident, "DEVICE_LIMIT", 100)
    monkeypatch.setattr(prefetch, "on_devices", lambda *_: taken.append("host"))
    stream.on_devices(FakeMesh())
    assert taken == ["device", "host"]


@pytest.mark.parametrize(
    "options",
    [{"augment": ("rand_augment()",)}, {"augment": ("random_resized_crop(8)",)}, {"augment": AUGMENT, "limit": 10}],
)
def test_what_cannot_stay_on_the_device_is_told(options, monkeypatch):
    if options.pop("limit", None):
        monkeypatch.setattr(resident, "DEVICE_LIMIT", 10)
    stream = data.TrainingStream(_source(), batch=8, cache="device", **options)
    with pytest.raises(errors.UserError, match="cannot stay on the devices"):
        stream.on_devices(MESH)


def test_device_prefetch_keeps_two_ahead_is_lazy_and_closes_what_it_reads():
    read, closed = [], []

    def host():
        try:
            for index in range(10):
                read.append(index)
                yield {"image": np.full((2, 1, 1, 1), index, np.uint8), "label": np.zeros(2, np.int32)}
        finally:
            closed.append(True)

    batches = prefetch.on_devices(host(), MESH)
    assert read == []
    np.testing.assert_array_equal(next(batches)["image"], 0)
    assert read == [0, 1, 2]
    next(batches)
    assert read == [0, 1, 2, 3]
    batches.close()
    assert closed == [True]
    rest = [round(float(batch["image"][0, 0, 0, 0]) * 255) for batch in prefetch.on_devices(host(), MESH)]
    assert rest == list(range(10))


def test_evaluation_on_the_devices():
    stream = data.EvaluationStream(_source(), batch=16)
    made = list(stream.on_devices(MESH, 1))
    assert len(made) == 3
    for batch, expected in zip(made, stream.iterate(1), strict=True):
        for name in ("image", "label", "mask"):
            np.testing.assert_array_equal(batch[name], expected[name])
    assert list(stream.on_devices(MESH, 4)) == []


def test_bytes_are_what_floats_are_made_from():
    stream = data.TrainingStream(_source(), batch=7, augment=AUGMENT)
    floats, raw = next(stream.iterate(3)), next(stream.iterate(3, pixels="uint8"))
    assert raw["image"].dtype == np.uint8
    np.testing.assert_array_equal(raw["image"].astype(np.float32) / np.float32(255), floats["image"])
    with pytest.raises(errors.UserError, match="did you mean 'uint8'"):
        next(stream.iterate(pixels="uint9"))


@pytest.mark.parametrize(
    "augment",
    [
        ("flip()", "rand_augment(2, 9)", "random_erasing(0.5)"),
        ("random_resized_crop(8)", "flip()", "three_augment()"),
        ("simple_random_crop(10)", "color_jitter(0.3, 0.3, 0.3)", "flip()"),
    ],
)
def test_every_recipe_is_the_same_from_memory_disk_and_shards(augment):
    made = [data.TrainingStream(_source(), batch=12, seed=2, augment=augment, cache=c) for c in (True, False)]
    parts = [data.TrainingStream(_source(), batch=12, seed=2, augment=augment, shard=(i, 2)) for i in range(2)]
    for step, batch in zip((4, 5), made[0].iterate(4), strict=False):
        _assert_equal(batch, made[1].batch(step))
        halves = [part.batch(step) for part in parts]
        _assert_equal(batch, {key: np.concatenate([half[key] for half in halves]) for key in batch})


def test_a_leading_crop_takes_the_place_of_preprocess():
    options = {"batch": 4, "preprocess": ("resize(6)", "center_crop(6)")}
    for first in ("random_resized_crop(10)", "simple_random_crop(10)"):
        stream = data.TrainingStream(_source(), augment=(first,), **options)
        expected = data.TrainingStream(_source(), augment=(first,), batch=4)
        np.testing.assert_array_equal(stream.batch(0)["image"], expected.batch(0)["image"])
    assert data.TrainingStream(_source(), augment=("flip()",), **options).image_shape == (6, 6, 3)
