"""The study of AutoAttack: closed form on a linear model, what its summary says, and what stops it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import linear, make_subject

from robust_vit import classifier, errors, evaluate, files, report, studies
from robust_vit.attacks import expectations
from robust_vit.report import results

SETTINGS = {"examples": 24, "together": 16, "batch": 8}


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture(scope="module")
def finding(subject):
    return studies.build("auto_attack", **SETTINGS).run(subject)


def test_a_linear_model_breaks_just_where_the_closed_form_says(subject, finding):
    stream = subject.test.with_batch(24, limit=24).batch(0)
    kernel = np.asarray(subject.classifier.variables["kernel"], np.float64)
    bias = np.asarray(subject.classifier.variables["bias"], np.float64)
    images, labels = stream["image"].reshape(24, -1).astype(np.float64), stream["label"]
    logits = images @ kernel + bias
    # The most that a change of 0.1 a pixel in the box adds to the margin over each other class.
    broken = np.zeros(24, bool)
    for other in range(3):
        weights = kernel[:, other][None] - kernel[:, labels].T
        room = np.where(weights > 0, np.minimum(1.0 - images, 0.1), np.minimum(images, 0.1))
        broken |= (other != labels) & (
            (np.abs(weights) * room).sum(axis=1) > logits[np.arange(24), labels] - logits[:, other]
        )
    correct = logits.argmax(axis=1) == labels
    robust = finding.records["correct"] & ~np.logical_or.reduce(
        [finding.records[f"success/{name}"] for name in ("apgd_ce", "apgd_t", "fab_t", "square")]
    )
    np.testing.assert_array_equal(robust, correct & ~broken)
    assert 0 < robust.sum() < correct.sum()


def test_the_summary_is_the_sequence(finding):
    summary = finding.summary
    after = summary["after"]
    assert [entry["attack"] for entry in after] == ["apgd_ce", "apgd_t", "fab_t", "square"]
    left = [summary["clean"]["value"], *(entry["value"] for entry in after)]
    assert left == sorted(left, reverse=True)
    assert summary["robust"]["value"] == after[-1]["value"]
    for entry, before in zip(after, left, strict=False):
        assert entry["attempted"] == round(24 * before)
        assert entry["useful_passes"] <= entry["executed_passes"]
    assert any("apgd_t needs 4" in caveat for caveat in summary["caveats"])
    assert not summary["guards"]["black box"]["fired"]


def test_a_black_box_that_is_stronger_is_told(finding):
    records = dict(finding.records)
    records["success/square"] = records["correct"].copy()
    for name in ("apgd_ce", "apgd_t", "fab_t"):
        records[f"success/{name}"] = np.zeros_like(records["correct"])
    summary = studies.build("auto_attack", **SETTINGS).summarise(records)
    assert summary["guards"]["black box"]["fired"]
    assert any("Square, which sees no gradient, broke" in caveat for caveat in summary["caveats"])
    told = dataclasses.replace(finding, records=records, summary=summary)
    assert studies.build("auto_attack", **SETTINGS).entry(told, name="a model")["unreliable"]


def test_the_report_holds_an_entry_of_robustbench(subject, tmp_path):
    """Shaped as `robust_vit.attacks.card` is; who computed it and how long is that of the result, not of the report."""
    study = studies.build("auto_attack", **SETTINGS)
    result = evaluate.run_study(study, "auto_attack", subject, results.folder(tmp_path / "vit", "auto_attack", 0))
    page = report.write([tmp_path], tmp_path / "report")
    listed = files.read_json(page.parent / "card.json")["runs"]["vit"]["studies"]["auto_attack"]["robustbench"]
    summary, evaluation = result.finding.summary, listed["evaluation"]
    assert listed == study.entry(result.finding, name="vit", architecture="", seed=0)
    assert (listed["name"], listed["dataset"], listed["eps"]) == ("vit", "noise", "0.1")
    assert listed["autoattack_acc"] == listed["reported"] == f"{100 * summary['robust']['value']:.2f}"
    assert listed["clean_acc"] == f"{100 * summary['clean']['value']:.2f}"
    assert listed["unreliable"] is False
    assert evaluation["robust"] == summary["robust"]
    assert evaluation["by_attack"]["square"]["so_far"] == summary["robust"]
    # The first attack had a look at all, Square at what the others left.
    assert evaluation["by_attack"]["apgd_ce"]["alone"] == evaluation["by_attack"]["apgd_ce"]["so_far"]
    assert evaluation["by_attack"]["square"]["alone"] is None
    assert sum(evaluation["passes"].values()) == sum(entry["useful_passes"] for entry in summary["after"])
    assert evaluation["seconds"] == result.provenance["wall_seconds"]
    assert evaluation["versions"] == result.provenance["versions"]


def test_two_models_are_compared_on_the_same_images(finding):
    study = studies.build("auto_attack", **SETTINGS)
    other = study.run(make_subject(seed=1, noise=2.0))
    (comparison,) = study.compare(finding, other)
    assert comparison.difference == pytest.approx(other.summary["robust"]["value"] - finding.summary["robust"]["value"])
    assert study.compare(finding, dataclasses.replace(other, summary={**other.summary, "epsilon": 0.2})) == []


def _noisy_linear(variables, images, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys)
    return linear(variables, images + 0.1 * noise)


def test_a_stochastic_model_is_planned_with_all_its_draws(subject):
    model = classifier.wrap(_noisy_linear, subject.classifier.variables, stochastic=True)
    stochastic = dataclasses.replace(subject, classifier=model)
    study = studies.build("auto_attack", version="rand", **SETTINGS)
    assert study.applicable(stochastic) is None
    assert "for stochastic models" in study.applicable(subject)
    ahead, back = study.passes(stochastic)
    # Two chunks of 16; two attacks of 102 steps; the look at the clean image, and one at each attack's result.
    # With three classes APGD-DLR is itself; nothing ends early.
    assert (ahead, back) == (32 * (1 + 20 * (1 + 2 * (102 + 1))), 32 * 20 * 2 * 102)
    planned = [program for program in study.programs(stochastic) if "step" in program.name or "loop" in program.name]
    assert planned
    for program in planned:
        draws = [
            leaf.draws for leaf in jax.tree.leaves(program.arguments, is_leaf=_is_expectation) if _is_expectation(leaf)
        ]
        assert draws == [20]


def _is_expectation(value):
    return isinstance(value, expectations.Expectation)


def test_what_stops_it(subject):
    study = studies.build("auto_attack")
    assert "no threat model" in study.applicable(dataclasses.replace(subject, threat=None))
    assert study.applicable(subject) is None
    with pytest.raises(errors.UserError, match="standrad"):
        studies.build("auto_attack", version="standrad")
    with pytest.raises(errors.UserError, match="together is 0"):
        studies.build("auto_attack", together=0)
