"""What the guards say of real models, and how an attack fares on planted examples.

python tests/benchmarks/guards.py --data=../shared/data --images=16

Minutes: most of it are the steps of attacks on images that they do not break.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import real_models

from robust_vit import attacks

MODELS = {"resnet20": real_models.resnet20, "vit": real_models.vit}
LEVELS = (0.5, 8.0)  # Of 255: where these models, trained without attacks, are half broken and wholly.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--planted", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    flags = parser.parse_args()
    folder = pathlib.Path(flags.data)
    examples = real_models.images(folder, rows=flags.images)
    images, labels = examples["image"], examples["label"]
    for name in flags.models:
        model = MODELS[name](folder)
        print(f"## {name}, {flags.images} exact CIFAR-10 test images")
        for level in LEVELS:
            epsilon, started = level / 255, time.perf_counter()
            report = attacks.check(model, images, labels, epsilon=epsilon, norm="linf")
            print(
                f"{time.perf_counter() - started:.0f} s, fired: {', '.join(report.fired) or 'none'}\n{report}",
                flush=True,
            )
        for steps in (1, 40):
            attack = attacks.build("pgd", epsilon=8 / 255, norm="linf", steps=steps)
            found = attacks.planted(
                model, images[: flags.planted], attack, epsilon=8 / 255, norm="linf", random_points=200
            )
            print(f"PGD-{steps}: {found}", flush=True)


if __name__ == "__main__":
    main()
