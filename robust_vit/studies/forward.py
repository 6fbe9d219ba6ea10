"""The forward pass that studies share: fixed shape, one trace for all runs of equal module, checked outputs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import attacks, errors, mesh, programs
from robust_vit.metrics import calibration
from robust_vit.studies import study

_temperatures: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@jax.jit
def _logits(classifier: Any, images: jax.Array) -> jax.Array:
    return classifier(images).astype(jnp.float32)


def logits(subject: study.Subject, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Float32 logits of the real examples of a batch, and the batch without its padding.

    Raises:
      UserError: where a logit is not finite, or where the model gives probabilities: either would make wrong numbers.
    """
    mask = np.asarray(batch["mask"], bool)
    values = mesh.fetch(_logits(subject.classifier, subject.put(batch["image"])))
    real = {name: np.asarray(value)[mask] for name, value in batch.items() if name != "mask"}
    if values.ndim != 2:
        raise errors.UserError(f"the model gives outputs of shape {values.shape}: expected logits [batch, classes].")
    values = values[mask]
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        raise errors.UserError(
            f"the model gives a logit that is not finite on row {int(real['row'][broken][0])}: look at its weights "
            "and its normalisation; studies of such a model would give wrong numbers."
        )
    if values.shape[1] > 1 and values.min() >= 0.0 and np.allclose(values.sum(axis=1), 1.0, atol=1e-5):
        raise errors.UserError(
            "the model gives probabilities (non-negative rows that sum to 1): hand over logits, without the softmax."
        )
    labels = real["label"]
    if len(labels) and not (labels.min() >= 0 and labels.max() < values.shape[1]):
        raise errors.UserError(
            f"labels range from {labels.min()} to {labels.max()} but the model gives {values.shape[1]} logits: "
            "labels are class indices from 0; check the data or the model's number of classes."
        )
    return values, real


def examples(subject: study.Subject, batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images, labels and the attack keys of a batch on the subject's devices, padding included.

    Padding repeats the first real row rather than whatever the stream pads with, so that an attack sees real pixels.
    """
    mask = np.asarray(batch["mask"], bool)
    chosen = np.where(mask, np.arange(len(mask)), np.flatnonzero(mask)[0])
    rows = np.asarray(batch["row"])[chosen].astype(np.uint32)
    placed = subject.put((batch["image"][chosen], np.asarray(batch["label"])[chosen].astype(np.int32), rows))
    return *placed[:2], attacks.example_keys(subject.seed, placed[2])


def training_examples(stream: Any, start: int, count: int) -> dict[str, np.ndarray]:
    """Examples `start` to `start + count` of an endless stream, whatever its own batch size is."""
    size = stream.batch_size
    batches = [stream.batch(step) for step in range(start // size, (start + count - 1) // size + 1)]
    offset = start % size
    return {
        name: np.concatenate([np.asarray(batch[name]) for batch in batches])[offset : offset + count]
        for name in ("image", "label", "row")
    }


def not_differentiable(subject: study.Subject) -> str | None:
    """Why JAX cannot differentiate the model in its pixels; None where it can. From shapes alone."""
    try:
        jax.eval_shape(jax.grad(lambda x, model: model(x).sum()), images(subject, 1), subject.classifier)
    except errors.UserError:
        raise
    except Exception as error:
        return f"the model cannot be differentiated by JAX ({str(error).splitlines()[0][:120]})"
    return None


def images(subject: study.Subject, batch: int) -> jax.ShapeDtypeStruct:
    """The shape of a batch of the subject's images, from at most one of them."""
    shape = getattr(subject.test, "image_shape", None) or np.shape(subject.test.with_batch(1).batch(0)["image"])[1:]
    return subject.shape((batch, *shape), jnp.float32)


def program(subject: study.Subject, batch: int, *, times: int) -> programs.Program:
    """The program of `logits` on batches of this size, for planning; the subject's arrays may be shapes."""
    return programs.Program("forward", _logits, (subject.classifier, images(subject, batch)), times=times)


def class_names(subject: study.Subject) -> np.ndarray:
    """One name a class, as an array of text; the index where the data set names none."""
    names = subject.class_names or tuple(str(index) for index in range(subject.num_classes))
    return np.asarray([str(name) for name in names])


def temperature(subject: study.Subject, *, batch: int, limit: int | None) -> calibration.Temperature | None:
    """The temperature fitted on the subject's validation images, or None where it has none.

    Computed once a subject and settings in a process, and the same again in the next: one forward pass an image.
    """
    if subject.validation is None:
        return None
    known = _temperatures.setdefault(subject, {})
    if (batch, limit) not in known:
        stream = subject.validation.with_batch(batch, limit=limit)
        parts = [logits(subject, stream.batch(index)) for index in range(len(stream))]
        values = np.concatenate([part for part, _ in parts])
        labels = np.concatenate([real["label"] for _, real in parts])
        known[batch, limit] = calibration.fit_temperature(values, labels)
    return known[batch, limit]
