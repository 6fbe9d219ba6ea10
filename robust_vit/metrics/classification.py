"""How right a classifier is, example by example: pure NumPy in float64, reduced by the caller."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from robust_vit import errors


def log_softmax(logits: Float[np.ndarray, "examples classes"]) -> Float[np.ndarray, "examples classes"]:
    """Log probabilities in nats, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def rank(
    logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]
) -> Int[np.ndarray, " examples"]:
    """How many classes come before the true one: 0 is right, below k is right among the top k.

    Among equal logits the lower index comes first, as in argmax: a constant classifier is right on class 0 alone.
    An example with a logit that is no number ranks last.
    """
    logits, labels = _checked(logits, labels)
    true = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    before = (logits > true) | ((logits == true) & earlier)
    return np.where(np.isnan(logits).any(axis=1), logits.shape[1] - 1, before.sum(axis=1)).astype(np.int32)


def negative_log_likelihood(
    logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]
) -> Float[np.ndarray, " examples"]:
    """Cross-entropy of the true class in nats."""
    logits, labels = _checked(logits, labels)
    return -np.take_along_axis(log_softmax(logits), labels[:, None], axis=1)[:, 0]


def brier(
    logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]
) -> Float[np.ndarray, " examples"]:
    """Squared distance of the probabilities from the one-hot label, summed over classes: in [0, 2] (Brier 1950)."""
    logits, labels = _checked(logits, labels)
    probabilities = np.exp(log_softmax(logits))
    np.put_along_axis(probabilities, labels[:, None], np.take_along_axis(probabilities, labels[:, None], 1) - 1.0, 1)
    return (probabilities**2).sum(axis=-1)


def confidence(
    logits: Float[np.ndarray, "examples classes"], *, temperature: float = 1.0
) -> Float[np.ndarray, " examples"]:
    """The largest probability of softmax(logits / temperature)."""
    return np.exp(log_softmax(np.asarray(logits, np.float64) / temperature).max(axis=-1))


def margin(
    logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]
) -> Float[np.ndarray, " examples"]:
    """Largest other logit minus the true one: positive where misclassified (`losses.margin` on the host)."""
    logits, labels = _checked(logits, labels)
    true = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    others = logits.astype(np.float64)
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    return others.max(axis=1) - true


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise errors.UserError(
            f"logits have shape {logits.shape} and labels {labels.shape}: expected [examples, classes] and [examples]."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise errors.UserError(
            f"labels range from {labels.min()} to {labels.max()} but the model gives {logits.shape[1]} logits: "
            "labels are class indices from 0; check the data or the model's number of classes."
        )
    return logits, labels.astype(np.int64)
