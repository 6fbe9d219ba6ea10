"""The real data sets, read as users read them."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image

from robust_vit import data, errors
from robust_vit.data import decoding, draws, resampling, transforms

pytestmark = pytest.mark.needs_data

# name -> (train, test, image shape, first class, has its own row numbers)
SETS = {
    "fashion_mnist": (60_000, 10_000, (28, 28, 1), "T-shirt/top"),
    "cifar10_q75": (50_000, 10_000, (32, 32, 3), "airplane"),
    "cifar10_exact": (8_068, 1_017, (32, 32, 3), "airplane"),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_have_their_published_shape(data_dir, name):
    train, test, shape, first = SETS[name]
    for split, count in (("train", train), ("test", test)):
        source = data.open_source(name, split=split, data_dir=data_dir / "tfds")
        assert (len(source), source.shape, source.num_classes, source.class_names[0]) == (count, shape, 10, first)
        example = source[count - 1]
        assert example["image"].shape == shape
        assert example["image"].dtype == np.uint8
        assert 0 <= example["label"] < 10


def test_the_first_fashion_mnist_label_and_pixels(data_dir):
    source = data.open_source("fashion_mnist", data_dir=data_dir / "tfds")
    assert source.class_names[source[0]["label"]] == "Ankle boot"  # As in the original file.
    assert source[0]["image"].max() == 255
    labels = [example["label"] for example in (source[i] for i in range(10))]
    assert labels == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]


def test_rows_of_the_exact_subset_are_those_of_the_original_split(data_dir):
    test = data.open_source("cifar10_exact", split="test", data_dir=data_dir / "tfds")
    np.testing.assert_array_equal(test.rows, np.arange(1017))
    train = data.open_source("cifar10_exact", data_dir=data_dir / "tfds")
    assert train.rows.max() > len(train)
    assert len(np.unique(train.rows)) == len(train)
    compressed = data.open_source("cifar10_q75", data_dir=data_dir / "tfds")
    for index in (0, 4000, 8067):
        original = train[index]
        other = compressed[original["row"]]
        assert other["label"] == original["label"]
        difference = other["image"].astype(float) - original["image"]
        assert 10 * np.log10(255**2 / np.mean(difference**2)) > 22  # Mean 30 dB, by its README.


def test_streams_of_fashion_mnist(data_dir):
    bundle = data.load(
        {
            "name": "fashion_mnist",
            "data_dir": str(data_dir / "tfds"),
            "augment": ("pad_crop(2)", "flip()"),
            "train_split": "train[:2000]",
            "validation": 0.2,
            "test_limit": 300,
            "batch": 64,
        }
    )
    assert bundle.spec.size == (28, 28)
    assert bundle.spec.channels == 1
    assert len(bundle.train) + bundle.validation.num_examples == 2000
    first = bundle.train.batch(11)
    assert first["image"].shape == (64, 28, 28, 1)
    for streamed in bundle.train.iterate(11):
        np.testing.assert_array_equal(streamed["image"], first["image"])
        break
    seen = np.concatenate([batch["row"][batch["mask"]] for batch in bundle.test.iterate()])
    np.testing.assert_array_equal(seen, np.arange(300))


@pytest.fixture
def imagenet_folder(data_dir, tmp_path):
    """The first 40 ImageNet samples as class folders of links."""
    with open(data_dir / "imagenet_samples" / "labels.csv", newline="") as file:
        names = [row["wnid"] for row in csv.DictReader(file)][:40]
    for name in names:
        (tmp_path / name).mkdir()
        for target in (data_dir / "imagenet_samples" / "images").glob(f"{name}*"):
            (tmp_path / name / target.name).symlink_to(target)
    return tmp_path


def test_imagenet_images_from_memory_and_from_disk(imagenet_folder):
    source = data.from_folder(imagenet_folder)
    assert len(source) == 40
    assert source.num_classes == 40
    options = {"batch": 16, "preprocess": ("resize(256)", "center_crop(224)")}
    reference = Image.open(imagenet_folder / source.paths[0])
    width, height = reference.size
    left, top = round((width - 224) / 2), round((height - 224) / 2)  # The short side is 256 already.
    expected = np.asarray(reference.crop((left, top, left + 224, top + 224)), np.float32) / 255
    streams = [data.EvaluationStream(source, cache=cache, workers=2, **options) for cache in (True, False)]
    for first, second in zip(*(stream.iterate() for stream in streams), strict=True):
        np.testing.assert_array_equal(first["image"], second["image"])
    np.testing.assert_array_equal(streams[0].batch(0)["image"][0], expected)
    augment = ("random_resized_crop(96, 0.08, 1.0)", "flip()")
    training = [data.TrainingStream(source, augment=augment, cache=c, **options) for c in (True, False)]
    np.testing.assert_array_equal(training[0].batch(3)["image"], training[1].batch(3)["image"])
    with pytest.raises(errors.UserError, match=r"set data\.preprocess"):
        data.EvaluationStream(source, batch=40).batch(0)


def test_a_truncated_imagenet_image(imagenet_folder):
    victim = next(imagenet_folder.glob("*/*.jpg"))
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[: len(content) // 2])
    stream = data.EvaluationStream(data.from_folder(imagenet_folder), batch=8, preprocess=("center_crop(224)",))
    with pytest.raises(errors.UserError, match=f"{victim} cannot be decoded"):
        list(stream.iterate())


def test_cue_conflict_stimuli(data_dir):
    source = data.from_folder(data_dir / "cue_conflict" / "images")
    assert (len(source), source.num_classes) == (320, 16)
    example = source[5]
    assert source.paths[5].split("/")[1].startswith(source.class_names[example["label"]])
    assert example["image"].shape == (224, 224, 3)


def _jpegs(data_dir) -> list[bytes]:
    paths = sorted((data_dir / "imagenet_samples" / "images").glob("*.jpg"))[::8]
    paths += sorted((data_dir / "cue_conflict" / "images").glob("*/*.jpg"))[::20]
    baseline = []
    for path in paths[:10]:  # The samples are progressive: some sequential ones, of other chroma sampling and of none.
        for options in ({"quality": "keep"}, {"quality": 80, "subsampling": 0}, {"quality": 80, "subsampling": 1}):
            buffer = io.BytesIO()
            Image.open(path).save(buffer, "JPEG", progressive=False, **options)
            baseline.append(buffer.getvalue())
    return [path.read_bytes() for path in paths] + baseline


def test_jpegs_are_decoded_to_pils_bytes(data_dir):
    contents = _jpegs(data_dir)
    for content in contents:
        assert decoding._plain_header(content, 3) is not None
        pixels = decoding.decode(content, channels=3, name="jpeg")
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(content))))
    small = data.open_source("cifar10_q75", data_dir=data_dir / "tfds")
    for encoded in small.read_encoded(np.arange(0, 50_000, 500)):
        np.testing.assert_array_equal(encoded.decode(), np.asarray(Image.open(io.BytesIO(encoded.content))))
    grey = io.BytesIO()
    Image.open(io.BytesIO(contents[0])).convert("L").save(grey, "JPEG")
    cmyk = io.BytesIO()
    Image.open(io.BytesIO(contents[0])).convert("CMYK").save(cmyk, "JPEG")
    for odd in (grey, cmyk):
        with pytest.raises(errors.UserError, match="where colour"):
            decoding.decode(odd.getvalue(), channels=3, name="jpeg")


def test_a_window_is_the_crop_of_the_whole_and_a_large_one_is_near_it(data_dir):
    near = []
    for index, content in enumerate(_jpegs(data_dir)):
        encoded = decoding.Encoded(content, 0, 0, "jpeg", 3, "error")
        whole = encoded.decode()
        for size in (224, 64):
            crop = transforms.parse(f"random_resized_crop({size})")
            uniforms = draws.uniforms(np.asarray([index]), seed=0, purpose="test", count=crop.draws)[0]
            top, left, height, width = crop.window.box(*whole.shape[:2], uniforms.tolist())
            part = whole[top : top + height, left : left + width]
            window = decoding.decode_window(encoded, crop.window, uniforms.tolist()).astype(int)
            if min(height, width) >= 2 * size:
                near.append(np.abs(window - resampling.exact(part, (size, size), "bilinear")).mean())
            else:
                np.testing.assert_array_equal(window, crop(whole, uniforms))
                difference = np.abs(window - resampling.exact(part, (size, size), "bilinear"))
                assert difference.max() <= 2
                assert difference.mean() < 0.3
    assert len(near) > 20
    # 1.1 of 255 levels over all samples; 0 would mean that nothing was scaled, and a shift by one pixel would be 5 and more.
    assert 0.5 < np.mean(near) < 2
    assert max(near) < 8


def test_large_windows_from_memory_are_those_from_disk(imagenet_folder):
    source = data.from_folder(imagenet_folder)
    made = [
        data.TrainingStream(source, batch=16, augment=("random_resized_crop(48)", "flip()"), cache=cache)
        for cache in ("always", "never")
    ]
    np.testing.assert_array_equal(made[0].batch(1)["image"], made[1].batch(1)["image"])
    np.testing.assert_array_equal(made[0].batch(1)["image"], next(made[1].iterate(1))["image"])
