"""Curvature in the input and sharpness of the two real CIFAR-10 models of the data folder, as one report.

python tests/benchmarks/curvature_of_models.py --data=../shared/data --workdir=runs/curvature --images=64
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import numpy as np
import real_models

from robust_vit import data, evaluate

MODELS = {"resnet20": real_models.resnet20, "vit": real_models.vit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--mini_batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="images a mini-batch of the sharpness")
    parser.add_argument("--studies", nargs="+", default=["input_curvature", "sharpness"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    flags = parser.parse_args()
    folder = pathlib.Path(flags.data)
    examples = real_models.images(folder, rows=flags.images)
    source = data.open_source("cifar10_exact", split="train", data_dir=folder / "tfds")
    seen = [source[index] for index in range(flags.mini_batches * flags.batch)]
    train = (
        np.stack([example["image"] for example in seen]).astype(np.float32) / 255,
        np.asarray([example["label"] for example in seen], np.int32),
    )
    options = {
        "input_curvature": {"examples": flags.images},
        "sharpness": {"mini_batches": flags.mini_batches, "batch": flags.batch},
    }
    for name in flags.models:
        model = MODELS[name](folder)
        card = evaluate.report_card(
            model,
            examples["image"],
            examples["label"],
            train=train,
            workdir=flags.workdir,
            name=name,
            studies={study: {"name": study, **options.get(study, {})} for study in flags.studies},
        )
    print(card.path)


if __name__ == "__main__":
    main()
