"""The evaluation card: RobustBench's fields, what they leave out, and JSON that is read back as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats

from robust_vit import attacks, errors
from robust_vit.attacks import checks, guards

# The fields of an entry under model_info/ of RobustBench's repository.
FIELDS = {
    "link": str,
    "name": str,
    "authors": str,
    "additional_data": bool,
    "number_forward_passes": int,
    "dataset": str,
    "venue": str,
    "architecture": str,
    "eps": str,
    "clean_acc": str,
    "reported": str,
    "autoattack_acc": str,
    "footnote": str,
    "unreliable": bool,
}
CORRECT = np.asarray([1, 1, 1, 1, 1, 1, 0, 0], bool)
BROKEN = {
    "apgd_ce": np.asarray([1, 1, 0, 0, 0, 0, 1, 1], bool),
    "square": np.asarray([0, 1, 1, 0, 0, 0, 0, 0], bool),
}


def _card(**changes):
    return attacks.card(
        **{
            "name": "A model",
            "threat": "cifar10/linf-8",
            "correct": CORRECT,
            "broken": BROKEN,
            "suite": "AutoAttack standard",
            "architecture": "ViT-Ti/16",
            "additional_data": False,
            **changes,
        }
    )


def test_the_fields_are_those_of_robustbench():
    card = _card()
    assert {name: type(card[name]) for name in FIELDS} == FIELDS
    assert set(card) == {*FIELDS, "evaluation"}
    assert (card["dataset"], card["eps"]) == ("cifar10", "8/255")
    assert (card["clean_acc"], card["reported"], card["autoattack_acc"]) == ("75.00", "37.50", "37.50")
    assert card["unreliable"] is False
    assert json.loads(json.dumps(card, allow_nan=False)) == card


def test_robust_is_right_and_unbroken_by_all():
    evaluation = _card()["evaluation"]
    assert evaluation["robust"]["value"] == 3 / 8
    assert evaluation["by_attack"]["apgd_ce"]["alone"]["value"] == 4 / 8
    assert evaluation["by_attack"]["square"]["alone"]["value"] == 4 / 8
    assert evaluation["by_attack"]["square"]["so_far"]["value"] == 3 / 8
    np.testing.assert_allclose(evaluation["robust"]["low"], scipy.stats.beta.ppf(0.025, 3, 6))
    assert evaluation["examples"] == 8
    assert {"robust_vit", "jax", "flax"} <= set(evaluation["versions"])


@pytest.mark.parametrize(
    ("threat", "eps"),
    [
        ("imagenet/linf-4", "4/255"),
        ("fashion_mnist/linf-0.1", "0.1"),
        ("cifar10/l2-0.5", "0.5"),
        ("imagenet/l2-3.0", "3"),
        ("cifar10/linf-0.031", "0.031"),
    ],
)
def test_epsilons_are_written_as_there(threat, eps):
    assert _card(threat=threat)["eps"] == eps


def test_another_suite_is_no_autoattack_accuracy():
    card = _card(suite="PGD-40")
    assert card["autoattack_acc"] is None
    assert card["reported"] == "37.50"


def test_a_guard_that_fired_makes_it_unreliable():
    fired = guards.Guard("unbounded", True, "without a bound", 1.0)
    report = checks.Report((fired,), "linf", 8 / 255, {}, 10, 5)
    card = _card(report=report, notes=("Fewer queries.",))
    assert card["unreliable"] is True
    assert card["evaluation"]["fired"] == ["unbounded"]
    assert card["evaluation"]["guards"]["guards"]["unbounded"]["fired"] is True
    assert card["footnote"] == "Fewer queries."


@pytest.mark.parametrize("change", [{"correct": CORRECT[:3]}, {"correct": np.zeros(0, bool), "broken": {}}])
def test_arrays_that_do_not_fit_are_told(change):
    with pytest.raises(errors.UserError, match="one value an example"):
        _card(**change)
