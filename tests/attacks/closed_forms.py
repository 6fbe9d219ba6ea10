"""Geometry in [0, 1], exact for the norms L1, L2 and L-infinity: distances to an affine boundary, nearest points of balls."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from robust_vit import classifier


def distance(norm: str, weights: np.ndarray, gap: float, image: np.ndarray) -> float:
    """The least norm of `d` with `weights @ d >= gap` and `image + d` in [0, 1]; infinite where there is none.

    L1 is a fractional knapsack (the pixels in the order of their weight, each as far as the box lets it); the others are a
    root in one dimension.
    """
    weights, image = weights.astype(np.float64).ravel(), image.astype(np.float64).ravel()
    if gap <= 0:
        return 0.0
    room = np.where(weights > 0, 1.0 - image, image)
    size = np.abs(weights)
    if size @ room < gap:
        return np.inf
    if norm == "l1":
        order = np.argsort(-size)
        gained = np.cumsum(size[order] * room[order])
        last = int(np.searchsorted(gained, gap))
        before = gained[last - 1] if last else 0.0
        return float(room[order][:last].sum() + (gap - before) / size[order][last])
    move = {"linf": lambda t: np.minimum(t, room), "l2": lambda t: np.minimum(t * size, room)}[norm]
    end = 1.0 if norm == "linf" else float((room[size > 0] / size[size > 0]).max())
    root = (
        scipy.optimize.brentq(lambda t: size @ move(t) - gap, 0.0, end, xtol=1e-14) if size @ move(end) > gap else end
    )
    return float(root if norm == "linf" else np.linalg.norm(move(root)))


def nearest(norm: str, image: np.ndarray, clean: np.ndarray, radius: float) -> np.ndarray:
    """The point of the ball around `clean` and of [0, 1] that is nearest to `image`.

    All differences shrink by one rule, whose strength is a root in one dimension, as far as the box lets them.
    """
    difference = (image - clean).ravel()
    room = np.where(difference > 0, 1.0 - clean.ravel(), clean.ravel())
    size = np.abs(difference)
    shrink, measure = {
        "linf": (lambda t: np.minimum(size, max(size.max() - t, 0.0)), np.max),
        "l2": (lambda t: size / (1 + t), np.linalg.norm),
        "l1": (lambda t: np.maximum(size - t, 0.0), np.sum),
    }[norm]

    def excess(strength):
        return measure(np.minimum(shrink(strength), room)) - radius

    strength = 0.0
    if excess(0.0) > 1e-12:
        strength = scipy.optimize.brentq(excess, 0.0, 1e9, xtol=1e-15, rtol=1e-15, maxiter=500)
    return clean + (np.sign(difference) * np.minimum(shrink(strength), room)).reshape(clean.shape)


def affine(variables, images):
    """Logits of an affine model: the name of the function is part of compiled programs' keys."""
    return images.reshape(images.shape[0], -1) @ variables["w"] + variables["b"][None]


def model(seed: int, shape: tuple[int, ...], classes: int, dtype=np.float32) -> classifier.Wrapped:
    """A random affine model whose classes meet around the middle of the box."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(int(np.prod(shape)), classes))
    weights -= weights.mean(axis=1, keepdims=True)
    bias = -0.5 * weights.sum(axis=0)
    return classifier.wrap(affine, {"w": jnp.asarray(weights, dtype), "b": jnp.asarray(bias, dtype)})


def distances(norm: str, affine_model: classifier.Wrapped, images: np.ndarray, labels, targets=None) -> np.ndarray:
    """The exact distance of each image to the nearest class that is not its label, or to the half-space of its target.

    With targets the model must have two classes: of more, the target has to beat all others at once.
    """
    weights = np.asarray(affine_model.variables["w"], np.float64)
    logits = images.reshape(len(images), -1).astype(np.float64) @ weights + np.asarray(
        affine_model.variables["b"], np.float64
    )
    assert targets is None or weights.shape[1] == 2
    found = []
    for row, label in enumerate(np.asarray(labels)):
        others = [k for k in range(weights.shape[1]) if k != label] if targets is None else [targets[row]]
        source = label if targets is None else 1 - targets[row]
        found.append(
            min(
                distance(norm, weights[:, k] - weights[:, source], logits[row, source] - logits[row, k], images[row])
                for k in others
            )
        )
    return np.asarray(found)
