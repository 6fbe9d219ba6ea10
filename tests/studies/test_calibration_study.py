"""The calibration study: its oracle, its temperature, and what it says without validation images."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from conftest import make_subject

from robust_vit import studies
from robust_vit.metrics import calibration


def test_the_signed_error_is_accuracy_minus_confidence(subject):
    for bins in (3, 10, 15):
        summary = studies.build("calibration", bins=bins, draws=20).run(subject).summary["raw"]
        np.testing.assert_allclose(summary["signed_kim"]["value"], summary["accuracy"] - summary["mean_confidence"])
        np.testing.assert_allclose(summary["signed_park"]["value"], -summary["signed_kim"]["value"])
        assert summary["signed_park"]["low"] <= summary["signed_park"]["value"] <= summary["signed_park"]["high"]
        diagram = summary["diagram"]
        gaps = [n * abs(a - c) for n, a, c in zip(diagram["counts"], diagram["accuracy"], diagram["confidence"], strict=True) if n]  # fmt: skip  # noqa: E501
        np.testing.assert_allclose(sum(gaps) / sum(diagram["counts"]), summary["ece"])


def test_the_temperature_comes_from_validation_and_not_from_test(subject):
    finding = studies.build("calibration", draws=20, batch=40).run(subject)
    logits = np.asarray(subject.classifier(jnp.asarray(subject.validation.images)))
    fitted = calibration.fit_temperature(logits, subject.validation.labels)
    np.testing.assert_allclose(finding.summary["temperature"]["value"], fitted.value, rtol=1e-5)
    on_test = calibration.fit_temperature(
        np.asarray(subject.classifier(jnp.asarray(subject.test.images))), subject.test.labels
    )
    assert abs(on_test.value - fitted.value) > 1e-3


def test_scaling_repairs_an_overconfident_model():
    summary = studies.build("calibration", draws=20).run(make_subject(scale=40.0, examples=400)).summary
    assert summary["temperature"]["value"] > 2
    assert summary["raw"]["signed_kim"]["value"] < -0.05
    assert summary["scaled"]["ece"] < 0.5 * summary["raw"]["ece"]
    assert summary["raw"]["consistency"]["p_value"] < 0.05
    assert summary["scaled"]["accuracy"] == summary["raw"]["accuracy"]


def test_without_validation_images_nothing_is_fitted(subject):
    finding = studies.build("calibration", draws=20).run(dataclasses.replace(subject, validation=None))
    assert "scaled" not in finding.summary
    assert "confidence_scaled" not in finding.records
    assert any("no validation images" in caveat for caveat in finding.summary["caveats"])
