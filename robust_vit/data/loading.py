"""From a config to streams: which rows train, which decide, which are reported on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_vit import classifier, errors
from robust_vit.data import draws, sources, streams

_logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "name": "textured_shapes/aligned",  # Or "folder=PATH", or a TFDS name or directory.
    "data_dir": None,  # Where data sets lie.
    "options": {},  # Of the source, for example size=64 for textured_shapes.
    "train_split": "train",
    "test_split": "test",
    "validation": 0.1,  # Share of the training rows that is held out, chosen by hash.
    "split_seed": 0,
    "image_size": None,  # Pixels that the model runs at; None is what the pipeline delivers.
    "channels": None,  # 1 or 3 of the model's input; None is the data's.
    "augment": (),  # Of training images: "pad_crop(4)", "flip()", "random_resized_crop(224)".
    "preprocess": (),  # Of all images: "resize(256)", "center_crop(224)".
    "on_bad_image": "raise",  # Or "skip".
    "on_mode": None,  # "error" or "convert" for grey and transparent files; None by source.
    "cache": "auto",  # Keep decoded images in memory: "auto" up to 2 GiB, "always", "never", "device".
    "workers": None,  # Reading threads; None is one a core.
    "mean": None,  # Per channel, in [0, 1]; None is 0.5.
    "std": None,
    "train_limit": None,  # Use only so many training images.
    "test_limit": None,  # The first so many test images.
    "extras": (),  # Scalar features that batches carry beside the label.
    "batch": 128,
    "eval_batch": 256,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A data set ready for training and studies.

    Attributes:
      train: endless, augmented; without the validation rows.
      validation: training rows held out by hash; decides checkpoints and hyper-parameters. None without any.
      test: read by studies only.
      spec: size, channels and normalisation that the model gets.
      num_classes: labels are 0 .. num_classes - 1.
      class_names: one for each class.
      fingerprint: of the bytes and of the split.
      name: for people.
    """

    train: streams.TrainingStream
    validation: streams.EvaluationStream | None
    test: streams.EvaluationStream
    spec: classifier.ImageSpec
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    name: str


def load(
    config: Mapping[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
    arrays: tuple[sources.Source, sources.Source] | None = None,
) -> Bundle:
    """Opens a data set and makes its three streams. Decodes one image; the rest when it is asked for.

    Args:
      config: any of `DEFAULTS`, as a dict or a ConfigDict.
      shard: (index, count) of this process: it gets its slice of each global batch.
      arrays: (train, test) sources to use instead of opening `config["name"]`.

    Raises:
      errors.UserError: an unknown key, or anything that `sources.open_source` or a transform rejects.
    """
    given = dict(config)
    for key in given:
        if key not in DEFAULTS:
            raise errors.unknown("data option", key, DEFAULTS)
    value = {**DEFAULTS, **given}
    train_source, test_source = arrays or (_open(value, value["train_split"]), _open(value, value["test_split"]))
    if train_source.class_names != test_source.class_names:
        raise errors.UserError(
            f"{train_source.name} has {train_source.num_classes} classes and {test_source.name} has "
            f"{test_source.num_classes}, or others: give both the same class folders."
        )
    held_out = split_rows(train_source.rows, fraction=value["validation"], seed=value["split_seed"])
    kept = _limited(train_source.rows, np.flatnonzero(~held_out), value["train_limit"], value["split_seed"])
    if not len(kept):
        raise errors.UserError(
            f"no training image is left of {len(train_source)} with data.validation={value['validation']}: lower it."
        )
    common = {key: value[key] for key in ("preprocess", "cache", "workers", "extras")} | {"shard": shard}
    train = streams.TrainingStream(
        sources.Subset(train_source, kept, name=train_source.name),
        batch=value["batch"],
        seed=value["seed"],
        augment=value["augment"],
        **common,
    )
    validation = None
    if held_out.any():
        subset = sources.Subset(train_source, np.flatnonzero(held_out), name=f"{train_source.name}/validation")
        validation = streams.EvaluationStream(subset, batch=value["eval_batch"], **common)
    test = streams.EvaluationStream(test_source, batch=value["eval_batch"], limit=value["test_limit"], **common)
    _logger.info(
        "%s: %d images to train on, %d for validation, %d for test",
        value["name"],
        len(kept),
        int(held_out.sum()),
        test.num_examples,
    )
    spec = _spec(value, train, test)
    return Bundle(
        train=train,
        validation=validation,
        test=test,
        spec=spec,
        num_classes=train_source.num_classes,
        class_names=train_source.class_names,
        fingerprint=sources.fingerprint(
            train_source.fingerprint,
            test_source.fingerprint,
            value["validation"],
            value["split_seed"],
            value["train_limit"],
        ),
        name=value["name"] if arrays is None else train_source.name,
    )


def split_rows(rows: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out, bool `[rows]`: each by its own draw, so that a row's side does not depend on the others.

    Args:
      rows: identities.
      fraction: expected share that is held out, in [0, 1).
      seed: of the split.
    """
    if not 0 <= fraction < 1:
        raise errors.UserError(
            f"data.validation is {fraction}: expected a share of the training images, 0 <= share < 1."
        )
    return draws.uniforms(rows, seed=seed, purpose="validation")[:, 0] < fraction


def _open(value: Mapping[str, Any], split: str) -> sources.Source:
    return sources.open_source(
        value["name"],
        split=split,
        data_dir=value["data_dir"],
        on_bad_image=value["on_bad_image"],
        on_mode=value["on_mode"],
        channels=value["channels"],
        **dict(value["options"]),
    )


def _limited(rows: np.ndarray, positions: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or limit >= len(positions):
        return positions
    if limit < 1:
        raise errors.UserError(f"data.train_limit is {limit}: expected a positive number of images, or None for all.")
    keys = draws.words(rows[positions], seed=seed, purpose="limit")[:, 0]
    return np.sort(positions[np.argsort(keys, kind="stable")[:limit]])


def _spec(
    value: Mapping[str, Any], train: streams.TrainingStream, test: streams.EvaluationStream
) -> classifier.ImageSpec:
    height, width, found = test.image_shape
    if train.image_shape != (height, width, found):
        raise errors.UserError(
            f"training images are {train.image_shape} and test images {(height, width, found)} (height, width, channels): let "
            "data.augment and data.preprocess end in the same size."
        )
    channels = value["channels"] or found
    if found not in (1, channels):
        raise errors.UserError(
            f"data.channels is {channels} but {value['name']} has {found}: set it to {found}, or leave it None."
        )
    size = value["image_size"]
    size = (height, width) if size is None else (size, size) if isinstance(size, int) else tuple(size)
    moments = [
        (0.5,) * channels if value[key] is None else tuple(np.atleast_1d(value[key]).tolist())
        for key in ("mean", "std")
    ]
    return classifier.ImageSpec(
        size=size, channels=channels, mean=moments[0], std=moments[1], preprocessing=tuple(value["preprocess"])
    )
