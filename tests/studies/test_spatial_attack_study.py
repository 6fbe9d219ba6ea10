"""Accuracy by the limits of turn and shift where it is known: lights that cross the middle."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_stream, make_subject

from robust_vit import classifier, errors, studies

SIZE = 16


def halves(variables, images):
    """Whether there is more light in the left or in the right half."""
    mass = images.sum(axis=(1, 3))
    score = variables["scale"] * (mass[:, SIZE // 2 :].sum(axis=1) - mass[:, : SIZE // 2].sum(axis=1))
    return jnp.stack([-score, score], axis=1)


def make_lights(places):
    """Lights as tall as the image, so many pixels right of the middle; those on the left are misclassified."""
    images = np.zeros((len(places), SIZE, SIZE, 1))
    for image, place in zip(images, places, strict=True):
        image[4:12, SIZE // 2 + place] = 1.0
    return studies.Subject(
        classifier=classifier.wrap(halves, {"scale": jnp.float32(1.0)}),
        test=make_stream(images, np.ones(len(places))),
        num_classes=2,
    )


SETTINGS = {"batch": 4, "grid": (7, 1, 3), "degrees": 4.0, "shift": 3 / SIZE, "tries": 5, "together": 4, "exhibits": 2}


def test_a_light_breaks_where_it_can_be_carried_over_the_middle():
    # A light at pixel 8 + place crosses where the shift is above place + 1/2; turns of 4 degrees hardly move it.
    places = np.asarray([0, 1, 2, 3, 4, -1])
    study = studies.build("spatial_attack", **SETTINGS)
    finding = study.run(make_lights(places))
    summary, records = finding.summary, finding.records
    np.testing.assert_array_equal(records["correct"], places >= 0)
    assert summary["clean"]["value"] == 5 / 6
    shifts = [round(curve["shift"] * SIZE) for curve in summary["limits"]]
    assert shifts == [0, 1, 2, 3]
    for shift, curve in zip(shifts, summary["limits"], strict=True):
        assert curve["degrees"] == [0.0, 4.0]
        for point in curve["accuracy"]:
            assert point["value"] == np.mean((places >= 0) & (shift < places + 0.5))
    assert summary["grid"]["value"] == 2 / 6
    broken = (places >= 0) & (places < 3)
    worst = records["worst/grid"][broken]
    # The highest loss is where the light is wholly on the other side.
    assert (worst[:, 0] * SIZE < -places[broken] - 0.5).all()
    np.testing.assert_array_equal(records["prediction/grid"], np.where(places > 2, 1, 0))
    assert records["right/grid"].shape == (6, 21)
    assert records["right/random"].shape == (6, 6)


def test_a_worst_case_is_no_better_than_what_it_holds():
    study = studies.build("spatial_attack", batch=64, examples=100, grid=(3, 3, 5), tries=4, exhibits=0)
    finding = study.run(make_subject())
    summary = finding.summary
    assert summary["grid"]["value"] < summary["clean"]["value"]
    assert summary["random"]["value"] <= min(summary["clean"]["value"], summary["average"]["value"])
    first, last = summary["limits"][0], summary["limits"][-1]
    assert first["accuracy"][0] == summary["clean"]
    assert last["accuracy"][-1] == summary["grid"]
    for curve in summary["limits"]:
        values = [point["value"] for point in curve["accuracy"]]
        assert values == sorted(values, reverse=True)
    assert list(study.figures({"a": finding})) == ["spatial_limits"]
    # 100 images in 2 chunks of 64: the image itself, 45 transforms in 9 steps of 5, 5 in one.
    assert study.passes(make_subject()) == (128 * (1 + 45 + 5), 0)


def test_runs_with_other_limits_are_not_compared():
    study = studies.build("spatial_attack", **SETTINGS)
    finding = study.run(make_lights(np.asarray([0, 2, 4])))
    wider = dataclasses.replace(finding, settings={**finding.settings, "degrees": 5.0})
    assert study.compare(finding, wider) == []
    read = dataclasses.replace(finding, settings=json.loads(json.dumps(finding.settings)))
    assert len(study.compare(finding, read)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [({"shift": 3.0}, "3/32, not 3"), ({"grid": (5, 5)}, "three numbers"), ({"exhibits": -1}, "exhibits is -1")],
)
def test_wrong_settings_are_told_before_anything_runs(options, words):
    with pytest.raises(errors.UserError, match=words):
        studies.build("spatial_attack", **options)
