"""Sources: splits, order, and what each mistake of a user says."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil

import ml_collections
import numpy as np
import pytest
from PIL import Image

from robust_vit import data, errors
from robust_vit.data import decoding, sources

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
LABELS = np.arange(40) % 4


def _write(path: pathlib.Path, mode: str = "RGB", value: int = 100, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (12, 10), value if mode in ("L", "P", "1", "I;16") else (value,) * len(mode)).save(path, **options)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two classes of ten images each, in the three formats."""
    for index in range(20):
        suffix = ("jpg", "png", "webp", "JPEG")[index % 4]
        _write(tmp_path / "pets" / ("cat", "dog")[index % 2] / f"{index}.{suffix}", value=10 * index)
    return tmp_path / "pets"


# Arrays


def test_arrays_keep_pixels_labels_and_order():
    source = data.from_arrays(IMAGES, LABELS)
    assert isinstance(source, data.Source)
    assert (len(source), source.num_classes, source.class_names) == (40, 4, ("0", "1", "2", "3"))
    np.testing.assert_array_equal(source[7]["image"], IMAGES[7])
    assert (source[7]["label"], source[7]["row"]) == (3, 7)
    exact = data.from_arrays(IMAGES.astype(np.float32) / 255, LABELS)
    np.testing.assert_array_equal(exact.images, IMAGES)
    assert exact.fingerprint == source.fingerprint != data.from_arrays(IMAGES[::-1], LABELS).fingerprint
    assert data.from_arrays(IMAGES[..., 0], LABELS).shape == (8, 8, 1)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (IMAGES[..., :2], LABELS, {}, r"shape \(40, 8, 8, 2\)"),
        (IMAGES[:0], LABELS[:0], {}, r"n > 0"),
        (IMAGES.astype(np.float32), LABELS, {}, "divide by 255"),
        (IMAGES.astype(np.float32) / 127.5 - 1, LABELS, {}, r"\[-1, 1\]"),
        (np.full((40, 8, 8, 3), np.nan), LABELS, {}, "floats in"),
        (IMAGES.astype(np.int64), LABELS, {}, "expected uint8"),
        (IMAGES, LABELS[:-1], {}, r"shape \(39,\)"),
        (IMAGES, LABELS.astype(float), {}, "float64"),
        (
            IMAGES,
            LABELS,
            {"class_names": ("a", "b", "c")},
            r"label 3 of arrays, example 3 is out of range: expected 0 \.\. 2",
        ),
        (IMAGES, LABELS - 1, {}, "label -1 of arrays, example 0 is out of range"),
    ],
)
def test_wrong_arrays(images, labels, options, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        data.from_arrays(images, labels, **options)
    assert "\n" not in str(caught.value)


# Splits


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ("train", 0, 200)),
        ("train[:90%]", ("train", 0, 180)),
        ("test[10%:]", ("test", 20, 200)),
        ("train[5:7]", ("train", 5, 7)),
        ("train[-10:]", ("train", 190, 200)),
        ("train[:-25%]", ("train", 0, 150)),
        (" train[ 1 : 999 ] ", ("train", 1, 200)),
    ],
)
def test_splits(split, expected):
    name, start, stop = sources.parse_split(split)
    assert (name, sources._bound(start, 0, 200), sources._bound(stop, 200, 200)) == expected


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train+test", "", "train[1:2:3]"])
def test_wrong_splits(split):
    with pytest.raises(errors.UserError, match="write for example"):
        sources.parse_split(split)


# Folders


def test_a_folder_is_read_in_a_mixed_order_that_does_not_change(folder):
    source = data.from_folder(folder)
    assert source.class_names == ("cat", "dog")
    assert len(source) == 20
    assert 2 <= int(source.labels[:10].sum()) <= 8
    assert source.paths == data.from_folder(folder).paths
    for index in range(20):
        example = source[index]
        name, file = source.paths[index].split("/")
        assert source.class_names[example["label"]] == name
        assert example["row"] == index
        assert example["image"].shape == (10, 12, 3)
        np.testing.assert_allclose(example["image"], 10 * int(file.split(".")[0]), atol=2)  # JPEG rounds.


def test_a_plain_folder_splits_by_hash_and_a_split_folder_by_its_folders(folder, tmp_path):
    train, test = (data.open_source(f"folder={folder}", split=split) for split in ("train", "test"))
    assert not set(train.paths) & set(test.paths)
    assert len(train) + len(test) == 20
    assert len(test) >= 1
    assert not set(train.rows) & set(test.rows)
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "splits" / split)
    assert len(data.open_source(f"folder={tmp_path / 'splits'}", split="test")) == 20
    assert data.open_source("folder", split="train[:50%]", data_dir=tmp_path / "splits").source.root.name == "train"


def test_class_names_choose_folders_and_order(folder):
    assert data.from_folder(folder, class_names=("dog", "cat")).class_names == ("dog", "cat")
    assert set(data.from_folder(folder, class_names=("dog",)).labels) == {0}


def test_wrong_folders(folder, tmp_path):
    cases = {
        "no image folder at": tmp_path / "nowhere",
        "0 class folders": folder / "cat",
    }
    for message, path in cases.items():
        with pytest.raises(errors.UserError, match=message):
            data.from_folder(path)
    with pytest.raises(errors.UserError, match="write folder=PATH"):
        data.open_source("folder")
    with pytest.raises(errors.UserError, match="unknown split"):
        data.open_source(f"folder={folder}", split="tset")
    with pytest.raises(errors.UserError, match="check data.options.class_names"):
        data.from_folder(folder, class_names=("cat", "cow"))
    (folder / "bird").mkdir()
    with pytest.raises(errors.UserError, match=r"bird has no images .*remove the folder") as caught:
        data.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named_or_skipped(folder, caplog):
    victim = sorted((folder / "cat").glob("*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(errors.UserError, match=rf"{victim} cannot be decoded .*on_bad_image='skip'"):
        data.EvaluationStream(data.from_folder(folder), batch=20).batch(0)
    for index in range(200):
        _write(folder / "dog" / f"more{index}.png")
    stream = data.EvaluationStream(data.from_folder(folder, on_bad_image="skip"), batch=55)
    with caplog.at_level(logging.WARNING):
        assert sum(int(batch["mask"].sum()) for batch in stream.iterate()) == 219
    assert str(victim) in caplog.text


@pytest.mark.parametrize(
    ("mode", "kind", "value"),
    [
        ("L", "grey", [100, 100, 100]),
        ("LA", "transparent", None),
        ("RGBA", "transparent", None),
        ("1", "grey", [255] * 3),
    ],
)
def test_grey_and_transparent_files_are_told_or_converted(folder, mode, kind, value):
    path = folder / "cat" / "odd.png"
    _write(path, mode)
    source = data.from_folder(folder)
    index = source.paths.index("cat/odd.png")
    with pytest.raises(errors.UserError, match=rf"odd\.png is {kind} .*on_mode='convert'"):
        source[index]
    image = data.from_folder(folder, on_mode="convert")[index]["image"]
    # Transparent: 100 at opacity 100 / 255 over white.
    np.testing.assert_allclose(image[3, 3], value or [100 * 100 / 255 + 255 * 155 / 255] * 3, atol=1)


def test_colour_where_grey_is_expected_and_what_no_conversion_mends(folder):
    with pytest.raises(errors.UserError, match="is colour .* where grey"):
        data.from_folder(folder, channels=1)[0]
    assert data.from_folder(folder, channels=1, on_mode="convert")[0]["image"].shape == (10, 12, 1)
    _write(folder / "cat" / "deep.png", "I;16", 40_000)
    source = data.from_folder(folder, on_mode="convert")
    with pytest.raises(errors.UserError, match="more than 8 bits"):
        source[source.paths.index("cat/deep.png")]
    _write(folder / "cat" / "palette.png", "P", 3)
    assert (s := data.from_folder(folder))[s.paths.index("cat/palette.png")]["image"].shape == (10, 12, 3)


# TFDS directories, made by the embedded builder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    """A small data set as TFDS writes it, under a name of its own."""
    root = tmp_path_factory.mktemp("tfds")
    options = {"train_examples": 60, "test_examples": 20}
    source = data.open_source("textured_shapes/aligned", data_dir=root / "made", **options)
    shutil.copytree(source.folder, root / "toy_set" / "1.0.0")
    shutil.copytree(source.folder, root / "with_configs" / "plain" / "1.0.0")
    return root


def test_a_tfds_directory_by_name_version_config_or_path(prepared):
    names = ["toy_set", "toy_set:1.0.0", "with_configs/plain", str(prepared / "toy_set" / "1.0.0")]
    for name in names:
        assert len(data.open_source(name, data_dir=prepared)) == 60
    assert len(data.open_source("toy_set", data_dir=prepared, split="train[:25%]")) == 15


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("toy_sett", {}, r"unknown data set 'toy_sett': did you mean 'toy_set'"),
        ("fashion_mnst", {}, "did you mean 'fashion_mnist'"),
        ("textured_shape/aligned", {}, "textured_shapes"),
        ("cifar10", {}, r"no cifar10 at .*it holds .*toy_set.*tfds build cifar10"),
        ("toy_set", {"split": "tets"}, "unknown split .*did you mean 'test'"),
        ("toy_set", {"split": "train[60:70]"}, "is empty: 'train' has 60"),
        ("with_configs", {}, "choose one of with_configs/plain"),
        ("toy_set", {"size": 64}, r"\['size'\] do not apply"),
        ("toy_set", {"on_bad_image": "skp"}, "did you mean 'skip'"),
        ("toy_set", {"on_mode": "convrt"}, "did you mean 'convert'"),
        ("toy_set", {"channels": 4}, "expected 1 or 3"),
    ],
)
def test_wrong_names(prepared, name, options, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        data.open_source(name, data_dir=prepared, **options)
    assert "\n" not in str(caught.value)


def test_no_folder_at_data_dir(tmp_path):
    with pytest.raises(errors.UserError, match=r"no cifar10 at .*no such folder"):
        data.open_source("cifar10", data_dir=tmp_path / "nowhere")


def _damaged(prepared, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(prepared / "toy_set" / "1.0.0", tmp_path / "toy_set" / "1.0.0"))


def test_tfrecord_in_place_of_array_record(prepared, tmp_path):
    folder = _damaged(prepared, tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(errors.UserError, match="holds tfrecord files: expected array_record"):
        data.open_source("toy_set", data_dir=tmp_path)


def test_missing_files_of_a_directory(prepared, tmp_path):
    folder = _damaged(prepared, tmp_path)
    next(folder.glob("*-train.array_record*")).unlink()
    with pytest.raises(errors.UserError, match=r"train.array_record.* is missing \(1 of 1 files\)"):
        data.open_source("toy_set", data_dir=tmp_path)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(errors.UserError, match="is damaged"):
        data.open_source("toy_set", data_dir=tmp_path)
    (folder / "features.json").unlink()
    with pytest.raises(errors.UserError, match="preparation was interrupted"):
        data.open_source("toy_set", data_dir=tmp_path)
    folder.rename(folder.with_name("incomplete.ABC_1.0.0"))
    with pytest.raises(errors.UserError, match="left unfinished"):
        data.open_source("toy_set", data_dir=tmp_path)


def test_a_label_out_of_range_is_named(prepared, tmp_path):
    folder = _damaged(prepared, tmp_path)
    (folder / "label.labels.txt").write_text("arrow\nhouse\n")
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "2"
    (folder / "features.json").write_text(json.dumps(features))
    source = data.open_source("toy_set", data_dir=tmp_path)
    with pytest.raises(errors.UserError, match=r"label 2 of .*record 2 is out of range: expected 0 \.\. 1"):
        data.EvaluationStream(source, batch=8).batch(0)


# Loading


def _load(**config) -> data.Bundle:
    pair = (data.from_arrays(IMAGES, LABELS), data.from_arrays(IMAGES[:10], LABELS[:10], class_names="0123"))
    return data.load(config, arrays=pair)


def test_load_splits_validation_from_training_rows():
    bundle = _load(validation=0.3, batch=8)
    train, held_out = set(bundle.train.source.rows), set(bundle.validation.source.rows)
    assert not train & held_out
    assert train | held_out == set(range(40))
    assert 4 <= len(held_out) <= 20
    assert set(_load(validation=0.3, split_seed=1).validation.source.rows) != held_out
    assert _load(validation=0.0).validation is None
    assert bundle.test.num_examples == 10
    assert bundle.num_classes == 4
    # A row's side is its own: more rows move none.
    np.testing.assert_array_equal(
        data.split_rows(np.arange(1000), fraction=0.3, seed=0)[:40],
        data.split_rows(np.arange(40), fraction=0.3, seed=0),
    )
    assert abs(data.split_rows(np.arange(10_000), fraction=0.3, seed=0).mean() - 0.3) < 0.02  # Standard error .005.


def test_load_limits():
    whole, few = _load(validation=0.3), _load(validation=0.3, train_limit=5, test_limit=3)
    assert len(few.train) == 5
    assert few.test.num_examples == 3
    assert set(few.train.source.rows) < set(whole.train.source.rows)
    np.testing.assert_array_equal(few.test.batch(0)["row"][:3], [0, 1, 2])
    assert few.fingerprint != whole.fingerprint == _load(validation=0.3).fingerprint


def test_load_takes_a_config_dict_and_makes_the_spec():
    config = ml_collections.ConfigDict({"augment": ("pad_crop(2)",), "mean": (0.1, 0.2, 0.3), "image_size": 16})
    pair = (data.from_arrays(IMAGES, LABELS),) * 2
    spec = data.load(config, arrays=pair).spec
    assert (spec.size, spec.channels, spec.mean, spec.std) == ((16, 16), 3, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    hash(spec)
    grey = (data.from_arrays(IMAGES[..., 0], LABELS),) * 2
    assert data.load({}, arrays=grey).spec.channels == 1
    assert data.load({"channels": 3}, arrays=grey).spec.channels == 3
    assert data.load({"preprocess": ("resize(4)",)}, arrays=grey).spec.size == (4, 4)
    data.load(ml_collections.ConfigDict({**data.DEFAULTS}), arrays=grey)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"agument": ()}, "unknown data option 'agument': did you mean 'augment'"),
        ({"validation": 1.5}, "data.validation is 1.5"),
        ({"train_limit": 0}, "data.train_limit is 0"),
        ({"validation": 0.9999}, "no training image is left of 40"),
        ({"split_seed": -1}, "seed is -1"),
        ({"channels": 1}, "data.channels is 1 but .* has 3"),
        ({"augment": ("random_resized_crop(6)",)}, "end in the same size"),
        ({"augment": ("pad_crp(2)",)}, "did you mean 'pad_crop'"),
        ({"mean": (0.5, 0.5)}, "give one or 3 of each"),
    ],
)
def test_wrong_configs(config, message):
    with pytest.raises(errors.UserError, match=message):
        _load(**config)


def test_train_and_test_must_have_the_same_classes():
    pair = (data.from_arrays(IMAGES, LABELS), data.from_arrays(IMAGES, LABELS % 2))
    with pytest.raises(errors.UserError, match="4 classes and .* has 2"):
        data.load({}, arrays=pair)


def test_every_special_source_opens():
    for target in sources.SOURCES.values():
        module, attribute = target.split(":")
        assert callable(getattr(__import__(module, fromlist=[attribute]), attribute))


def test_bad_images_are_counted_once():
    tally = decoding.Tally(total=1000, name="x")
    for row in (1, 1, 2, 1):
        tally.add(row, decoding.BadImage("f cannot be decoded (x)"))
    assert tally.count == 2
