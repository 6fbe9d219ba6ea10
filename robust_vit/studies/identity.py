"""What identifies a result: the study, its settings, the model, the data. Where they are the same, nothing is computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from robust_vit import mesh
from robust_vit.studies import study as study_lib


def asked(study: study_lib.Study, subject: study_lib.Subject) -> dict[str, Any]:
    """What identifies a result: the same answer means that nothing needs to be computed again."""
    rivals = {name: _model_fingerprint(model, subject) for name, model in subject.rivals.items()}
    steps = [int(step) for step in study.looks_back(subject)]
    mixing = {name: float(value) for name, value in study.mixes(subject).items()}
    return {
        **({"history": steps} if steps else {}),
        **({"mixing": mixing} if mixing else {}),
        **({"rivals": rivals} if study.reads_rivals else {}),
        "study": study.name,
        "settings": study.settings(),
        "model": _model_fingerprint(subject.classifier, subject),
        "data": {
            "name": subject.image_source,
            "fingerprint": _data_fingerprint(subject.test),
            "examples": int(subject.test.num_examples),
        },
        "validation data": _data_fingerprint(subject.validation),
        "training data": _data_fingerprint(subject.train),
        "classes": int(subject.num_classes),
        "threat": subject.threat,
        "seed": int(subject.seed),
        "weight_decay": float(subject.weight_decay),
        "label_smoothing": float(subject.label_smoothing),
    }


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The parts of `wanted` in which a stored result differs, in words; empty where it is the same."""
    return " and ".join(key.replace("_", " ") for key in wanted if stored.get(key) != wanted[key])


def _data_fingerprint(stream: Any) -> str | None:
    if stream is None:
        return None
    fingerprint = getattr(getattr(stream, "source", None), "fingerprint", None)
    if fingerprint is not None:
        return str(fingerprint)
    batch = stream.batch(0)
    return _digest([batch["image"], batch["label"]])


def _model_fingerprint(model: Any, subject: study_lib.Subject) -> str:
    """A short hash of the weights; of the first logits where the weights are out of sight."""
    leaves = jax.tree.leaves(model.variables)
    if not leaves:
        # Three digits: a foreign function may differ by rounding from machine to machine.
        logits = mesh.fetch(model(subject.put(subject.test.batch(0)["image"])))
        leaves = [np.round(np.asarray(logits, np.float32), 3) + 0.0]
    return _digest(leaves)


def _digest(arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for array in map(mesh.fetch, arrays):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
