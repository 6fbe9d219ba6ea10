"""Attacks find a worst input: pure functions of a model, keys, images and labels.

`build(name, **options)` makes an attack, `attack(model, keys, images, labels)` runs it on a batch as a pure function, and
`run(attack, model, examples, slots=...)` runs it over many examples, refilling the slot of an example that is finished.
`check(model, images, labels, threat=...)` looks for signs that a model looks robust because it was attacked badly.
"""

from __future__ import annotations

from typing import Any

from robust_vit import registry
from robust_vit.attacks import checks, guards, inputs, norms, runner, skeleton, threats

ATTACKS = {
    "fgsm": "robust_vit.attacks.gradient:fgsm",
    "pgd": "robust_vit.attacks.gradient:pgd",
}

Attack = skeleton.Attack
AttackResult = skeleton.AttackResult
Guard = guards.Guard
NORMS = norms.NORMS
Report = checks.Report
RunResult = runner.RunResult
THREATS = threats.THREATS
ThreatModel = threats.ThreatModel
check = checks.check
check_inputs = inputs.check_inputs
example_keys = runner.example_keys
programs = skeleton.programs
run = runner.run
threat = threats.threat


def build(name: str, **options: Any) -> skeleton.Attack:
    """The attack of that name.

    Args:
      name: one of `ATTACKS`.
      **options: keyword arguments of the function that it names; an unknown one is a `UserError` with the nearest known.
    """
    return registry.build("attack", name, ATTACKS, options)
