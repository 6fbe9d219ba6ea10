"""Baselines that detect adversarial images: each is fitted once, scores images, and is attacked together with its model."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_vit import errors, losses, registry
from robust_vit.attacks import arguments, features, inputs, skeleton
from robust_vit.metrics import ranking

DETECTORS = {
    "mahalanobis": "robust_vit.attacks.detectors:mahalanobis",
    "local_dimension": "robust_vit.attacks.detectors:local_dimension",
    "squeezing": "robust_vit.attacks.detectors:squeezing",
}


class Detector(flax.struct.PyTreeNode, kw_only=True):
    """The base of every detector: a frozen pytree with `scores`, higher where an image looks attacked.

    Attributes:
      model: that the detector looks through.
    """

    model: Any

    def scores(self, images: Float[Array, "batch height width channels"]) -> Float[Array, " batch"]:
        """One number an image; differentiable, one forward pass unless the subclass says otherwise."""
        raise TypeError(f"{type(self).__name__} does not define scores")


class Mahalanobis(Detector, kw_only=True):
    """Squared Mahalanobis distance of the features from the nearest class mean (Lee et al. 2018, arXiv 1807.03888).

    One layer, one covariance for all classes; without the paper's input preprocessing and its regression over layers.

    Attributes:
      means: of the classes that were fitted.
      whitening: `[width, width]`: maps differences to where the covariance is the identity.
      layer: of the features; static.
    """

    means: Float[Array, "classes width"]
    whitening: Float[Array, "width width"]
    layer: str = flax.struct.field(pytree_node=False, default="pre_logits")

    def scores(self, images: jax.Array) -> jax.Array:
        """The distance to the nearest mean. One forward pass."""
        seen = features.Layer(self.model, self.layer)(images)
        differences = (seen[:, None] - self.means[None]) @ self.whitening
        return jnp.min(jnp.sum(differences**2, axis=-1), axis=1)


class LocalDimension(Detector, kw_only=True):
    """Local intrinsic dimension of the features among those of clean images (Ma et al. 2018, arXiv 1801.02613, equation 4).

    The estimate by maximum likelihood from the distances of the nearest neighbours. One layer and a fixed set of clean images,
    where the paper has all layers, a mini-batch, and a regression fitted on attacked images.

    Attributes:
      bank: features of clean images.
      neighbours: how many of the nearest; static.
      layer: of the features; static.
    """

    bank: Float[Array, "clean width"]
    neighbours: int = flax.struct.field(pytree_node=False, default=20)
    layer: str = flax.struct.field(pytree_node=False, default="pre_logits")

    def scores(self, images: jax.Array) -> jax.Array:
        """The dimension. One forward pass."""
        seen = features.Layer(self.model, self.layer)(images)
        squares = jnp.sum((seen[:, None] - self.bank[None]) ** 2, axis=-1)
        nearest = -jax.lax.top_k(-squares, self.neighbours)[0]
        # The image itself may be in the bank: a distance of zero says nothing of the dimension.
        logs = 0.5 * jnp.log(jnp.maximum(nearest, 1e-12 * nearest[:, -1:] + 1e-30))
        return 1.0 / jnp.maximum(jnp.mean(logs[:, -1:] - logs[:, :-1], axis=1), 1e-6)


class Squeezing(Detector, kw_only=True):
    """How far the answer moves when the image is squeezed (Xu et al. 2018, arXiv 1704.01155): fewer bits, and a median filter.

    The largest L1 distance, in [0, 2], of the probabilities of the image and of each squeezed one. Rounding to fewer bits passes
    the gradient through as if it were not there, so that an adaptive attack has one (BPDA, Athalye et al. 2018, 1802.00420).

    Attributes:
      bits: of a pixel; static.
      window: side of the median filter, in pixels; static.
    """

    bits: int = flax.struct.field(pytree_node=False, default=5)
    window: int = flax.struct.field(pytree_node=False, default=2)

    def scores(self, images: jax.Array) -> jax.Array:
        """The distance. Three forward passes, as one widened batch."""
        wide = jnp.concatenate([images, round_bits(images, self.bits), median(images, self.window)])
        plain, *squeezed = jnp.split(jax.nn.softmax(self.model(wide).astype(jnp.float32)), 3)
        return jnp.max(jnp.stack([jnp.sum(jnp.abs(plain - other), axis=1) for other in squeezed]), axis=0)


def round_bits(images: Float[Array, "batch height width channels"], bits: int) -> jax.Array:
    """Pixels rounded to `2 ** bits` levels; the gradient passes through."""
    levels = 2.0**bits - 1.0
    return images + jax.lax.stop_gradient(jnp.round(images * levels) / levels - images)


def median(images: Float[Array, "batch height width channels"], window: int) -> jax.Array:
    """Each pixel as the median of a square window that starts at it, mirrored at the border (as `ndimage.median_filter` is)."""
    before = window // 2
    padded = jnp.pad(
        images, ((0, 0), (before, window - 1 - before), (before, window - 1 - before), (0, 0)), "symmetric"
    )
    height, width = images.shape[1:3]
    shifted = [padded[:, y : y + height, x : x + width] for y in range(window) for x in range(window)]
    # Of an even number the upper middle one, as SciPy takes it.
    return jnp.sort(jnp.stack(shifted), axis=0)[len(shifted) // 2]


def mahalanobis(
    model: Any,
    images: Float[np.ndarray, "images height width channels"],
    labels: Int[np.ndarray, " images"],
    *,
    layer: str = "pre_logits",
    ridge: float = 1e-3,
    batch: int = 128,
) -> Mahalanobis:
    """Class means and the covariance within classes of the features of clean training images. One forward pass an image.

    Args:
      model: with `features(images) -> (logits, features)`.
      images: canonical pixels.
      labels: true classes.
      layer: of the features.
      ridge: share of the mean variance added to each, where there are fewer images than features.
      batch: images a pass.
    """
    arguments.positive(ridge=ridge)
    if labels is None:
        raise errors.UserError("the detector is fitted by class: give labels, one class index an image.")
    labels = np.asarray(labels)
    seen = features.extract(features.Layer(model, layer), images, batch=batch)
    present = np.unique(labels)
    means = np.stack([seen[labels == label].mean(axis=0) for label in present])
    centred = seen - means[np.searchsorted(present, labels)]
    covariance = centred.T @ centred / len(centred)
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0.0) + ridge * max(float(values.mean()), 1e-30)
    whitening = vectors / np.sqrt(values)
    return Mahalanobis(
        model=model,
        means=jnp.asarray(means, jnp.float32),
        whitening=jnp.asarray(whitening, jnp.float32),
        layer=layer,
    )


def local_dimension(
    model: Any,
    images: Float[np.ndarray, "images height width channels"],
    labels: Int[np.ndarray, " images"] | None = None,
    *,
    layer: str = "pre_logits",
    neighbours: int = 20,
    batch: int = 128,
) -> LocalDimension:
    """Keeps the features of clean images, among which neighbours are looked for. One forward pass an image.

    Args:
      model: with `features(images) -> (logits, features)`.
      images: canonical pixels, more than `neighbours`.
      labels: not used: the dimension knows no classes.
      layer: of the features.
      neighbours: how many of the nearest.
      batch: images a pass.
    """
    del labels
    arguments.counts(neighbours=neighbours, least=2)
    if len(images) <= neighbours:
        raise errors.UserError(
            f"{len(images)} images for {neighbours} neighbours: give more images, or fewer neighbours."
        )
    bank = features.extract(features.Layer(model, layer), images, batch=batch)
    return LocalDimension(model=model, bank=jnp.asarray(bank, jnp.float32), neighbours=neighbours, layer=layer)


def squeezing(
    model: Any,
    images: Float[np.ndarray, "images height width channels"] | None = None,
    labels: Int[np.ndarray, " images"] | None = None,
    *,
    bits: int = 5,
    window: int = 2,
) -> Squeezing:
    """Nothing to fit: the images are not looked at.

    Args:
      model: canonical pixels to logits.
      images: not used.
      labels: not used.
      bits: of a pixel that is left.
      window: side of the median filter.
    """
    del images, labels
    arguments.counts(bits=bits, window=window)
    return Squeezing(model=model, bits=bits, window=window)


def fit(name: str, model: Any, images: Any, labels: Any = None, **options: Any) -> Detector:
    """The fitted detector of that name.

    Args:
      name: one of `DETECTORS`.
      model: canonical pixels to logits, with `features` where the detector reads them.
      images: clean images to fit on, canonical pixels; None where there is nothing to fit.
      labels: their classes, where the detector needs them.
      **options: keyword arguments of the function that it names; an unknown one is a `UserError` with the nearest known.

    Raises:
      errors.UserError: what `attacks.check_inputs` refuses in pixels, labels and model; what the detector refuses.
    """
    if images is not None:
        images = np.asarray(images, np.float32)
        inputs.check_values(model, images, np.zeros(len(images), np.int32) if labels is None else np.asarray(labels))
        inputs.check_once(model, images)
    fixed = {"model": model, "images": images, "labels": labels}
    return registry.build("detector", name, DETECTORS, options, fixed=fixed)


class Guarded(flax.struct.PyTreeNode, kw_only=True):
    """A model with its detector as one model of one more class, "attacked", for adaptive attacks.

    The last logit is the largest of the others plus `weight * (score - threshold)`: it wins where the detector raises the alarm.
    So an image that evades has another class than its label and is not taken for attacked (Carlini & Wagner 2017, arXiv
    1705.07263, make one class more in the same way). Attack it with the loss `evasion` and the goal `evade(classes)`.

    Attributes:
      model: canonical pixels to logits.
      detector: with `scores`.
      threshold: above which a score is an alarm.
      weight: of the score in the loss, in logits per unit of the score.
    """

    model: Any
    detector: Any
    threshold: Any
    weight: Any

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes_and_one"]:
        """Logits and the alarm. The passes of the model and of its detector."""
        logits = self.model(images)
        alarm = jnp.max(logits, axis=-1) + self.weight * (self.detector.scores(images) - self.threshold)
        return jnp.concatenate([logits, alarm[:, None]], axis=1)


def guard(
    detector: Detector, clean: Float[np.ndarray, " clean"], *, false_alarms: float = 0.05, weight: float | None = None
) -> Guarded:
    """The detector and its model as one, with the threshold that so many clean images exceed.

    Args:
      detector: fitted.
      clean: its scores of clean images that it was not fitted on.
      false_alarms: share of these that exceed the threshold at most.
      weight: of the score in the attack's loss; by default one over the interquartile range of the clean scores.
    """
    limit = ranking.threshold(np.asarray(clean), false_alarms=false_alarms)
    if weight is None:
        spread = float(np.subtract(*np.percentile(np.asarray(clean, np.float64), (75, 25))))
        weight = 1.0 / spread if spread > 0 else 1.0
    arguments.positive(weight=weight)
    return Guarded(
        model=detector.model, detector=detector, threshold=arguments.number(limit), weight=arguments.number(weight)
    )


def evasion(outputs: Float[Array, "batch classes_and_one"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """The margin by which another class beats the label, less the excess of the alarm: positive where the image evades both."""
    margin, alarm = _read(outputs, labels)
    return margin - jax.nn.relu(alarm)


def stealth(outputs: Float[Array, "batch classes_and_one"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """As `evasion` until another class beats the label, and then how far the score lies below the threshold.

    The margin counts for nothing more once it is won, so that an attack goes on to the least score (selective gradients,
    Bryniarski et al. 2022, arXiv 2106.15023). Positive just where the image evades both.
    """
    margin, alarm = _read(outputs, labels)
    return jnp.minimum(margin, 0.0) - jnp.where(margin > 0, alarm, jax.nn.relu(alarm))


def _read(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The margin of the logits, and by how much the alarm exceeds them."""
    logits = outputs[:, :-1].astype(jnp.promote_types(outputs.dtype, jnp.float32))
    return losses.margin(logits, labels), outputs[:, -1] - jnp.max(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class Evades:
    """Neither the label nor the class "attacked"."""

    alarm: int

    def __call__(self, predictions: Int[Array, " batch"], labels: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        return (predictions != labels) & (predictions != self.alarm)


def evade(classes: int) -> skeleton.Goal:
    """The goal of an attack on a `Guarded` model of that many classes: another class, and no alarm."""
    arguments.counts(classes=classes, least=2)
    return skeleton.Goal("evade", 1.0, Evades(classes))
