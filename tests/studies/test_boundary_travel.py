"""Lengths of travel against closed forms, what the jump flips, what meets no boundary, PSNR as a check of lengths."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_stream, make_subject

from robust_vit import classifier, errors, studies
from robust_vit.studies import travel_figures


def make_two_class(*, spread=0.1, examples=80, offset=0.0):
    """Images around the middle grey and a linear model of two classes whose boundary passes through it."""
    generator = np.random.default_rng(3)
    images = generator.uniform(0.5 - spread, 0.5 + spread, (examples, 5, 5, 1))
    weight = generator.normal(0, 1, 25)
    score = (images.reshape(examples, -1) - 0.5) @ weight + offset
    variables = {
        "kernel": jnp.asarray(np.stack([-weight, weight], axis=1), jnp.float32),
        "bias": jnp.asarray([0.5 * weight.sum() - offset, -0.5 * weight.sum() + offset], jnp.float32),
    }
    labels = (score > 0).astype(np.int32)
    subject = studies.Subject(
        classifier=classifier.wrap(linear, variables), test=make_stream(images, labels), num_classes=2
    )
    return subject, np.abs(score) / np.abs(weight).sum()


def test_lengths_and_psnr_of_a_linear_model_are_exact():
    subject, distance = make_two_class()
    study = studies.build("boundary_travel", batch=32, examples=None, jump=0.02)
    finding = study.run(subject)
    records = finding.records
    np.testing.assert_allclose(records["epsilon/start"], distance, atol=1e-6)
    assert records["crossed/start"].all()
    # Nothing is clipped here: the length is the change, and the change is the PSNR.
    np.testing.assert_allclose(records["change/start"], records["epsilon/start"], rtol=1e-3, atol=1e-6)
    psnr = travel_figures.psnr(records["change/start"])
    far = distance > 1e-3
    np.testing.assert_allclose(psnr[far], -20 * np.log10(distance[far]), atol=0.02)
    summary = finding.summary["starts"]["start"]
    assert summary["median"]["value"] == pytest.approx(np.median(distance), abs=1e-6)
    assert summary["examples"] == 80
    assert sum(group["examples"] for group in summary["bins"]) == 80
    # The further from the boundary, the surer: of a linear model of two classes, in the same order.
    assert summary["correlation"]["value"] > 0.999


def test_the_jump_flips_what_is_near_and_counts_for_the_others_only():
    subject, distance = make_two_class(spread=0.02)
    study = studies.build("boundary_travel", batch=32, examples=None, jump=0.01)
    finding = study.run(subject)
    records, summary = finding.records, finding.summary
    flipped = records["flipped"]
    assert 0.1 < flipped.mean() < 0.9
    assert distance[flipped].mean() < distance[~flipped].mean()
    assert (records["epsilon/jump"][flipped] == 0).all()
    assert (records["epsilon/jump"][~flipped] > 0).all()
    assert summary["flipped"]["value"] == flipped.mean()
    assert summary["starts"]["jump"]["examples"] == (~flipped).sum()
    assert any("The jump alone flips" in caveat for caveat in summary["caveats"])
    # A half-space is no curved region: who stands the jump is on average no nearer than before, unlike after a short cut.
    before, after = (records[f"epsilon/{name}"][~flipped] for name in ("start", "jump"))
    assert summary["ratio"]["value"] == pytest.approx(np.median(after) / np.median(before))
    assert summary["ratio"]["value"] > 1


def test_what_is_wrong_is_left_out_and_what_meets_no_boundary_is_censored():
    subject, distance = make_two_class(spread=0.3)
    labels = subject.test.labels.copy()
    labels[:5] = 1 - labels[:5]
    subject = dataclasses.replace(subject, test=dataclasses.replace(subject.test, labels=labels))
    limit = float(np.quantile(distance[5:], 0.3))
    study = studies.build("boundary_travel", batch=32, examples=None, stride=limit / 10, limit=limit, jump=0.0)
    finding = study.run(subject)
    entry = finding.summary["starts"]["start"]
    assert entry["examples"] == 75
    assert entry["censored"]["value"] == pytest.approx(0.7, abs=0.02)
    assert entry["median"]["value"] == pytest.approx(limit)
    assert any("More than half" in caveat for caveat in finding.summary["caveats"])
    np.testing.assert_allclose(
        entry["mean"]["value"], np.minimum(distance[5:], limit)[finding.records["correct"][5:]].mean(), atol=1e-6
    )
    # A jump of no length changes nothing.
    np.testing.assert_array_equal(finding.records["epsilon/jump"], finding.records["epsilon/start"])


def test_a_model_that_is_never_right_has_no_lengths():
    subject, _ = make_two_class(examples=20)
    wrong = dataclasses.replace(subject.test, labels=1 - subject.test.labels)
    study = studies.build("boundary_travel", batch=32, examples=None, stride=0.1, exhibits=2)
    findings = {"never": study.run(dataclasses.replace(subject, test=wrong)), "always": study.run(subject)}
    assert findings["never"].summary["starts"]["start"]["median"] is None
    assert findings["never"].summary["flipped"] is None
    assert study.figures(findings).keys() == study.captions.keys()
    assert len(study.tables(findings)["boundary_travel"].rows) == 4
    assert study.compare(*findings.values()) == []


def test_most_passes_are_those_of_an_image_that_meets_nothing():
    subject = make_subject()
    study = studies.build("boundary_travel", batch=64, examples=64, stride=0.1, limit=0.5, jump=0.0)
    # A look, and twice: the gradient, the scan's look at zero, five points, twenty-four halvings.
    assert study.passes(subject) == (64 * (1 + 2 * (1 + 1 + 5 + 24)), 64 * 2)
    finding = study.run(subject)
    assert finding.summary["passes"]["useful"] <= finding.summary["passes"]["forward_passes"] <= 64 * 2 * 30


@pytest.mark.parametrize("options", [{"stride": 0.0}, {"stride": 2.0}, {"jump": -0.1}])
def test_wrong_settings_are_told(options):
    with pytest.raises(errors.UserError, match="expected 0 < stride <= limit"):
        studies.build("boundary_travel", **options)
