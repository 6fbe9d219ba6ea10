"""Sharpness of a linear model against its dense Hessian, doubts that are told, and settings that are refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_subject

from robust_vit import classifier, errors, losses, studies
from robust_vit.studies import training_loss

SETTINGS = {
    "batch": 8,
    "mini_batches": 2,
    "radii": (0.01, 0.1),
    "adaptive_radii": (0.01, 0.1),
    "spreads": (0.003, 0.03),
    "adaptive_spreads": (0.003, 0.03),
    "steps": 12,
    "pairs": 40,
    "rank": 20,
    "tolerance": 1e-4,
}


@pytest.fixture(scope="module")
def finding():
    return studies.build("sharpness", **SETTINGS).run(make_subject())


def test_records_are_those_of_the_dense_loss_of_the_right_images(finding):
    subject, records = make_subject(), finding.records
    flat, unravel = jax.flatten_util.ravel_pytree(subject.classifier.params)
    for row in range(2):
        chosen = np.arange(8 * row, 8 * row + 8)
        np.testing.assert_array_equal(records["rows"][row], chosen)
        images, labels = jnp.asarray(subject.train.images[chosen]), jnp.asarray(subject.train.labels[chosen])

        def loss(vector, images=images, labels=labels):
            return losses.cross_entropy(linear(unravel(vector), images), labels).mean()

        with jax.default_matmul_precision("highest"):
            base, slope, matrix = loss(flat), np.asarray(jax.grad(loss)(flat)), np.asarray(jax.hessian(loss)(flat))
        np.testing.assert_allclose(records["loss"][row], base, rtol=1e-6)
        for kind, unit in (("raw", np.ones(len(flat))), ("adaptive", np.abs(np.asarray(flat)))):
            scaled = unit[:, None] * matrix * unit[None]
            top = np.linalg.eigvalsh(scaled)[-1]
            np.testing.assert_allclose(records[f"eigenvalue/{kind}"][row], top, rtol=1e-4)
            np.testing.assert_allclose(records[f"slope/{kind}"][row], np.linalg.norm(unit * slope), rtol=1e-4)
            for place, radius in enumerate((0.01, 0.1)):
                step = radius * unit**2 * slope / np.linalg.norm(unit * slope)
                rise = float(loss(flat + step) - base)
                np.testing.assert_allclose(records[f"one_step/{kind}"][row, place], rise, rtol=1e-3, atol=1e-6)
                worst = records[f"worst/{kind}"][row, place]
                first_order = radius * np.linalg.norm(unit * slope)
                # A linear model is convex: above its slope, and below with the curvature of all that is in reach.
                assert rise - 1e-6 <= worst <= first_order + 0.5 * radius**2 * top * (1.2 + 10 * radius)
            for place, spread in enumerate((0.003, 0.03)):
                mean, error = records[f"average/{kind}"][row, place], records[f"average_error/{kind}"][row, place]
                expected = 0.5 * spread**2 * np.trace(scaled)
                # Beyond the second order there is a little, and rounding of the loss.
                assert abs(mean - expected) < 4 * error + 0.05 * expected + 2e-7
    assert finding.summary["kinds"]["raw"]["quadratic"][1] == pytest.approx(0.005 * records["eigenvalue/raw"].mean())
    assert finding.summary["normalised_eigenvalue"]["value"] == pytest.approx(
        float(flat @ flat) * records["eigenvalue/raw"].mean(), rel=1e-5
    )


def test_normalised_logits_know_no_scale():
    subject = make_subject()
    batch = {"image": jnp.asarray(subject.train.images[:8]), "label": jnp.asarray(subject.train.labels[:8])}
    louder = jax.tree.map(lambda leaf: 10.0 * leaf, subject.classifier.params)
    values = [
        float(training_loss.MeanLoss(normalised=normalised)(params, batch, subject.classifier))
        for normalised in (True, False)
        for params in (subject.classifier.params, louder)
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    assert abs(values[2] - values[3]) > 0.1


def test_doubts_are_told(finding):
    study = studies.build("sharpness", **SETTINGS)
    assert finding.summary["caveats"] == []
    records = {**finding.records, "worst/raw": finding.records["worst/raw"][:, ::-1]}
    records["converged/adaptive"] = np.asarray([True, False])
    records["slope/adaptive"] = np.zeros(2)
    records["average_error/raw"] = 10 * np.abs(finding.records["average/raw"])
    caveats = " ".join(study.summarise(records)["caveats"])
    for words in ("falls with the radius", "50% of the largest eigenvalues (adaptive)", "exactly zero", "more `pairs`"):
        assert words in caveats
    records["one_step/raw"] = records["worst/raw"] + 1.0
    assert "One step (raw) found more" in " ".join(study.summarise(records)["caveats"])


def test_runs_are_compared_on_the_same_images_only(finding):
    study = studies.build("sharpness", **SETTINGS)
    found = study.compare(finding, finding)
    assert [entry.quantity for entry in found] == [
        "largest eigenvalue, raw",
        "worst-case sharpness, raw, radius 0.01",
        "largest eigenvalue, adaptive",
        "worst-case sharpness, adaptive, radius 0.01",
    ]
    other = dataclasses.replace(finding, records={**finding.records, "rows": finding.records["rows"] + 1})
    assert study.compare(finding, other) == []
    radii = {**finding.records, "radius/raw": finding.records["radius/raw"] + 1.0}
    assert len(study.compare(finding, dataclasses.replace(finding, records=radii))) == 3


def images_only(images):
    return linear({"kernel": jnp.ones((36, 3)), "bias": jnp.zeros(3)}, images)


def test_when_it_does_not_apply(subject):
    study = studies.build("sharpness")
    assert study.applicable(subject) is None
    assert "variables" in study.applicable(dataclasses.replace(subject, classifier=classifier.wrap(images_only)))
    assert "training images" in study.applicable(dataclasses.replace(subject, train=None))
    for options, message in (
        ({"radii": (0.2, 0.1)}, "ascending numbers above 0"),
        ({"radii": ()}, "ascending numbers above 0"),
        ({"adaptive_radii": (0.0, 0.1)}, "ascending numbers above 0"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": "auto"}, 'microbatch="auto" is what saves memory'),
    ):
        with pytest.raises(errors.UserError, match=message):
            studies.build("sharpness", **options)
