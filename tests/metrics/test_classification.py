"""Scores against closed forms and against scikit-learn."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from robust_vit import errors, losses
from robust_vit.metrics import classification


@pytest.fixture(scope="module")
def scored():
    generator = np.random.default_rng(0)
    return generator.normal(0, 3, (200, 7)).astype(np.float32), generator.integers(0, 7, 200)


def test_rank_is_the_place_in_the_sorted_logits(scored):
    logits, labels = scored
    order = np.argsort(-logits, axis=1)
    np.testing.assert_array_equal(classification.rank(logits, labels), np.argmax(order == labels[:, None], axis=1))


def test_rank_breaks_ties_as_argmax_does():
    constant = np.zeros((5, 5), np.float32)
    np.testing.assert_array_equal(classification.rank(constant, np.arange(5)), np.arange(5))
    broken = np.full((2, 5), np.nan)
    np.testing.assert_array_equal(classification.rank(broken, np.array([0, 3])), [4, 4])


def test_likelihood_brier_and_confidence_against_the_definitions(scored):
    logits, labels = scored
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    one_hot = np.eye(7)[labels]
    nll = classification.negative_log_likelihood(logits, labels)
    np.testing.assert_allclose(nll, -np.log((probabilities * one_hot).sum(1)), rtol=1e-12)
    np.testing.assert_allclose(
        classification.brier(logits, labels), ((probabilities - one_hot) ** 2).sum(1), atol=1e-13
    )
    np.testing.assert_allclose(classification.confidence(logits), probabilities.max(1), rtol=1e-12)
    halved = scipy.special.softmax(logits.astype(np.float64) / 2, axis=1).max(1)
    np.testing.assert_allclose(classification.confidence(logits, temperature=2.0), halved, rtol=1e-12)


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0.0]])
    assert classification.negative_log_likelihood(logits, np.array([1]))[0] == 2e4
    np.testing.assert_allclose(classification.brier(logits, np.array([1])), [2.0])


def test_host_and_device_agree(scored):
    logits, labels = scored
    np.testing.assert_allclose(
        classification.negative_log_likelihood(logits, labels), losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)),
        atol=2e-6,
    )  # fmt: skip
    np.testing.assert_allclose(
        classification.margin(logits, labels), losses.margin(jnp.asarray(logits), jnp.asarray(labels)), atol=1e-6
    )


def test_labels_out_of_range_are_told(scored):
    logits, labels = scored
    with pytest.raises(errors.UserError, match="labels range from 1 to 7 but the model gives 7"):
        classification.rank(logits, np.where(labels == 0, 1, labels + 1).clip(1, 7))
