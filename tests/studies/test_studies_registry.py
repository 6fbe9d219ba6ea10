"""What holds of every study: one row for each name that is registered."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
from conftest import each_study, make_subject

from robust_vit import attacks, errors, files, plots, studies

SETTINGS = {
    "accuracy": {"batch": 64},
    "attack_curve": {"batch": 64, "examples": 100, "multiples": (0.5, 1.0), "steps": 3, "exhibits": 2},
    "auto_attack": {"examples": 12, "together": 8, "batch": 4},
    "boundary_travel": {"batch": 64, "examples": 100, "stride": 0.02, "jump": 0.1, "exhibits": 2},
    "calibration": {"batch": 64, "draws": 50},
    "certificate": {"batch": 32, "examples": 60, "estimation": 100, "selection": 20, "radii": (0.2, 0.5), "steps": 2},
    "loss_landscape": {"points": 5, "examples": 20, "microbatch": 8, "block": 9},
    "loss_progression": {"batch": 64, "examples": 100, "steps": 3},
    "transfer": {"batch": 64, "examples": 100, "steps": 3},
    "hessian_density": {"batch": 16, "probes": 3, "rank": 12},
    "hessian_spectrum": {"batch": 8, "mini_batches": 3, "top": 3, "rank": 20},
    "input_curvature": {"batch": 64, "examples": 100, "rank": 12, "exhibits": 2},
    "sharpness": {
        "batch": 8,
        "mini_batches": 3,
        "radii": (0.05, 0.1),
        "adaptive_radii": (0.1, 0.2),
        "spreads": (0.01, 0.02),
        "adaptive_spreads": (0.1,),
        "steps": 4,
        "pairs": 2,
        "rank": 12,
    },
    "representation_curvature": {
        "layer": "logits",
        "examples": 6,
        "directions": 4,
        "batch": 8,
        "steps": 4,
        "step_sizes": (1e-3, 1e-2),
        "exhibits": 1,
    },
    "spatial_attack": {"batch": 64, "examples": 100, "grid": (3, 3, 5), "tries": 3, "exhibits": 2},
    "patch_attack": {
        "batch": 50,
        "examples": 100,
        "steps": 3,
        "learned_images": 100,
        "areas": (0.1, 0.3),
        "exhibits": 2,
    },
    "physical_attack": {
        "batch": 50,
        "examples": 100,
        "attack": "pgd(steps=2)",
        "samples": 2,
        "strengths": (0.5, 1.0),
        "exhibits": 2,
    },
}


@pytest.fixture(scope="module")
def findings():
    """What a study found on two models, run when it is first asked for."""
    subjects = {"first": make_subject(seed=0, name="first"), "second": make_subject(seed=1, noise=2.0, name="second")}
    subjects = studies.introduce(subjects)

    @functools.cache
    def find(name):
        study = studies.build(name, **SETTINGS[name])
        return {run: study.run(subject) for run, subject in subjects.items()}

    return find


def test_the_table_is_the_registry():
    assert SETTINGS.keys() == studies.STUDIES.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_every_study_says_of_itself(name):
    study = studies.build(name)
    assert study.name == name
    assert study.title
    assert study.question.endswith("?")
    assert study.paper
    assert type(study).__doc__
    json.dumps(study.settings())
    again = studies.build(**json.loads(json.dumps(study.settings())))
    assert again == study


@pytest.mark.parametrize("name", each_study())
def test_records_are_of_equal_length_and_summaries_survive_json(name, findings):
    study = studies.build(name, **SETTINGS[name])
    for finding in findings(name).values():
        lengths = {len(v) for k, v in finding.records.items() if not k.startswith("exhibit/")}
        assert len(lengths) == 1
        assert {"row", "label"} <= finding.records.keys()
        assert isinstance(finding.summary["caveats"], list)
        plain = files.jsonable(finding.summary)
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        # The summary is a function of the records alone: read back from the disk they give it again.
        assert study.summarise(dict(finding.records)) == finding.summary


@pytest.mark.parametrize("name", each_study())
def test_figures_tables_and_comparisons_from_what_was_read_back(name, findings, tmp_path):
    study = studies.build(name, **SETTINGS[name])
    read = {}
    for run, finding in findings(name).items():
        files.write_npz(tmp_path / f"{run}.npz", finding.records)
        files.write_json(tmp_path / f"{run}.json", finding.summary)
        records, summary = files.read_npz(tmp_path / f"{run}.npz"), files.read_json(tmp_path / f"{run}.json")
        read[run] = studies.Finding(finding.settings, records, summary)
    figures, again = study.figures(read), study.figures(findings(name))
    assert figures
    for key, figure in figures.items():
        assert plots.render(figure, "svg") == plots.render(again[key], "svg")
    assert study.figures({"first": read["first"]}).keys() == figures.keys()
    assert study.figures({}) == {}
    for table in study.tables(read).values():
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert {row[0] for row in table.rows} == {"first", "second"}
        assert table.csv()
        assert table.latex()
    comparisons = study.compare(read["first"], read["second"])
    assert comparisons
    for forth, back in zip(comparisons, study.compare(read["second"], read["first"]), strict=True):
        np.testing.assert_allclose(forth.difference, -back.difference)
        assert 0 <= forth.p_value <= 1
        assert forth.low <= forth.difference <= forth.high
        assert forth.over in ("images", "mini-batches", "probes")
    same = study.compare(read["first"], read["first"])
    assert all(entry.difference == 0 and entry.p_value == 1.0 for entry in same)
    assert study.headline(read["first"])
    json.dumps(files.jsonable(study.card(read["first"])), allow_nan=False)


@pytest.mark.parametrize("name", each_study())
def test_a_chunk_is_a_pure_function(name):
    study, subject = studies.build(name, **SETTINGS[name]), make_subject()
    index = study.chunks(subject) - 1
    first, second = study.chunk(subject, index), study.chunk(make_subject(), index)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    forward, backward = study.passes(subject)
    assert forward > 0
    assert backward >= 0


def test_runs_on_other_images_are_not_compared(findings):
    study = studies.build("accuracy", **SETTINGS["accuracy"])
    first, second = findings("accuracy").values()
    marked = [
        dataclasses.replace(finding, provenance={"data_fingerprint": mark})
        for finding, mark in ((first, "a"), (second, "b"))
    ]
    assert study.compare(*marked) == []
    relabelled = dataclasses.replace(second, records={**second.records, "label": second.records["label"][::-1]})
    assert study.compare(first, relabelled) == []


def test_runs_are_paired_by_row_not_by_position(findings):
    study = studies.build("accuracy", **SETTINGS["accuracy"])
    first, second = findings("accuracy").values()
    order = np.random.default_rng(0).permutation(len(second.records["row"]))[:120]
    shuffled = {k: v if k.startswith("exhibit/") else v[order] for k, v in second.records.items()}
    found = study.compare(first, dataclasses.replace(second, records=shuffled))[0]
    rows = second.records["row"][order]
    expected = np.mean(shuffled["rank"] < 1) - np.mean(first.records["rank"][rows] < 1)
    np.testing.assert_allclose(found.difference, expected)


@pytest.mark.parametrize("name", ["attack_curve", "auto_attack", "physical_attack", "transfer"])
def test_an_attack_takes_the_images_of_its_threat_unless_it_is_told(name, monkeypatch):
    subject, study = make_subject(), studies.build(name)
    fixed = attacks.ThreatModel("noise", attacks.norms.L2, 0.1, examples=40)
    monkeypatch.setitem(attacks.THREATS, fixed.name, fixed)
    own, told = dataclasses.replace(study, threat=fixed.name), dataclasses.replace(study, examples=7)
    for asked, model, count in (
        (study, subject, 150),  # The subject's threat names no number.
        (study, dataclasses.replace(subject, threat=fixed.name), 40),
        (study, dataclasses.replace(subject, threat="cifar10/linf-8"), 150),
        (own, subject, 40),
        (told, dataclasses.replace(subject, threat=fixed.name), 7),
    ):
        assert asked._stream(model).num_examples == count
        assert asked.most(model) == count
    assert studies.build("accuracy")._stream(dataclasses.replace(subject, threat=fixed.name)).num_examples == 150


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(errors.UserError, match="did you mean 'calibration'"):
        studies.build("calibraton")
    with pytest.raises(errors.UserError, match="did you mean 'examples'"):
        studies.build("accuracy", exampels=3)
