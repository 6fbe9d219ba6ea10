"""The evaluation card of a robustness evaluation, shaped like an entry of RobustBench: plain JSON."""

from __future__ import annotations

import dataclasses
import fractions
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

import robust_vit
from robust_vit import errors, files
from robust_vit.attacks import checks, threats
from robust_vit.metrics import statistics

SCHEMA = 1
_VERSIONS = ("jax", "jaxlib", "flax", "numpy")


def card(
    *,
    name: str,
    threat: str | threats.ThreatModel,
    correct: Bool[np.ndarray, " examples"],
    broken: Mapping[str, Bool[np.ndarray, " examples"]],
    suite: str,
    architecture: str = "",
    seed: int = 0,
    forward_passes: int | None = None,
    backward_passes: int | None = None,
    seconds: float | None = None,
    dtype: str = "float32",
    attempted: Mapping[str, Bool[np.ndarray, " examples"]] | None = None,
    report: checks.Report | None = None,
    guards: Mapping[str, Mapping[str, Any]] | None = None,
    versions: Mapping[str, str] | None = None,
    backend: str | None = None,
    subset: str = "",
    link: str = "",
    authors: str = "",
    venue: str = "",
    additional_data: bool | None = None,
    number_forward_passes: int = 1,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The card: RobustBench's fields (`model_info/<dataset>/<norm>/<name>.json`) and, in `evaluation`, what they leave out.

    From `robust_vit.attacks.auto_attack`: `correct=result.correct, broken=dict(zip(result.names, result.success.T))`, and
    `attempted` likewise; a report's `card.json` has the one of the study `auto_attack`. An example counts as robust where the
    model is right on it and no attack broke it. As on RobustBench, accuracies at the top are per cent as text with two decimals;
    those in `evaluation` are shares with Clopper-Pearson intervals over images.

    Args:
      name: of the model or the paper.
      threat: the threat model or its name.
      correct: the clean images that the model gets right.
      broken: for each attack in the order of their turns, which examples it broke.
      suite: what the attacks are together, for example "AutoAttack standard": only then is `autoattack_acc` filled in.
      architecture: as a reader knows it, for example "ViT-B/16".
      seed: of the draws.
      forward_passes: of one image each.
      backward_passes: likewise.
      seconds: of wall time.
      dtype: that the model computes in.
      attempted: for each attack the examples that it was tried on; None is all. One that was not tried on all that the model
        gets right has no accuracy `alone`.
      report: of `robust_vit.attacks.check`: its guards; those that fired make the entry `unreliable`.
      guards: others, by name, each with `fired` and `detail`; likewise.
      versions: of the packages that computed it; None is those here.
      backend: that computed it; None is the one here.
      subset: which images, in words.
      link, authors, venue: of the paper.
      additional_data: whether more data than the training set was used; None where it is not known.
      number_forward_passes: of one prediction.
      notes: in which respects the suite is not the published one; sentences.

    Raises:
      errors.UserError: no examples, or arrays of different length.
    """
    threat = threats.threat(threat) if isinstance(threat, str) else threat
    correct = np.asarray(correct, bool)
    hits = {attack: np.asarray(hit, bool) for attack, hit in broken.items()}
    lengths = {"correct": correct.shape, **{attack: hit.shape for attack, hit in hits.items()}}
    if correct.ndim != 1 or not len(correct) or len(set(lengths.values())) != 1:
        raise errors.UserError(
            f"a card got arrays of shapes {lengths}: give one value an example, for the same examples."
        )
    standing, turns = correct.copy(), {}
    for attack, hit in hits.items():
        standing = standing & ~hit
        turns[attack] = {
            "alone": _interval(correct & ~hit) if attempted is None or attempted[attack][correct].all() else None,
            "so_far": _interval(standing),
        }
    robust = 100.0 * standing.mean()
    is_auto_attack = suite.lower().replace("-", "").startswith("autoattack")
    looked = report.summary() if report is not None else {}
    if guards:
        looked["guards"] = {**looked.get("guards", {}), **guards}
    fired = [guard for guard, found in looked.get("guards", {}).items() if found["fired"]]
    content = {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": threat.dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": _fraction(threat),
        "clean_acc": f"{100.0 * correct.mean():.2f}",
        "reported": f"{robust:.2f}",
        "autoattack_acc": f"{robust:.2f}" if is_auto_attack else None,
        "footnote": " ".join(notes),
        "unreliable": bool(fired),
        "evaluation": {
            "schema": SCHEMA,
            "threat": threat.name,
            "norm": threat.norm.name,
            "epsilon": threat.epsilon,
            "suite": suite,
            "attacks": list(hits),
            "examples": len(correct),
            "subset": subset,
            "seed": seed,
            "clean": _interval(correct),
            "robust": _interval(standing),
            "by_attack": turns,
            "passes": {"forward": forward_passes, "backward": backward_passes},
            "seconds": seconds,
            "dtype": dtype,
            "guards": looked or None,
            "fired": fired,
            "notes": list(notes),
            "versions": _versions() if versions is None else dict(versions),
            "backend": backend or jax.default_backend(),
        },
    }
    return files.jsonable(content)


def _versions() -> dict[str, str]:
    found = {package: importlib.metadata.version(package) for package in _VERSIONS}
    return {"robust_vit": robust_vit.__version__, **found}


def _interval(bits: np.ndarray) -> dict[str, Any]:
    return dataclasses.asdict(statistics.proportion(bits.sum(), len(bits)))


def _fraction(threat: threats.ThreatModel) -> str:
    """An epsilon as RobustBench writes it: "8/255" where it is whole 255ths, else a decimal."""
    levels = fractions.Fraction(threat.epsilon * 255).limit_denominator(4)
    if (
        abs(float(levels) - threat.epsilon * 255) < 1e-9
        and levels.denominator == 1
        and levels > 0
        and threat.epsilon < 1
    ):
        return f"{levels}/255"
    return f"{threat.epsilon:g}"
