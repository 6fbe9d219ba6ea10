"""Attacks find a worst input: pure functions of a model, keys, images and labels.

`build(name, **options)` makes an attack, `attack(model, keys, images, labels)` runs it on a batch as a pure function, and
`run(attack, model, examples, slots=...)` runs it over many examples, refilling the slot of an example that is finished.
`check(model, images, labels, threat=...)` looks for signs that a model looks robust because it was attacked badly.
"""

from __future__ import annotations

from typing import Any

from robust_vit import registry
from robust_vit.attacks import (
    cameras,
    cards,
    channel,
    checks,
    detection,
    detectors,
    expectations,
    guards,
    inputs,
    norms,
    patch,
    planting,
    runner,
    skeleton,
    smoothing,
    storage,
    suites,
    threats,
    universal,
)

ATTACKS = {
    "fgsm": "robust_vit.attacks.gradient:fgsm",
    "bim": "robust_vit.attacks.gradient:bim",
    "mi_fgsm": "robust_vit.attacks.gradient:mi_fgsm",
    "pgd": "robust_vit.attacks.gradient:pgd",
    "apgd": "robust_vit.attacks.apgd:apgd",
    "apgd_ce": "robust_vit.attacks.apgd:apgd_ce",
    "apgd_dlr": "robust_vit.attacks.apgd:apgd_dlr",
    "apgd_t": "robust_vit.attacks.apgd:apgd_t",
    "adam": "robust_vit.attacks.adam:adam",
    "deep_fool": "robust_vit.attacks.deep_fool:deep_fool",
    "ddn": "robust_vit.attacks.fast_minimum_norm:ddn",
    "fmn": "robust_vit.attacks.fast_minimum_norm:fmn",
    "carlini_wagner": "robust_vit.attacks.carlini_wagner:carlini_wagner",
    "fab": "robust_vit.attacks.fab:fab",
    "fab_t": "robust_vit.attacks.fab:fab_t",
    "square": "robust_vit.attacks.square:square",
    "hop_skip_jump": "robust_vit.attacks.hop_skip_jump:hop_skip_jump",
    "nes": "robust_vit.attacks.estimation:nes",
    "spsa": "robust_vit.attacks.estimation:spsa",
    "roto_translation": "robust_vit.attacks.spatial:roto_translation",
    "patch_fool": "robust_vit.attacks.patch_fool:patch_fool",
    "stickers": "robust_vit.attacks.stickers:stickers",
}

Attack = skeleton.Attack
AttackResult = skeleton.AttackResult
Channel = channel.Channel
DETECTORS = detectors.DETECTORS
DetectorResult = detection.DetectorResult
Goal = skeleton.Goal
Guard = guards.Guard
NORMS = norms.NORMS
Report = checks.Report
RunResult = runner.RunResult
SuiteResult = suites.SuiteResult
THREATS = threats.THREATS
ThreatModel = threats.ThreatModel
auto_attack = suites.auto_attack
card = cards.card
certify = smoothing.certify
check = checks.check
check_inputs = inputs.check_inputs
destruction_rate = channel.destruction_rate
evaluate_detector = detection.evaluate
example_keys = runner.example_keys
expectation = expectations.expectation
fit_detector = detectors.fit
fit_patch = patch.fit
fit_universal = universal.fit
load = storage.load
planted = planting.planted
print_photo = channel.print_photo
programs = skeleton.programs
run = runner.run
save = storage.save
smooth = smoothing.smooth
threat = threats.threat
views = cameras.views


def build(name: str, **options: Any) -> skeleton.Attack:
    """The attack of that name.

    Args:
      name: one of `ATTACKS`.
      **options: keyword arguments of the function that it names; an unknown one is a `UserError` with the nearest known.
    """
    return registry.build("attack", name, ATTACKS, options)
