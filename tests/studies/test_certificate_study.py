"""Certified accuracy: closed form of linear models, bounds that bracket, contradictions that are told."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_stream, make_subject

from robust_vit import classifier, errors, studies
from robust_vit.attacks import smoothing

OPTIONS = {"batch": 32, "estimation": 200, "selection": 20, "radii": (0.15, 0.3), "sigmas": (0.5,), "steps": 2}


def halves(variables, images):
    score = images.reshape(images.shape[0], -1) @ variables["w"]
    return jnp.stack([-score, score], axis=1)


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=25)
    images = rng.uniform(0.1, 0.9, size=(48, 5, 5, 1)).astype(np.float32)
    weights -= weights.mean()
    margins = images.reshape(48, -1) @ weights / np.linalg.norm(weights)
    labels = (margins > 0).astype(np.int32)
    labels[:6] = 1 - labels[:6]
    subject = studies.Subject(
        classifier=classifier.wrap(halves, {"w": jnp.asarray(weights, jnp.float32)}),
        test=make_stream(images, labels),
        num_classes=2,
    )
    return studies.build("certificate", **OPTIONS).run(subject), margins


def test_a_half_space_is_certified_below_its_distance_and_attacked_above(found):
    finding, margins = found
    records, level = finding.records, finding.summary["levels"]["0.5"]
    proven = records["prediction/0.5"] != smoothing.ABSTAIN
    assert (records["radius/0.5"] <= np.abs(margins) + 0.02).all()
    assert proven.mean() > 0.3
    np.testing.assert_array_equal(records["prediction/0.5"][proven], (margins > 0)[proven])
    right = np.asarray(margins > 0) == records["label"]
    for at, attacked in zip(level["certified"], level["attacked"], strict=True):
        exact = np.mean(right & (np.abs(margins) >= at["radius"]))
        assert at["value"] <= exact + 1e-9 <= attacked["value"] + 1e-9
    assert level["contradictions"] == 0
    assert level["curve"][0]["value"] == np.mean(proven & right)
    assert level["curve"][-1]["radius"] == level["largest_radius"]
    assert finding.summary["clean"]["value"] == 42 / 48


def test_what_is_certified_and_broken_at_once_is_told(found):
    finding, _ = found
    records = dict(finding.records)
    records["broken/0.5"] = np.ones_like(records["broken/0.5"])
    summary = studies.build("certificate", **OPTIONS).summarise(records)
    assert summary["levels"]["0.5"]["contradictions"] > 0
    assert "both certified and broken" in summary["caveats"][0]


def test_without_steps_there_is_no_attack():
    study = studies.build("certificate", **{**OPTIONS, "steps": 0, "estimation": 40, "examples": 20})
    finding = study.run(make_subject())
    assert finding.summary["levels"]["0.5"]["attacked"] == []
    assert study.passes(make_subject()) == (32 * (1 + 20 + 40), 0)
    assert len(study.tables({"run": finding})["certificate"].rows[0]) == len(study.tables({})["certificate"].columns)
    assert study.figures({"run": finding})


def test_a_model_that_draws_is_not_certified(subject):
    def noisy(images, keys):
        return images[:, 0, 0] * jnp.ones((1, 3))

    drawing = dataclasses.replace(subject, classifier=classifier.wrap(noisy, stochastic=True))
    assert "draws itself" in studies.build("certificate").applicable(drawing)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigmas": (0.5, 0.25)}, "rising order"),
        ({"radii": (0.0,)}, "positive"),
        ({"alpha": 0.7}, "probability of error"),
        ({"estimation": 0}, "estimation is 0"),
        ({"samples": 2.5}, "samples is 2.5"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(options, words):
    with pytest.raises(errors.UserError, match=words):
        studies.build("certificate", **options)
