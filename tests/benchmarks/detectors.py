"""How well the baseline detectors tell attacked images of real models, by attacks that know of them and by one that does not.

python tests/benchmarks/detectors.py --data=../shared/data
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import real_models

from robust_vit import attacks, tables

MODELS = {"resnet20": real_models.resnet20, "vit": real_models.vit}
HEADINGS = ("model", "ε · 255", "detector", "attack", "misled", "area under the curve", "misled without alarm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=64, help="that are attacked, the first ones")
    parser.add_argument("--fitted", type=int, default=400, help="that the detectors are fitted on, the next ones")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--levels", type=float, nargs="+", default=[8.0], help="epsilons of the maximum norm, in 255ths"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    flags = parser.parse_args()
    folder = pathlib.Path(flags.data)
    examples = real_models.images(folder, rows=10_000)
    images, labels = examples["image"], examples["label"]
    held_out, fitted = slice(flags.images), slice(flags.images, flags.images + flags.fitted)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    started = time.perf_counter()
    for model_name in flags.models:
        model = MODELS[model_name](folder)
        for name in attacks.DETECTORS:
            detector = attacks.fit_detector(name, model, images[fitted], labels[fitted])
            for level in flags.levels:
                found = attacks.evaluate_detector(
                    detector, images[held_out], labels[held_out], epsilon=level / 255, norm="linf", steps=flags.steps
                )
                for row in found.table(name).rows:
                    cells = [model_name, f"{level:g}", *map(tables.text, row)]
                    print(f"| {' | '.join(cells)} |", flush=True)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
