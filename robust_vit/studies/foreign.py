"""A subject made of a model that this library did not define, and a look at what could be wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from robust_vit import classifier as classifiers
from robust_vit import data, errors
from robust_vit.attacks import inputs
from robust_vit.studies import study


def subject(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    variables: Any = None,
    class_names: Iterable[str] | None = None,
    threat: str | None = None,
    name: str = "model",
    batch: int = 128,
    train: tuple[Any, Any] | None = None,
    validation: tuple[Any, Any] | None = None,
    preprocess: tuple[str, ...] = (),
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> study.Subject:
    """A `Subject` of a foreign model, after a look at everything that makes numbers silently wrong. Three forward passes.

    Arguments and errors are those of `robust_vit.evaluate.report_card`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == "report":
        raise errors.UserError(f"run name {name!r}: use letters, digits, '_', '.' and '-', and not 'report'.")
    class_names = tuple(class_names) if class_names else None
    judged = _as_classifier(model, variables)
    source = _source(images, labels, class_names, "the images")
    test = data.EvaluationStream(source, batch=min(batch, len(source)), preprocess=preprocess)
    num_classes = _check_model(judged, test.batch(0))
    names = _class_names(class_names, source, num_classes)
    _check_labels(source, num_classes, "the labels")
    held_out = training = None
    if validation is not None:
        held_out = _source(*validation, class_names, "the validation images")
        _check_labels(held_out, num_classes, "the validation labels")
        held_out = data.EvaluationStream(held_out, batch=min(batch, len(held_out)), preprocess=preprocess)
    if train is not None:
        training = _source(*train, class_names, "the training images")
        _check_labels(training, num_classes, "the training labels")
        training = data.TrainingStream(training, batch=min(batch, len(training)), preprocess=preprocess, seed=seed)
    return study.Subject(
        classifier=judged,
        test=test,
        validation=held_out,
        train=training,
        num_classes=num_classes,
        class_names=names,
        name=name,
        image_source=source.name,
        threat=threat,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        seed=seed,
    )


def _as_classifier(model: Any, variables: Any) -> classifiers.Classifier | classifiers.Wrapped:
    if isinstance(model, classifiers.Classifier | classifiers.Wrapped):
        if variables is not None:
            raise errors.UserError("variables were given beside a classifier that holds its own: leave them out.")
        return model
    if hasattr(model, "apply") and hasattr(model, "init"):
        raise errors.UserError(
            f"{type(model).__name__} is a Linen module: give a function (variables, images) -> logits that calls its "
            "apply, and its variables as variables=."
        )
    if not callable(model):
        raise errors.UserError(f"the model is a {type(model).__name__}: expected a function images -> logits.")
    return classifiers.wrap(model, variables)


def _source(images: Any, labels: Any, class_names: tuple[str, ...] | None, what: str) -> Any:
    if isinstance(images, str | os.PathLike) or hasattr(images, "fingerprint"):
        if labels is not None:
            raise errors.UserError(f"labels were given beside {what}, which bring their own: leave the labels out.")
        return images if hasattr(images, "fingerprint") else data.from_folder(images, class_names=class_names)
    if labels is None:
        raise errors.UserError(f"{what} came without labels: give one class index an image.")
    images, labels = np.asarray(images), np.asarray(labels)
    if labels.ndim == 2 and len(labels) == len(images):
        raise errors.UserError(f"the labels of {what} are rows of {labels.shape[1]} numbers: give their argmax.")
    if np.issubdtype(images.dtype, np.floating) and images.size:
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            remedy = "divide by 255" if low >= 0 and high <= 255 else "undo the normalisation: it belongs in the model"
            raise errors.UserError(f"{what} lie in [{low:.3g}, {high:.3g}]: expected pixels in [0, 1]; {remedy}.")
    return data.from_arrays(images, labels, class_names=class_names, name="given images")


def _check_labels(source: Any, num_classes: int, what: str) -> None:
    if source.num_classes > num_classes:
        raise errors.UserError(
            f"{what} are of {source.num_classes} classes and the model gives {num_classes} logits: expected labels from 0 to "
            f"{num_classes - 1}."
        )
    if source.num_classes < num_classes and hasattr(source, "root"):
        # A folder of some classes would silently number them anew.
        raise errors.UserError(
            f"{what} are of {source.num_classes} class folders and the model gives {num_classes} logits: give class_names= "
            "with the folder of every logit, in order."
        )


def _class_names(given: tuple[str, ...] | None, source: Any, num_classes: int) -> tuple[str, ...]:
    if given is not None and len(given) != num_classes:
        raise errors.UserError(f"{len(given)} class names for {num_classes} logits: give one for each.")
    names = given or source.class_names
    return names if len(names) == num_classes else tuple(str(index) for index in range(num_classes))


def _check_model(judged: classifiers.Classifier | classifiers.Wrapped, batch: Mapping[str, Any]) -> int:
    """The number of classes; a `UserError` for what no study could be right about."""
    images = np.asarray(batch["image"])[np.asarray(batch["mask"], bool)]
    try:
        return inputs.check_model(judged, images)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise errors.UserError(
            "the model is no JAX function (it turns its images into NumPy or Python numbers): write it with jax.numpy, "
            "for attacks differentiate it."
        ) from error
    except (TypeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise errors.UserError(f"the model fails on images of shape {images.shape}: {first}") from error
