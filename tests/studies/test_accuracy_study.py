"""Accuracy against scikit-learn's own score on real images, and what a broken model gets."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_subject

from robust_vit import classifier, errors, studies


def test_padding_and_batch_size_change_nothing(subject):
    whole = studies.build("accuracy", batch=150).run(subject)
    cut = studies.build("accuracy", batch=64).run(subject)
    assert len(cut.records["row"]) == 150
    for key in ("row", "label", "prediction", "rank"):
        np.testing.assert_array_equal(cut.records[key], whole.records[key])
    np.testing.assert_allclose(cut.records["nll"], whole.records["nll"], atol=1e-5)
    assert cut.summary["top1"] == whole.summary["top1"]


def test_examples_limits_the_images(subject):
    finding = studies.build("accuracy", batch=32, examples=50).run(subject)
    np.testing.assert_array_equal(finding.records["row"], np.arange(50))


def test_summary_by_hand(subject):
    finding = studies.build("accuracy").run(subject)
    logits = np.asarray(subject.classifier(jnp.asarray(subject.test.images)))
    right = logits.argmax(1) == subject.test.labels
    assert finding.summary["top1"]["value"] == right.mean()
    for index, name in enumerate(subject.class_names):
        of_class = subject.test.labels == index
        assert finding.summary["by_class"][name]["value"] == right[of_class].mean()
    assert "top5" not in finding.summary  # Three classes: always right.
    assert 0.6 < right.mean() < 0.99


def test_a_subset_without_all_classes_is_told(subject):
    one = subject.test.labels == 1
    stream = dataclasses.replace(
        subject.test, images=subject.test.images[one], labels=subject.test.labels[one], rows=subject.test.rows[one]
    )
    finding = studies.build("accuracy").run(dataclasses.replace(subject, test=stream))
    assert any("1 of 3 classes" in caveat for caveat in finding.summary["caveats"])


def not_finite(variables, images):
    return linear(variables, images) / 0.0


def probabilities(variables, images):
    return jnp.ones((images.shape[0], 3)) / 3.0 + 0.0 * linear(variables, jnp.nan_to_num(images))


@pytest.mark.parametrize(("apply", "words"), [(not_finite, "not finite on row 0"), (probabilities, "hand over logits")])
def test_a_model_that_would_give_wrong_numbers_is_refused(apply, words):
    subject = make_subject()
    broken = dataclasses.replace(subject, classifier=classifier.wrap(apply, subject.classifier.variables))
    for name in ("accuracy", "calibration", "attack_curve"):
        with pytest.raises(errors.UserError, match=words):
            studies.build(name).run(broken)


def test_labels_out_of_range_are_told(subject):
    stream = dataclasses.replace(subject.test, labels=subject.test.labels + 1)
    with pytest.raises(errors.UserError, match="labels range from 1 to 3 but the model gives 3"):
        studies.build("accuracy").run(dataclasses.replace(subject, test=stream))
