"""The embedded data set: its labels, its stated spectra, its symmetries, the balance of its cues, and interrupted generation."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import sklearn.decomposition
import sklearn.pipeline
import sklearn.svm

from robust_vit import data, errors
from robust_vit.data import draws, rendering, shapes, textured_shapes, textures

ROWS = np.arange(400)
PARAMETERS = {"background": 0.7, "label_noise": 0.3}
SMALL = {"train_examples": 60, "test_examples": 20}


def _recipe(variant: str, **options) -> rendering.Recipe:
    return rendering.Recipe(variant=variant, parameter=PARAMETERS.get(variant), **options)


# Shapes


def _best_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Largest intersection over union of every third pixel, under shifts of up to 9 template pixels."""
    first, second = first[::3, ::3], second[::3, ::3]
    shifted = [np.roll(second, (i, j), (0, 1)) for i in range(-3, 4) for j in range(-3, 4)]
    return max((first & other).sum() / (first | other).sum() for other in shifted)


def test_upright_shapes_have_no_rotational_symmetry_and_the_controls_do():
    planes = dict(zip(shapes.NAMES, shapes.silhouettes(), strict=True))
    assert len(shapes.UPRIGHT) >= 8
    assert len(shapes.SYMMETRIC) == 2
    for name in shapes.UPRIGHT:
        for turns in (1, 2, 3):
            assert _best_overlap(planes[name], np.rot90(planes[name], turns)) < 0.85, (name, turns)
    for name in shapes.SYMMETRIC:
        for turns in (1, 2, 3):
            assert _best_overlap(planes[name], np.rot90(planes[name], turns)) > 0.99, (name, turns)


def test_no_shape_is_a_rotation_of_another():
    planes = shapes.silhouettes()
    for i in range(len(planes)):
        for j in range(i):
            for turns in range(4):
                overlap = _best_overlap(planes[i], np.rot90(planes[j], turns))
                assert overlap < 0.88, (shapes.NAMES[i], shapes.NAMES[j], turns)  # Measured .853, disc and heart.


def test_shapes_have_equal_area_and_a_centred_mass():
    planes = shapes.silhouettes()
    area = planes.mean((1, 2)) * (2 * shapes.EXTENT) ** 2
    np.testing.assert_allclose(area, shapes.AREA, rtol=0.01)
    axis = np.linspace(-shapes.EXTENT, shapes.EXTENT, planes.shape[1])
    for plane in planes:
        assert abs((plane.sum(0) * axis).sum()) / plane.sum() < 0.01
        assert abs((plane.sum(1) * axis).sum()) / plane.sum() < 0.01


def test_distances_of_the_disc_are_exact():
    x = np.linspace(-1.5, 1.5, 41)[None, None]
    found = shapes.sample(np.asarray([shapes.NAMES.index("disc")]), x, np.zeros_like(x))
    np.testing.assert_allclose(
        found[0, 0], np.abs(x[0, 0]) - np.sqrt(shapes.AREA / np.pi), atol=0.012
    )  # One template pixel.


# Spectra


@pytest.mark.parametrize("kind", ["texture", "background"])
@pytest.mark.parametrize("size", rendering.SIZES)
def test_fields_have_the_stated_spectrum(kind, size):
    count = 400
    bits = np.stack([draws.bits(seed=0, purpose="test", row=i, count=size * (size // 2 + 1)) for i in range(count)])
    bits = bits.reshape(count, size, size // 2 + 1)
    function = {"texture": textures.spectrum, "background": textures.background_spectrum}[kind]
    edges = []
    for label in range(10):
        fields = textures.fields(np.full(count, label), bits, kind=kind)
        np.testing.assert_allclose(fields.mean((1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(fields.var(), 1, atol=0.05)
        measured = (np.abs(np.fft.rfft2(fields)) ** 2).mean(0)
        expected = function(label, size=size)
        some = expected > 1e-5 * expected.max()
        ratio = measured[some] / expected[some]
        np.testing.assert_allclose(ratio.mean(), 1, atol=0.02)
        assert ratio.std() < 0.12  # Mean of 400 exponentials: .05; the self-conjugate bins, .07.
        edges.append(np.where(some, measured / np.maximum(expected, 1e-9), np.nan)[:, [0, -1]])
    # The columns that are their own mirror image; 0.4 to 1 % is the standard error.
    np.testing.assert_allclose(np.nanmean(np.concatenate(edges), axis=0), 1, atol=0.04)


def test_bands_point_where_they_say():
    for label, (name, centre, orientation) in enumerate(textures._BANDS):
        power = textures.spectrum(label, size=64)
        row, column = np.unravel_index(power.argmax(), power.shape)
        vertical = -np.fft.fftfreq(64, 1 / 64)[row]
        np.testing.assert_allclose(np.hypot(vertical, column), centre, atol=0.75, err_msg=name)
        if orientation is not None:
            off = (np.rad2deg(np.arctan2(vertical, column)) - orientation + 90) % 180 - 90
            np.testing.assert_allclose(off, 0, atol=6, err_msg=name)


def test_few_values_are_clipped():
    image = rendering.render(_recipe("aligned"), "train", ROWS)["image"]
    assert ((image == 0) | (image == 255)).mean() < 0.01  # Measured .0025.


# Labels and pixels of every config


@pytest.mark.parametrize("variant", rendering.VARIANTS)
@pytest.mark.parametrize("size", rendering.SIZES)
def test_every_config(variant, size):
    found = rendering.render(_recipe(variant, size=size), "train", ROWS[:60])
    clean, shape, texture = found["clean_label"], found["shape_label"], found["texture_label"]
    assert found["image"].shape == (60, size, size, 3)
    assert found["image"].dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(clean), 6)
    relations = {
        "aligned": (shape == clean) & (texture == clean),
        "grey": (shape == clean) & (texture == clean) & (np.ptp(found["image"], axis=-1) == 0).all((1, 2)),
        "random": (shape == clean) & (np.mean(texture == clean) < 0.4),
        "conflict": (shape == clean) & (texture != clean) & (texture >= 0),
        "silhouette": (shape == clean) & (texture == -1),
        "edges": (shape == clean) & (texture == -1),
        "texture_only": (shape == -1) & (texture == clean),
        "background": (shape == clean) & (texture == clean),
        "label_noise": (shape == clean) & (texture == clean),
    }
    assert set(relations) == set(rendering.VARIANTS)
    assert relations[variant].all()
    if variant != "label_noise":
        np.testing.assert_array_equal(found["label"], clean)
    for mask, (top, left, bottom, right) in zip(found["object_mask"], found["box"] * size, strict=True):
        rows, columns = np.nonzero(mask)
        assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == (top, left, bottom, right)
    share = (found["object_mask"] == 255).mean()
    assert share == 1 if variant == "texture_only" else 0.15 < share < 0.3


def test_configs_of_one_seed_show_the_same_scene():
    aligned, random, background, grey, silhouette = (
        rendering.render(_recipe(v), "test", ROWS[:50])
        for v in ("aligned", "random", "background", "grey", "silhouette")
    )
    for other in (random, background, grey, silhouette):
        np.testing.assert_array_equal(aligned["object_mask"], other["object_mask"])
    far = (aligned["object_mask"] == 0) & (np.abs(silhouette["image"][..., 0].astype(int) - 255) == 0)
    np.testing.assert_array_equal(aligned["image"][far], random["image"][far])
    assert (silhouette["image"][aligned["object_mask"] == 255] < 128).all()


def test_an_example_depends_on_its_row_alone():
    whole = rendering.render(_recipe("random"), "train", ROWS[:40])
    part = rendering.render(_recipe("random"), "train", np.asarray([33, 2]))
    for key in whole:
        np.testing.assert_array_equal(whole[key][[33, 2]], part[key])
    for other, split in ((_recipe("random", seed=1), "train"), (_recipe("random"), "test")):
        assert (rendering.render(other, split, ROWS[:40])["image"] == whole["image"]).mean() < 0.1


def test_rates_of_background_and_label_noise():
    rows = np.arange(20_000)  # Standard errors .003.
    found = rendering.labels(_recipe("background"), "train", rows)
    np.testing.assert_allclose((found["background_label"] == found["label"]).mean(), 0.7, atol=0.01)
    found = rendering.labels(rendering.Recipe("background", 0.0), "train", rows)
    assert not (found["background_label"] == found["label"]).any()
    assert (np.bincount(found["background_label"]) > 1800).all()
    found = rendering.labels(_recipe("aligned"), "train", rows)
    np.testing.assert_allclose((found["background_label"] == found["label"]).mean(), 0.1, atol=0.01)
    noisy = rendering.labels(_recipe("label_noise"), "train", rows)
    np.testing.assert_allclose((noisy["label"] != noisy["clean_label"]).mean(), 0.3, atol=0.01)
    test = rendering.labels(_recipe("label_noise"), "test", rows)
    np.testing.assert_array_equal(test["label"], test["clean_label"])


# Strength of the cues


def _accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of one classifier on the second half, the same for both cues: 40 principal components, an RBF machine."""
    components = sklearn.decomposition.PCA(40, svd_solver="covariance_eigh")
    probe = sklearn.pipeline.make_pipeline(components, sklearn.svm.SVC(C=10))
    half = len(labels) // 2
    probe.fit(features[:half], labels[:half])
    return 100 * probe.score(features[half:], labels[half:])


def _shape_features(found: dict) -> np.ndarray:
    """The silhouette, at 16 x 16."""
    mask = found["object_mask"] / 255
    step = mask.shape[1] // 16
    return mask.reshape(len(mask), 16, step, 16, step).mean((2, 4)).reshape(len(mask), -1)


def _texture_features(found: dict) -> np.ndarray:
    """The logarithm of the power spectrum inside the object, without its mean, below 16 cycles, at 16 x 8."""
    inside = found["object_mask"] > 0
    grey = found["image"].mean(-1) / 255
    mean = (grey * inside).sum((1, 2), keepdims=True) / inside.sum((1, 2), keepdims=True)
    power = np.abs(np.fft.rfft2((grey - mean) * inside)) ** 2
    power = np.concatenate([power[:, -16:], power[:, :16]], axis=1)[:, :, :16]
    return np.log(power.reshape(len(power), 16, 2, 8, 2).mean((2, 4)) + 1e-4).reshape(len(power), -1)


@pytest.mark.parametrize("size", rendering.SIZES)
def test_a_shape_probe_and_a_texture_probe_agree(size):
    """Where both cues vary alone (config `random`), from the mask or from the spectrum inside it, 1,000 images to train on.
    Measured: shape 99.7 and texture 100.0 % at 32 px, 99.8 and 99.9 at 64 px.
    """
    found = rendering.render(_recipe("random", size=size), "train", np.arange(2000))
    shape = _accuracy(_shape_features(found), found["shape_label"])
    texture = _accuracy(_texture_features(found), found["texture_label"])
    assert min(shape, texture) > 95
    assert abs(shape - texture) < 2, (shape, texture)


def test_neither_cue_tells_of_the_other():
    found = rendering.render(_recipe("random"), "train", np.arange(2000))
    assert _accuracy(_shape_features(found), found["texture_label"]) < 15
    assert _accuracy(_shape_features(found), found["background_label"]) < 15


class _Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 32, 64):
            for strides in (1, 2):
                x = nn.relu(nn.GroupNorm(num_groups=8)(nn.Conv(width, (3, 3), strides=strides)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def _network_accuracy(train: dict, test: dict, key: str) -> float:
    """Test accuracy from raw pixels after fifteen epochs of AdamW."""
    images, held_out = (found["image"].astype(np.float32) / 127.5 - 1 for found in (train, test))
    network, epochs, size = _Network(), 15, 64
    steps = len(images) // size
    params = network.init(jax.random.key(0), images[:1])
    optimiser = optax.adamw(optax.cosine_decay_schedule(3e-3, epochs * steps))
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, images), labels).mean()

        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for epoch in range(epochs):
        order = draws.permutation(np.arange(len(images)), seed=0, epoch=epoch)
        for i in range(steps):
            some = order[size * i : size * (i + 1)]
            params, state = step(params, state, images[some], train[key][some])
    return 100 * float((np.asarray(network.apply(params, held_out)).argmax(-1) == test[key]).mean())


@pytest.mark.slow
def test_a_convolutional_network_learns_both_cues_equally():
    """From raw pixels of `random`, 4,000 images at 32 px. Measured with three seeds: shape 98.4, 99.0, 98.6, texture 98.1,
    98.3, 97.2 %. Two thirds of the steps on 3,000 images are too few for the texture: 96.2 and 90.6 %.
    """
    train, test = (rendering.render(_recipe("random"), s, np.arange(n)) for s, n in (("train", 4000), ("test", 1000)))
    shape, texture = (_network_accuracy(train, test, key) for key in ("shape_label", "texture_label"))
    assert min(shape, texture) > 90
    assert abs(shape - texture) < 2, (shape, texture)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("textured_shapes", "aligned_32px_10000_2000_seed0"),
        ("textured_shapes/conflict", "conflict_32px_10000_2000_seed0"),
        ("textured_shapes/background(0.95)", "background_rho0.95_32px_10000_2000_seed0"),
        ("textured_shapes/label_noise(0.2)", "label_noise_p0.2_32px_10000_2000_seed0"),
        ("textured_shapes/background(1, size=64, seed=3)", "background_rho1_64px_10000_2000_seed3"),
        ("textured_shapes/edges(train_examples=5, test_examples=4)", "edges_32px_5_4_seed0"),
    ],
)
def test_names(name, expected):
    assert textured_shapes.parse(name).name == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("textured_shapes/alined", {}, "did you mean 'aligned'"),
        ("textured_shapes/background", {}, r"rho = None: give a share .*background\(0\.9\)"),
        ("textured_shapes/label_noise(2)", {}, "p = 2"),
        ("textured_shapes/aligned(0.5)", {}, "takes no number"),
        ("textured_shapes/background(x", {}, "not understood"),
        ("textured_shapes/background(x)", {}, "not understood"),
        ("textured_shapes/background(0.1, 0.2)", {}, "2 numbers"),
        ("textured_shapes/random(siez=64)", {}, "did you mean 'size'"),
        ("textured_shapes/aligned", {"size": 48}, "size of textured_shapes is 48"),
        ("textured_shapes/aligned", {"siez": 64}, "did you mean 'size'"),
        ("textured_shapes/aligned", {"train_examples": 0}, "positive integer"),
        ("textured_shapes/aligned", {"channels": 1}, "textured_shapes has 3"),
    ],
)
def test_wrong_names(name, options, message, tmp_path):
    with pytest.raises(errors.UserError, match=message):
        data.open_source(name, data_dir=tmp_path, **options)
    assert not list(tmp_path.iterdir())


# Generation


def _bytes(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_stored_examples_are_the_rendered_ones(tmp_path):
    source = data.open_source("textured_shapes/random", split="test", data_dir=tmp_path, size=64, **SMALL)
    expected = rendering.render(_recipe("random", size=64, **SMALL), "test", np.arange(20))
    for index in range(20):
        example = source[index]
        np.testing.assert_array_equal(example["image"], expected["image"][index])
        np.testing.assert_array_equal(example["object_mask"][..., 0], expected["object_mask"][index])
        np.testing.assert_array_equal(example["box"], expected["box"][index])
        for key in ("label", "clean_label", "shape_label", "texture_label", "background_label"):
            assert example[key] == expected[key][index]
        assert example["row"] == index
    assert source.class_names == shapes.NAMES
    assert source.shape == (64, 64, 3)
    np.testing.assert_array_equal(source.rows, np.arange(20))
    stream = data.EvaluationStream(source, batch=8, extras=("texture_label",))
    np.testing.assert_array_equal(stream.batch(1)["texture_label"], expected["texture_label"][8:16])


def test_the_default_place_is_below_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = data.open_source("textured_shapes", **SMALL)
    assert source.folder.is_relative_to(tmp_path / "robust_vit" / "datasets" / "textured_shapes")
    before = _bytes(source.folder)
    assert data.open_source("textured_shapes", **SMALL).fingerprint == source.fingerprint
    assert data.open_source("textured_shapes", seed=1, **SMALL).fingerprint != source.fingerprint
    assert _bytes(source.folder) == before


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    recipe = _recipe("aligned", train_examples=600, test_examples=20)
    real = rendering.render

    def interrupted(recipe, split, rows):
        if rows[0] >= 250:
            raise KeyboardInterrupt
        return real(recipe, split, rows)

    monkeypatch.setattr(rendering, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        textured_shapes.prepare(recipe, data_dir=tmp_path)
    assert not [path for path in (tmp_path / "textured_shapes").iterdir() if path.suffix != ".lock"]
    monkeypatch.setattr(rendering, "render", real)
    assert textured_shapes.is_whole(textured_shapes.prepare(recipe, data_dir=tmp_path), recipe)


def test_a_folder_appears_by_one_rename(tmp_path, monkeypatch):
    recipe, seen, real = _recipe("aligned", **SMALL), [], os.rename
    final = tmp_path / "textured_shapes" / recipe.name / "1.0.0"

    def rename(made, folder):
        if pathlib.Path(folder) != final:  # TFDS renames inside the hidden folder.
            return real(made, folder)
        seen.append((final.exists(), textured_shapes.is_whole(pathlib.Path(made), recipe)))
        raise KeyboardInterrupt

    monkeypatch.setattr("os.rename", rename)
    with pytest.raises(KeyboardInterrupt):
        textured_shapes.prepare(recipe, data_dir=tmp_path)
    assert seen == [(False, True)]
    assert not final.exists()


def _contents(root: pathlib.Path) -> list[str]:
    """A hash of each example. Not of the files: protocol buffers order a record's features anew in every process."""
    hashes = []
    for split in ("train", "test"):
        source = data.open_source(
            "textured_shapes/aligned", split=split, data_dir=root, train_examples=1500, test_examples=100
        )
        for example in map(source.__getitem__, range(len(source))):
            parts = [np.asarray(example[key]).tobytes() for key in sorted(example)]
            hashes.append(hashlib.sha256(b"".join(parts)).hexdigest())
    return hashes


def _kill_and_recover(root: pathlib.Path, delays: list[float]) -> None:
    recipe = _recipe("aligned", train_examples=1500, test_examples=100)
    textured_shapes.prepare(recipe, data_dir=root / "whole")
    expected = _contents(root / "whole")
    script = textwrap.dedent(f"""
        from robust_vit.data import rendering, textured_shapes
        print("go", flush=True)
        textured_shapes.prepare(rendering.Recipe(**{vars(recipe)!r}), data_dir={str(root / "killed")!r})
    """)
    final = root / "killed" / "textured_shapes" / recipe.name / "1.0.0"
    interrupted = 0
    for delay in delays:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == b"go\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        interrupted += not final.exists()
        if final.exists():
            assert _contents(root / "killed") == expected
            shutil.rmtree(root / "killed")
    assert interrupted, "no kill came before the end: shorten the delays"
    textured_shapes.prepare(recipe, data_dir=root / "killed")
    assert _contents(root / "killed") == expected
    assert not list((root / "killed" / "textured_shapes").glob("*partial*"))


def test_a_killed_generation_is_never_taken_for_whole(tmp_path):
    _kill_and_recover(tmp_path, [0.2, 0.6])


@pytest.mark.slow
def test_a_generation_killed_at_twenty_instants(tmp_path):
    _kill_and_recover(tmp_path, list(np.random.default_rng(0).uniform(0, 0.6, 20)))


@pytest.mark.parametrize("damage", ["cut", "removed", "flipped"])
def test_a_damaged_folder(tmp_path, damage):
    recipe = _recipe("aligned", **SMALL)
    folder = textured_shapes.prepare(recipe, data_dir=tmp_path)
    expected = _bytes(folder)
    victim = next(folder.glob("*-train.array_record*"))
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 0xFF
        victim.write_bytes(content)
        source = data.open_source("textured_shapes", data_dir=tmp_path, **SMALL)
        with pytest.raises(errors.UserError, match="is damaged .*prepare the data set again") as caught:
            data.EvaluationStream(source, batch=60).batch(0)
        assert "\n" not in str(caught.value)
        return
    victim.unlink() if damage == "removed" else victim.write_bytes(content[: len(content) // 2])
    assert _bytes(textured_shapes.prepare(recipe, data_dir=tmp_path)) == expected


def test_two_that_start_together_generate_once(tmp_path, monkeypatch):
    recipe, real, calls = _recipe("aligned", **SMALL), textured_shapes._generate, []
    monkeypatch.setattr(textured_shapes, "_generate", lambda *a, **o: (calls.append(1), time.sleep(0.2), real(*a, **o)))
    threads = [
        threading.Thread(target=textured_shapes.prepare, args=(recipe,), kwargs={"data_dir": tmp_path}) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert textured_shapes.is_whole(textured_shapes.prepare(recipe, data_dir=tmp_path), recipe)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(errors.UserError, match=r"has 1 MB free, textured_shapes needs about 61"):
        data.open_source("textured_shapes", data_dir=tmp_path)


class _Usage:
    free = 1_000_000


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match=r"is no folder: set data\.data_dir"):
        data.open_source("textured_shapes", data_dir=tmp_path / "file", **SMALL)
