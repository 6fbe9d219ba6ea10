"""Adversarial images on disk, judged again as they were stored: what rounding to 8 bits leaves of an attack."""

from __future__ import annotations

import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from robust_vit import classifier, errors, files
from robust_vit.attacks import arguments, evaluation, norms, runner, skeleton

FORMS = ("float", "uint8", "png")
_IMAGES, _SUMMARY = "examples.npz", "summary.json"
_DRAW = 0xFFFFFFFD  # The number of the draw that judges a stochastic model here.


@dataclasses.dataclass(frozen=True)
class Stored:
    """What `save` wrote, one row an image.

    Attributes:
      images: canonical pixels as they are read back.
      row: the id of the example.
      label: true class, or for a targeted attack the class to reach.
      success: the stored image reaches the goal.
      prediction: the class that the model gives to it.
      distance: of the stored image from the clean one.
      warnings: what a reader must know, in sentences; empty where storing changed nothing that matters.
    """

    images: Float[np.ndarray, "examples height width channels"]
    row: Int[np.ndarray, " examples"]
    label: Int[np.ndarray, " examples"]
    success: Bool[np.ndarray, " examples"]
    prediction: Int[np.ndarray, " examples"]
    distance: Float[np.ndarray, " examples"]
    warnings: tuple[str, ...]


def quantise(images: np.ndarray) -> np.ndarray:
    """Canonical pixels as uint8, each to the nearest of the 256 levels."""
    return np.round(255.0 * np.clip(np.asarray(images, np.float64), 0.0, 1.0)).astype(np.uint8)


def save(
    directory: pathlib.Path | str,
    found: runner.RunResult,
    clean: Float[np.ndarray, "examples height width channels"],
    model: skeleton.Model,
    *,
    form: str = "float",
    norm: str | norms.Norm = "linf",
    goal: str | skeleton.Goal = "untargeted",
    seed: int = 0,
    batch: int = 64,
) -> Stored:
    """Writes adversarial images, reads them back and asks the model again. One forward pass an image.

    `examples.npz` holds row, label, success, prediction, distance and, unless each has a file of its own, the images;
    `summary.json` the counts and the warnings. A success that rounding undoes is none any more, and a perturbation below half a
    level, 0.5/255, vanishes: both are warnings.

    Args:
      directory: to write into; made where it is missing.
      found: what `robust_vit.attacks.run(..., keep_images=True)` returned.
      clean: the clean images, in the order of `found`.
      model: canonical pixels to logits; its float32 twin judges.
      form: `float` (float32, as they are), `uint8` (8 bits in one file), or `png` (one file an image, named by its row).
      norm: of the distance.
      goal: of the attack.
      seed: of the draws of a stochastic model.
      batch: images a forward pass.

    Raises:
      errors.UserError: results without images, clean images of another shape, an unknown form.
    """
    if form not in FORMS:
        raise errors.unknown("form of stored images", form, FORMS)
    if found.images is None:
        raise errors.UserError("the result has no images: run the attack with keep_images=True.")
    clean = np.asarray(clean, np.float32)
    if clean.shape != found.images.shape:
        raise errors.UserError(
            f"the clean images are {clean.shape} and the adversarial ones {found.images.shape}: give them in the same order."
        )
    arguments.counts(batch=batch)
    norm, goal = norms.find(norm), arguments.find("goal", goal, skeleton.GOALS)
    directory = pathlib.Path(directory)
    records = {"row": found.row, "label": found.label}
    if form == "png":
        for row, image in zip(found.row, quantise(found.images), strict=True):
            files.write_bytes(_png(directory, row), _encode(image))
    else:
        records["images"] = quantise(found.images) if form == "uint8" else np.asarray(found.images, np.float32)
    files.write_npz(directory / _IMAGES, records)
    stored = load(directory)["images"]
    prediction = _predict(model, stored, found.row, seed, batch)
    success = np.asarray(goal.achieved(prediction, found.label))
    distance = np.asarray(norm.measure(jnp.asarray(stored - clean)))
    warnings = _warnings(found, clean, stored, success)
    files.write_npz(
        directory / _IMAGES, {**records, "success": success, "prediction": prediction, "distance": distance}
    )
    counts = {"form": form, "examples": len(stored), "success": int(success.sum()), "before": int(found.success.sum())}
    files.write_json(directory / _SUMMARY, {**counts, "norm": norm.name, "goal": goal.name, "warnings": warnings})
    return Stored(stored, found.row, found.label, success, prediction, distance, warnings)


def load(directory: pathlib.Path | str) -> dict[str, np.ndarray]:
    """What `save` wrote, by name; `images` in canonical pixels, float32, whatever they are stored as."""
    directory = pathlib.Path(directory)
    if not (directory / _IMAGES).exists():
        raise errors.UserError(f"{directory} holds no adversarial images: there is no {_IMAGES}.")
    records = files.read_npz(directory / _IMAGES)
    if "images" not in records:
        records["images"] = np.stack([_decode(_png(directory, row)) for row in records["row"]])
    if records["images"].dtype == np.uint8:
        records["images"] = (records["images"] / 255.0).astype(np.float32)
    return records


def _warnings(found: runner.RunResult, clean: np.ndarray, stored: np.ndarray, success: np.ndarray) -> tuple[str, ...]:
    axes = (1, 2, 3)
    largest = np.abs(found.images - clean).max(axis=axes)
    # Clean images that are not of 8 bits move by themselves when they are rounded.
    vanished = (largest > 0) & (np.abs(stored - quantise(clean) / 255.0).max(axis=axes) < 1e-6)
    lost = np.asarray(found.success) & ~success
    warnings = []
    if vanished.any():
        warnings.append(
            f"{int(vanished.sum())} of {int((largest > 0).sum())} perturbations vanish in 8 bits: the largest change of a pixel "
            f"is {largest[vanished].max() * 255:.3g}/255, and below 0.5/255 rounding takes it back. Store them as float."
        )
    if lost.any():
        warnings.append(
            f"{int(lost.sum())} of {int(np.sum(found.success))} successes are none as they are stored: the model gives another "
            "class to the image that is read back."
        )
    return tuple(warnings)


def _predict(model: skeleton.Model, images: np.ndarray, rows: np.ndarray, seed: int, batch: int) -> np.ndarray:
    predictions = []
    for start in range(0, len(images), batch):
        chosen = np.minimum(np.arange(start, start + batch), len(images) - 1)
        keys = runner.example_keys(seed, np.asarray(rows)[chosen].astype(np.uint32))
        predictions.append(np.asarray(_classes(classifier.in_float32(model), keys, jnp.asarray(images[chosen]))))
    return np.concatenate(predictions)[: len(images)]


@jax.jit
def _classes(model: skeleton.Model, keys: jax.Array, images: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return jnp.argmax(evaluation.logits(model, images, keys, _DRAW), axis=-1).astype(jnp.int32)


def _png(directory: pathlib.Path, row: int) -> pathlib.Path:
    return directory / f"row_{int(row):08d}.png"


def _encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _decode(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
