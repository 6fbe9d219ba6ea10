"""Runs that know of each other, rows of the matrix put together, and results that a new rival makes old."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import make_subject

from robust_vit import attacks, errors, evaluate, studies
from robust_vit.attacks import transfer

OPTIONS = {"batch": 64, "examples": 100, "steps": 3}


@pytest.fixture(scope="module")
def subjects():
    made = {name: make_subject(seed=i, noise=0.5 + i, name=name) for i, name in enumerate(("ash", "oak", "elm"))}
    return studies.introduce(made)


def test_rivals_are_the_others_that_tell_the_same_classes_apart(subjects):
    assert {name: set(subject.rivals) for name, subject in subjects.items()} == {
        "ash": {"oak", "elm"},
        "oak": {"ash", "elm"},
        "elm": {"ash", "oak"},
    }
    assert subjects["ash"].rivals["oak"] is subjects["oak"].classifier
    stranger = dataclasses.replace(make_subject(name="stranger"), class_names=("x", "y", "z"))
    met = studies.introduce({"ash": subjects["ash"], "stranger": stranger})
    assert met["ash"].rivals == met["stranger"].rivals == {}


def test_rows_put_together_are_the_matrix_of_the_pure_function(subjects):
    study = studies.build("transfer", **OPTIONS)
    findings = {name: study.run(subject) for name, subject in subjects.items()}
    stream = next(iter(subjects.values())).test
    images, labels = stream.images[:100], stream.labels[:100]
    attack = attacks.build("pgd", epsilon=0.1, steps=3, stop_on_success=False)
    keys = attacks.example_keys(0, np.arange(100))
    models = {name: subject.classifier for name, subject in subjects.items()}
    expected = transfer.matrix(models, attack, keys, images, labels)
    for i, source in enumerate(expected.names):
        entries = findings[source].summary["attacked"]["pgd"]
        for j, target in enumerate(expected.names):
            assert entries[target]["rate"]["value"] == pytest.approx(expected.rates[i, j])
            assert entries[target]["raw"]["value"] == pytest.approx(expected.raw[i, j])
            assert entries[target]["both"] == expected.both[i, j].sum()
    table = study.tables(findings)["transfer"]
    assert table.columns[3:] == ("shown to ash", "shown to oak", "shown to elm")
    assert [row[0] for row in table.rows] == ["ash", "ash", "oak", "oak", "elm", "elm"]
    found = study.compare(findings["ash"], findings["oak"])[0]
    both = expected.both[0, 1]
    assert found.difference == pytest.approx(expected.rates[1, 0] - expected.rates[0, 1])
    assert findings["ash"].summary["outward"]["pgd"]["value"] <= 1
    assert both.any()


def test_a_missing_row_and_a_model_that_is_always_wrong_leave_gaps(subjects):
    study = studies.build("transfer", **OPTIONS)
    wrong = dataclasses.replace(subjects["ash"].test, labels=(subjects["ash"].test.labels + 1) % 3)
    oak = dataclasses.replace(subjects["oak"], test=wrong)
    findings = {"oak": study.run(oak), "elsewhere": study.run(subjects["elm"])}
    assert study.figures(findings).keys() == {"transfer"}
    for table in study.tables(findings).values():
        assert table.csv()
    assert study.compare(*findings.values()) == []


def test_when_it_does_not_apply(subjects):
    study = studies.build("transfer", **OPTIONS)
    assert "two runs or more" in study.applicable(make_subject())
    assert study.applicable(subjects["ash"]) is None
    assert "threat" in study.applicable(dataclasses.replace(subjects["ash"], threat=None))
    with pytest.raises(errors.UserError, match="did you mean"):
        studies.build("transfer", attacks=("pgdd",))


def test_a_minimal_attack_is_refused(subjects):
    with pytest.raises(errors.UserError, match="takes bounded attacks"):
        studies.build("transfer", attacks=("fmn",)).applicable(subjects["ash"])


def test_another_rival_asks_for_another_result(tmp_path, subjects, caplog):
    alone = {name: dataclasses.replace(subject, rivals={}) for name, subject in subjects.items()}
    asked = {"transfer": studies.build("transfer", **OPTIONS), "accuracy": studies.build("accuracy", batch=64)}
    one = {"ash": alone["ash"]}
    assert "two runs" in evaluate.evaluate_runs(tmp_path, one, asked, 0)["ash"]["transfer"].skipped
    two = {name: alone[name] for name in ("ash", "oak")}
    found = evaluate.evaluate_runs(tmp_path, two, asked, 0)
    assert found["ash"]["transfer"].finding.summary["targets"] == ["ash", "oak"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(times) == 4
    evaluate.evaluate_runs(tmp_path, two, asked, 0)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    evaluate.evaluate_runs(tmp_path, alone, asked, 0)
    changed = {path.parent.parent.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {"transfer"}
    assert "of other rivals" in caplog.text
