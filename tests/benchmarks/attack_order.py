"""Attacks of growing strength on the trained ViT of the quickstart: how many images each leaves right.

    python tests/benchmarks/attack_order.py --workdir=runs/quickstart

trains the ViT where the workdir has none, and prints two Markdown tables. Results: tests/benchmarks/results/attacks.md.
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
NORMS = ("linf", "l2", "l1")
SLOTS = 8


def quickstart(workdir: pathlib.Path | str) -> studies.Subject:
    """The trained ViT of configs/quickstart.py, trained here where the workdir has none."""
    config = configurations.load(QUICKSTART)
    setup = runs.prepare(settings.resolve(config)["vit"], pathlib.Path(workdir), "vit")
    train.train(setup)
    return runs.subjects(setup)[0]["vit"]


def standing(attack: attacks.Attack, subject: studies.Subject, sizes: np.ndarray, count: int) -> np.ndarray:
    """`[sizes]`: shares of the first `count` test images that the attack leaves right at each size."""
    if attack.minimal:
        found = distances(attack, subject, count)
        return np.asarray([np.mean(found > size) for size in sizes])
    sized = [attack.replace(epsilon=np.float32(size)) for size in sizes]
    return np.asarray([1.0 - _run(one, subject, count).success.mean() for one in sized])


def distances(attack: attacks.Attack, subject: studies.Subject, count: int) -> np.ndarray:
    """`[count]`: of a minimal attack's successes, infinite where there is none."""
    found = _run(attack, subject, count)
    return np.where(found.success, found.distance, np.inf)


def _run(attack: attacks.Attack, subject: studies.Subject, count: int) -> attacks.runner.RunResult:
    batch = subject.test.with_batch(count, limit=count).batch(0)
    examples = {name: batch[name] for name in ("image", "label", "row")}
    return attacks.run(attack, subject.classifier, examples, slots=SLOTS)


def main() -> None:
    """Prints the tables."""
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
    minimal = {label: entry for label, entry in ATTACKS.items() if entry[0] == "fmn"}
    print(f"\n| median distance (farther than the nearest by 1 %) | {' | '.join(minimal)} |")
    print("|---" * (len(minimal) + 1) + "|", flush=True)
    for norm in NORMS:
        found = [
            distances(attacks.build(name, **{**options, "norm": norm}), subject, flags.images)
            for name, options in minimal.values()
        ]
        nearest = np.min(found, axis=0)
        cells = (f"{np.median(sizes):.4g} ({np.sum(sizes > 1.01 * nearest)})" for sizes in found)
        print(f"| {norm} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
