"""Signs that an attack was too weak or a gradient masked, read off the records of a study of robust accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_vit.attacks import guards
from robust_vit.metrics import statistics
from robust_vit.studies import attack_entries


def check(
    records: Mapping[str, np.ndarray],
    entries: Sequence[attack_entries.Entry],
    sizes: np.ndarray,
    *,
    unbounded: bool,
) -> dict[str, dict[str, Any]]:
    """Every guard by name: whether it fired, what was seen in a sentence, and whether that is of note though it did not fire.

    Args:
      records: with the columns of `attack_entries.columns` as `success/<attack>` and so on.
      entries: the attacks.
      sizes: the epsilons of the first columns.
      unbounded: whether one more column is of attacks without a bound.
    """
    found: dict[str, dict[str, Any]] = {}

    def guard(name: str, fired: bool, detail: str, noted: bool = False) -> None:
        found[name] = {"fired": bool(fired), "noted": bool(noted), "detail": detail}

    success = {entry.text: records[f"success/{entry.text}"] for entry in entries}
    for entry in entries:
        guard(f"monotone/{entry.text}", *_monotone(entry.label, success[entry.text], sizes))
    weaker = list(_weaker_than_one_step(records, entries, success, len(sizes)))
    if any(entry.name == "fgsm" for entry in entries) and len(entries) > 1:
        guard(
            "order",
            bool(weaker),
            f"{weaker[0][0]} breaks fewer images than one step of FGSM at epsilon {sizes[weaker[0][1]]:.4g}: it has too few "
            "steps, or the gradient is masked."
            if weaker
            else "no attack by gradients breaks fewer images than one step of FGSM",
        )
    correct = records["correct"]
    for entry in entries:
        gone = records[f"vanished/{entry.text}"][correct] > 0
        share = float(gone.any(axis=1).mean()) if correct.any() else 0.0
        guard(
            f"gradient/{entry.text}",
            share > 0.01,
            f"{share:.1%} of the images that the model gets right met a gradient that is zero or not finite under "
            f"{entry.label}: a saturated softmax or masking; try loss='margin'.",
        )
        outside = ~records[f"inside/{entry.text}"]
        guard(
            f"ball/{entry.text}", outside.any(), f"{entry.label} returned {int(outside.sum())} images outside its ball."
        )
    if unbounded:
        left = float(1.0 - np.logical_or.reduce(list(success.values()))[:, -1].mean())
        guard(
            "unbounded",
            left > 0,
            f"Without any bound the attacks leave {left:.1%} of the images right, where they should leave none: they "
            "are too weak for this model, so its robustness is overstated.",
        )
    guard(
        "deterministic",
        not records["exhibit/deterministic"][0],
        "Two forward passes of the same images differ: a randomised model needs attacks that average over its draws.",
    )
    return found


def _monotone(label: str, raw: np.ndarray, sizes: np.ndarray) -> tuple[bool, str, bool]:
    """Whether the raw curve falls beyond chance, by how many images it falls at all, and whether it does."""
    falls = guards.falls({float(size): raw[:, column] for column, size in enumerate(sizes)})
    if not falls:
        return False, f"the raw accuracy under {label} does not rise with epsilon", False
    worst = falls[0]
    detail = (
        f"{label} breaks {worst.images} fewer of {len(raw)} images at epsilon {worst.large:.4g} than at {worst.small:.4g}: "
        + (
            "the gradient misleads it there (masking, or steps too long); read the envelope, and attack by other means."
            if worst.is_significant
            else f"no more than chance (p = {worst.p_value:.2g}); the envelope counts them as broken."
        )
    )
    return worst.is_significant, detail, True


def _weaker_than_one_step(records, entries, success, count):
    """Label and column of each attack by gradients that breaks fewer images than FGSM at a size."""
    steps = [entry for entry in entries if entry.name == "fgsm"]
    others = [entry for entry in entries if entry.name != "fgsm" and records[f"backward_passes/{entry.text}"].any()]
    for one, other in itertools.product(steps, others):
        for column in range(count):
            if _fewer(success[other.text][:, column], success[one.text][:, column]):
                yield other.label, column


def _fewer(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether `first` succeeds on fewer images than `second`, beyond chance."""
    test = statistics.mcnemar(second, first)
    return test.statistic < 0 and test.p_value < guards.CHANCE
