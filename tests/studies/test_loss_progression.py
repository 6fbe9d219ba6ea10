"""The study of the loss under attack: equal sizes, numbers from the records, what it refuses and what it warns of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import make_subject

from robust_vit import attacks, errors, studies
from robust_vit.studies import attack_entries

OPTIONS = {"batch": 64, "examples": 100, "steps": 3}


def test_the_end_is_that_of_the_attack_itself():
    subject = make_subject()
    study = studies.build("loss_progression", **OPTIONS)
    finding = study.run(subject)
    keys = attacks.example_keys(0, np.arange(100))
    for name in ("bim", "adam"):
        curve = finding.summary["curves"][name]
        assert len(curve["loss"]) == len(curve["right"]) == 4
        means = [point["value"] for point in curve["loss"]]
        assert means == sorted(means)
        assert curve["right"][-1]["value"] < curve["right"][0]["value"]
    attack = attacks.build("bim", epsilon=0.1, steps=3, stop_on_success=False)
    result = attack(subject.classifier, keys, subject.test.images[:100], subject.test.labels[:100])
    np.testing.assert_allclose(finding.records["loss/bim"][:, -1], result.loss, rtol=1e-4)
    assert finding.summary["epsilon"] == 0.1
    assert not finding.summary["caveats"]


def test_a_loss_that_falls_again_is_told():
    study = studies.build("loss_progression", **OPTIONS)
    records = dict(study.run(make_subject()).records)
    records["loss/bim"] = records["loss/bim"][:, ::-1]
    records["vanished/adam"] = np.ones(100, np.int32)
    caveats = study.summarise(records)["caveats"]
    assert "falls again" in caveats[0]
    assert "BIM" in caveats[0]
    assert "zero or not finite under Adam" in caveats[1]


def test_runs_of_other_sizes_are_not_compared():
    study = studies.build("loss_progression", **OPTIONS)
    first = study.run(make_subject())
    second = study.run(dataclasses.replace(make_subject(seed=1), threat="noise/linf-0.2"))
    assert study.compare(first, second) == []
    assert len(study.compare(first, study.run(make_subject(seed=1)))) == 4


@pytest.mark.parametrize("name", ["fmn", "square"])
def test_what_does_not_climb_step_by_step_is_refused(name):
    with pytest.raises(errors.UserError, match="one step along the gradient at a time"):
        studies.build("loss_progression", attacks=(name,)).applicable(make_subject())


def test_the_size_is_the_studys_or_the_threats():
    subject = make_subject()
    budget = attack_entries.budget(studies.build("loss_progression", epsilon="2/255"), subject)
    assert budget == (attacks.NORMS["linf"], 2 / 255)
    other = studies.build("loss_progression", epsilon=0.5, norm="l2")
    assert attack_entries.budget(other, dataclasses.replace(subject, threat=None)) == (attacks.NORMS["l2"], 0.5)
    assert "threat" in studies.build("loss_progression").applicable(dataclasses.replace(subject, threat=None))
