"""The spectrum of a linear model against the dense Hessian, and its summary against closed forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_subject

from robust_vit import classifier, errors, losses, studies
from robust_vit.studies import hessian_spectrum

TRACES = []


def counted(variables, images):
    TRACES.append(None)
    return linear(variables, images)


def dense(subject, batch, *, smoothing=0.0, decay=0.0):
    flat, unravel = jax.flatten_util.ravel_pytree(subject.classifier.params)

    def loss(vector):
        logits = linear(unravel(vector), batch["image"])
        return losses.cross_entropy(logits, batch["label"], smoothing=smoothing).mean()

    return np.linalg.eigvalsh(np.asarray(jax.hessian(loss)(flat), np.float64)) + decay


@pytest.mark.parametrize("stream_batch", [16, 5, 64])
def test_eigenvalues_are_those_of_the_dense_hessian_on_the_right_images(subject, stream_batch):
    subject = dataclasses.replace(subject, train=subject.train.with_batch(stream_batch), label_smoothing=0.1)
    study = studies.build("hessian_spectrum", batch=8, mini_batches=2, top=4, rank=20)
    record = study.chunk(subject, 1)
    chosen = np.arange(8, 16)
    np.testing.assert_array_equal(record["rows"][0], chosen)
    batch = {"image": jnp.asarray(subject.train.images[chosen]), "label": jnp.asarray(subject.train.labels[chosen])}
    expected = dense(subject, batch, smoothing=0.1, decay=0.01)
    order = np.argsort(-np.abs(expected))[:4]
    # Measured difference: 3e-7 of the largest.
    np.testing.assert_allclose(record["eigenvalues"][0], expected[order], atol=1e-5 * expected.max())
    assert record["converged"].all()


def test_weight_decay_is_an_exact_shift(subject):
    options = {"batch": 8, "mini_batches": 1, "top": 3, "rank": 20}
    plain = studies.build("hessian_spectrum", weight_decay=0.0, **options).chunk(subject, 0)
    shifted = studies.build("hessian_spectrum", weight_decay=0.25, **options).chunk(subject, 0)
    np.testing.assert_allclose(shifted["eigenvalues"], plain["eigenvalues"] + 0.25, rtol=1e-5)


def test_new_mini_batches_and_equal_models_compile_nothing(subject):
    subject = dataclasses.replace(subject, classifier=classifier.wrap(counted, subject.classifier.variables))
    study = studies.build("hessian_spectrum", batch=8, mini_batches=3, top=2, rank=20)
    study.chunk(subject, 0)
    count = len(TRACES)
    assert count > 0
    study.chunk(subject, 1)
    other = make_subject(seed=3)
    study.chunk(dataclasses.replace(other, classifier=classifier.wrap(counted, other.classifier.variables)), 2)
    assert len(TRACES) == count


def test_negative_share_and_mean_positive_of_known_eigenvalues(subject):
    study = studies.build("hessian_spectrum", batch=8, mini_batches=2, top=3, rank=20)
    records = dict(study.run(subject).records)
    records["eigenvalues"] = np.array([[4.0, -1.0, 1e-9], [2.0, -3.0, -1.0]])
    records["residuals"] = np.zeros((2, 3))
    records["noise"] = np.full(2, 1e-6)
    records["converged"] = np.array([[True, True, False], [True, True, True]])
    summary = study.summarise(records)
    np.testing.assert_allclose(summary["nep"]["value"], 3 / 6)
    np.testing.assert_allclose(summary["ape"]["value"], 3.0)
    np.testing.assert_allclose(summary["largest"]["value"], 3.0)
    np.testing.assert_allclose(summary["smallest"]["value"], -2.0)
    np.testing.assert_allclose(summary["unresolved"], 1 / 6)
    assert summary["nep"]["over"] == "mini-batches"
    assert any("did not reach" in caveat for caveat in summary["caveats"])
    assert any("no sign" in caveat for caveat in summary["caveats"])
    assert study.figures({"run": studies.Finding(study.settings(), records, summary)})


def test_smoothing_moves_no_mass_across_the_sign():
    grid = np.linspace(-30, 30, 6001)
    points = np.array([-2.0, 0.1, 0.2, 5.0])
    density = hessian_spectrum._density(points, grid)
    step = grid[1] - grid[0]
    np.testing.assert_allclose(density.sum() * step, 1.0, atol=0.01)
    np.testing.assert_allclose(density[grid < 0].sum() * step, 0.25, atol=0.01)


def test_runs_that_saw_other_images_are_not_compared(subject):
    study = studies.build("hessian_spectrum", batch=8, mini_batches=3, top=2, rank=20)
    first = study.run(subject)
    other = dataclasses.replace(first, records={**first.records, "rows": first.records["rows"] + 1})
    assert study.compare(first, other) == []


def images_only(images):
    return linear({"kernel": jnp.ones((36, 3)), "bias": jnp.zeros(3)}, images)


def test_when_it_does_not_apply(subject):
    study = studies.build("hessian_spectrum")
    assert study.applicable(subject) is None
    assert "variables" in study.applicable(dataclasses.replace(subject, classifier=classifier.wrap(images_only)))
    assert "training images" in study.applicable(dataclasses.replace(subject, train=None))
    with pytest.raises(errors.UserError, match="training images"):
        study.run(dataclasses.replace(subject, train=None))
    with pytest.raises(errors.UserError, match="mini_batches is 0"):
        studies.build("hessian_spectrum", mini_batches=0)
