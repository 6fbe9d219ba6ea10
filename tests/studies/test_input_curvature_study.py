"""Curvature in the input against dense Hessians, of images that a model is sure of too; what is piecewise linear says so."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_subject

from robust_vit import classifier, errors, losses, studies
from robust_vit.studies import input_curvature


def probabilities(subject):
    images = np.asarray(subject.test.images, np.float64).reshape(len(subject.test.images), -1)
    kernel, bias = (np.asarray(subject.classifier.variables[name], np.float64) for name in ("kernel", "bias"))
    scores = images @ kernel + bias
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), kernel


@pytest.fixture(scope="module")
def finding():
    return studies.build("input_curvature", batch=32, rank=8, tolerance=1e-4, exhibits=3).run(make_subject())


def test_a_linear_model_has_its_dense_spectra_and_its_kernels_singular_value(finding):
    p, kernel = probabilities(make_subject())
    records, labels = finding.records, make_subject().test.labels
    assert len(records["row"]) == 128  # Four batches; `examples` of the 150.
    for row in range(128):
        exact = np.linalg.eigvalsh(kernel @ (np.diag(p[row]) - np.outer(p[row], p[row])) @ kernel.T)
        # Measured: 1e-6, of images that the model is sure of too.
        np.testing.assert_allclose(records["top"][row], exact[-1], rtol=2e-5)
        assert abs(records["bottom"][row]) <= max(2e-6 * exact[-1], records["noise"][row])
        gradient = kernel @ (p[row] - np.eye(3)[labels[row]])
        np.testing.assert_allclose(records["gradient"][row], np.linalg.norm(gradient), rtol=2e-4, atol=1e-12)
    np.testing.assert_allclose(records["jacobian"], np.linalg.norm(kernel, 2), rtol=1e-5)
    np.testing.assert_allclose(records["softmax_share"], 1.0, atol=1e-4)
    assert records["converged"].all()
    assert any("piecewise linear" in caveat for caveat in finding.summary["caveats"])
    np.testing.assert_allclose(finding.summary["top"]["value"], np.median(records["top"]))
    assert finding.summary["negative"]["value"] == 0
    patterns = records["exhibit/patterns"]
    assert patterns.shape == (3, 6, 6, 1)
    np.testing.assert_allclose(np.linalg.norm(patterns.reshape(3, -1), axis=1), 1.0, rtol=1e-5)


def test_the_loss_keeps_its_digits_where_a_log_softmax_has_none():
    scores = np.asarray([[25.0, 3.0, -1.0], [2.0, 2.5, 1.0], [-30.0, 5.0, 4.0]])
    labels = jnp.zeros(3, jnp.int32)

    def second(loss, dtype):
        return np.asarray(jax.hessian(lambda x: loss(x, labels).sum())(jnp.asarray(scores, dtype)))

    def stable(x, labels):
        return input_curvature.loss(x, labels, jnp.asarray)

    with jax.enable_x64(True):
        exact = second(losses.cross_entropy, jnp.float64)
    found, plain = second(stable, jnp.float32), second(losses.cross_entropy, jnp.float32)
    assert np.isfinite(found).all()
    sure = (0, slice(None), 0)
    scale = np.abs(exact[sure]).max()
    assert 0 < scale < 1e-9
    np.testing.assert_allclose(found[sure], exact[sure], atol=1e-4 * scale)
    assert np.abs(plain[sure] - exact[sure]).max() > 0.1 * scale
    np.testing.assert_allclose(found, exact, atol=1e-6)
    np.testing.assert_allclose(stable(jnp.asarray(scores), labels), losses.cross_entropy(scores, labels), atol=1e-6)


def bent(variables, images):
    # Not far into its saturation, where float32 has few digits of its slope.
    return 2.0 * jnp.tanh(0.5 * linear(variables, images - 0.5))


def with_model(subject, apply):
    return dataclasses.replace(subject, classifier=classifier.wrap(apply, subject.classifier.variables))


def test_a_bent_model_curves_by_itself_and_downwards_too_and_a_batch_changes_nothing():
    subject = with_model(make_subject(), bent)
    study = studies.build("input_curvature", batch=64, examples=40, rank=24, tolerance=1e-4, output="probabilities")
    finding = study.run(subject)
    shares = finding.records["softmax_share"]
    assert (np.abs(shares - 1.0) > 0.05).mean() > 0.5
    assert not any("piecewise linear" in caveat for caveat in finding.summary["caveats"])
    assert finding.summary["negative"]["value"] > 0.2
    # In float64: a log-softmax in float32 has fewer digits of an image that the model is sure of.
    variables = {name: np.asarray(value, np.float64) for name, value in subject.classifier.variables.items()}
    row = int(np.argmin(finding.records["bottom"]))
    with jax.enable_x64(True):
        image = jnp.asarray(subject.test.images[row : row + 1], jnp.float64)
        label = jnp.asarray(subject.test.labels[row : row + 1])
        exact = jax.hessian(lambda x: losses.cross_entropy(bent(variables, x), label).sum())(image)
        jacobian = jax.jacobian(lambda x: jax.nn.softmax(bent(variables, x))[0])(image)
    ends = np.linalg.eigvalsh(np.asarray(exact).reshape(36, 36))[[-1, 0]]
    np.testing.assert_allclose([finding.records[name][row] for name in ("top", "bottom")], ends, rtol=2e-4)
    np.testing.assert_allclose(finding.records["jacobian"][row], np.linalg.norm(jacobian.reshape(3, 36), 2), rtol=1e-4)
    parts = dataclasses.replace(study, batch=16).run(subject).records
    for name in ("top", "bottom", "gradient", "jacobian", "softmax_share"):
        # Measured: 4e-6, where an image is near the end of its convergence.
        np.testing.assert_allclose(parts[name], finding.records[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(parts["steps"], finding.records["steps"])


def test_too_few_steps_are_told():
    study = studies.build("input_curvature", batch=64, examples=40, rank=2, tolerance=1e-6)
    summary = study.run(with_model(make_subject(), bent)).summary
    assert summary["converged"] < 1
    assert any("did not reach a relative residual" in caveat for caveat in summary["caveats"])


@jax.custom_vjp
def once(x):
    return x**2


def _backward(saved, cotangent):
    return (jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(saved.shape, saved.dtype), 2 * saved * cotangent),)


once.defvjp(lambda x: (once(x), x), _backward)


def only_once(variables, images):
    return once(linear(variables, images))


def test_when_it_does_not_apply(subject):
    study = studies.build("input_curvature")
    assert study.applicable(subject) is None
    assert "the product cannot be formed" in study.applicable(with_model(subject, only_once))
    for options, message in (
        ({"output": "logit"}, "did you mean 'logits'"),
        ({"rank": 1}, "rank from 2"),
        ({"tolerance": 0.0}, "tolerance above 0"),
    ):
        with pytest.raises(errors.UserError, match=message):
            studies.build("input_curvature", **options)
