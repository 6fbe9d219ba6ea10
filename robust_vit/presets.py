"""Presets: the data sets that a configuration can name after its colon, and `smoke`, which shrinks everything to seconds."""

from __future__ import annotations

from typing import Any

import ml_collections

from robust_vit import errors, programs

# What `configs/vit_b16.py:NAME` fills in. Means and deviations are those of the training pixels, in [0, 1].
DATA_PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "name": "imagenet2012",
        "test_split": "validation",
        "validation": 0.01,
        "augment": ("random_resized_crop(224)", "flip()"),
        "preprocess": ("resize(256)", "center_crop(224)"),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "batch": 1024,
    },
    "cifar10": {
        "name": "cifar10",
        "augment": ("pad_crop(4)", "flip()"),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    },
    "fashion_mnist": {
        "name": "fashion_mnist",
        "augment": ("pad_crop(2)", "flip()"),
        "mean": (0.2860,),
        "std": (0.3530,),
    },
    "textured_shapes": {"name": "textured_shapes/aligned", "augment": ("pad_crop(4)",)},
}


def apply_argument(
    config: ml_collections.ConfigDict, argument: str, *, data: str, image_size: int | None = None
) -> bool:
    """Applies the text after the colon of `--config=FILE:TEXT`, and says whether `smoke` is part of it.

    Args:
      config: changed in place.
      argument: comma-separated: a preset of `DATA_PRESETS`, `folder=PATH`, or `smoke`.
      data: the preset where the argument names none.
      image_size: the size that the model runs at, reached inside the classifier; None: the data's own.

    Raises:
      errors.UserError: anything else in the argument, naming the nearest.
    """
    words = [word.strip() for word in argument.split(",") if word.strip()]
    smoke = "smoke" in words
    chosen = [word for word in words if word != "smoke"]
    if len(chosen) > 1:
        raise errors.UserError(f"{argument!r} names {len(chosen)} data sets ({', '.join(chosen)}): name one.")
    word = chosen[0] if chosen else ("textured_shapes" if smoke else data)
    if word.startswith("folder="):
        preset = {**DATA_PRESETS["imagenet"], "name": word, "test_split": "test", "validation": 0.1, "batch": 128}
    elif word in DATA_PRESETS:
        preset = DATA_PRESETS[word]
    else:
        raise errors.unknown("argument of the configuration", word, [*DATA_PRESETS, "folder=PATH", "smoke"])
    with config.ignore_type():
        config.data.update(preset)
        if image_size:
            config.data.image_size = image_size
    return smoke


def shrink(config: ml_collections.ConfigDict) -> None:
    """Makes everything small enough for seconds: a test that the whole way runs, not that anything is learned."""
    with config.ignore_type():
        config.data.update({"batch": 16, "eval_batch": 32, "train_limit": 96, "test_limit": 48})
        config.train.update({"steps": 4, "accumulate": 1})
        config.optimizer.warmup_epochs = 0.0
        config.log_every = 2
        for entry in config.studies.values():
            small = {"examples": 32, "batch": 16, "steps": 3, "mini_batches": 2, "probes": 2, "rank": 8, "exhibits": 4}
            for key, value in small.items():
                if key in entry and (entry[key] in (None, programs.AUTO) or entry[key] > value):
                    entry[key] = value
