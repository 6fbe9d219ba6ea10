"""Streamed means are the means of everything, whatever the batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit.metrics import classification, streaming


def test_batches_of_any_size_merge_to_the_mean_of_all():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(70, 8)).astype(np.float32), generator.integers(0, 8, 70)
    compiled = jax.jit(streaming.classification)
    total = None
    for start in range(0, 70, 32):
        chosen = np.arange(start, start + 32)
        mask = chosen < 70
        rows = np.where(mask, chosen, 0)
        padded = np.where(mask[:, None], logits[rows], np.nan)
        part = compiled(jnp.asarray(padded), jnp.asarray(labels[rows]), jnp.asarray(mask))
        total = part if total is None else total.merge(part)
    means = total.means()
    rank = classification.rank(logits, labels)
    np.testing.assert_allclose(means["accuracy"], np.mean(rank < 1), rtol=1e-6)
    np.testing.assert_allclose(means["accuracy_top5"], np.mean(rank < 5), rtol=1e-6)
    nll = classification.negative_log_likelihood(logits, labels).mean()
    np.testing.assert_allclose(means["loss"], nll, rtol=1e-6)


def test_a_broken_model_is_not_always_right():
    means = streaming.classification(jnp.full((4, 3), jnp.nan), jnp.zeros(4, jnp.int32)).means()
    assert means["accuracy"] == 0.0
    assert np.isnan(means["loss"])


def test_ties_count_as_in_argmax():
    means = streaming.classification(jnp.zeros((3, 3)), jnp.arange(3)).means()
    np.testing.assert_allclose(means["accuracy"], 1 / 3, rtol=1e-6)


def test_smoothing_and_no_examples():
    logits, labels = jnp.asarray([[2.0, 0.0]]), jnp.asarray([0])
    plain = streaming.classification(logits, labels).means()["loss"]
    smooth = streaming.classification(logits, labels, smoothing=0.5).means()["loss"]
    np.testing.assert_allclose(smooth - plain, 0.25 * 2.0, rtol=1e-6)
    nothing = streaming.classification(logits, labels, jnp.asarray([False])).means()
    assert np.isnan(nothing["loss"])
