"""Attacks of growing strength on the trained ViT of the quickstart: how many images each leaves right.

    python tests/benchmarks/attack_order.py --workdir=runs/quickstart

trains the ViT where the workdir has none, and prints one Markdown table. Results: tests/benchmarks/results/attacks.md.
"""

from __future__ import annotations

import argparse
import pathlib

import configurations
import numpy as np

from robust_vit import attacks, command_line, runs, settings, studies, train

QUICKSTART = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
ATTACKS = {
    "FGSM": ("fgsm", {"epsilon": 0.01}),
    "PGD-40": ("pgd", {"epsilon": 0.01, "steps": 40, "relative_step": 0.1}),
    "APGD-CE-100": ("apgd_ce", {"epsilon": 0.01, "steps": 100}),
    "FMN-100": ("fmn", {"norm": "linf", "steps": 100}),
    "FMN-100 as published": ("fmn", {"norm": "linf", "steps": 100, "loss": "margin"}),
    "FMN-100 on the cross-entropy": ("fmn", {"norm": "linf", "steps": 100, "loss": "cross_entropy"}),
}
LEVELS = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0)
SLOTS = 8


def quickstart(workdir: pathlib.Path | str) -> studies.Subject:
    """The trained ViT of configs/quickstart.py, trained here where the workdir has none."""
    config = configurations.load(QUICKSTART)
    setup = runs.prepare(settings.resolve(config)["vit"], pathlib.Path(workdir), "vit")
    train.train(setup)
    return runs.subjects(setup)[0]["vit"]


def standing(attack: attacks.Attack, subject: studies.Subject, sizes: np.ndarray, count: int) -> np.ndarray:
    """`[sizes]`: shares of the first `count` test images that the attack leaves right at each size."""
    batch = subject.test.with_batch(count, limit=count).batch(0)
    examples = {name: batch[name] for name in ("image", "label", "row")}
    if attack.minimal:
        found = attacks.run(attack, subject.classifier, examples, slots=SLOTS)
        return np.asarray([1.0 - np.mean(found.success & (found.distance <= size)) for size in sizes])
    sized = [attack.replace(epsilon=np.float32(size)) for size in sizes]
    return np.asarray(
        [1.0 - attacks.run(one, subject.classifier, examples, slots=SLOTS).success.mean() for one in sized]
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--images", type=int, default=400)
    flags = parser.parse_args()
    command_line.configure_jax()
    subject = quickstart(flags.workdir)
    print(f"| left right, %, of {flags.images} | " + " | ".join(f"{level:g}/255" for level in LEVELS) + " |")
    print("|---" * (len(LEVELS) + 1) + "|", flush=True)
    for label, (name, options) in ATTACKS.items():
        left = standing(attacks.build(name, **options), subject, np.asarray(LEVELS) / 255, flags.images)
        print(f"| {label} | " + " | ".join(f"{100 * share:.2f}" for share in left) + " |", flush=True)


if __name__ == "__main__":
    main()
