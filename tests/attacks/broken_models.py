"""Models that fool attacks, each in one way, and a healthy one beside them: two dozen pixels and five classes.

A defect is a number among the variables, so all of them share one compilation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import classifier

SHAPE = (3, 3, 2)
CLASSES = 5
EPSILON = 0.03
_GENERATOR = np.random.default_rng(0)

DEFECTS = {
    "constant": "always the first class: no gradient, and nothing to find",
    "quantised": "pixels rounded to 256 levels: a zero gradient that hides a vulnerable model",
    "exploding": "a square root at zero: gradients that are not finite, logits that are",
    "saturated": "logits so large that softmax is 0 and 1 in float32: the margin has a gradient, the cross-entropy has none",
    "stochastic": "noise on the logits that is not declared",
    "probabilities": "the softmax is inside the model",
    "shattered": "a ripple of high frequency: the loss jumps between neighbours",
    "half_masked": "no gradient in half of the pixels: a white box uses half of its ball, a black box all of it",
    "unbreakable": "the first class wins everywhere, with a gradient everywhere",
    "periodic": "classes alternate along the gradient: a long step jumps over what a short one meets",
    "batch_normed": "logits less their mean over the batch: a model in training mode",
    "not_finite": "NaN where the first pixel is dark",
    "deaf": "no gradient of a loss that reads so many of the logits",
    "choked": "a gradient that is not finite of a loss that reads so many of the logits",
}
# How many of the logits a loss reads: the size of the defects that only this loss meets.
READS = {"margin": 2, "dlr": 3, "targeted_dlr": 4, "cross_entropy": CLASSES}


def _noise(logits):
    # The same on every logit of an image: the answers differ, the predictions never do, so that no other guard has a part.
    return np.broadcast_to(_GENERATOR.normal(size=(len(logits), 1)), logits.shape).astype(np.float32)


@jax.custom_vjp
def _lose(logits, deaf, choked):
    """The logits; backwards, nothing of a loss that reads `deaf` of them, and NaN of one that reads `choked`."""
    del deaf, choked
    return logits


def _keep(logits, deaf, choked):
    return logits, (deaf, choked)


def _drop(kept, cotangents):
    read = jnp.sum(cotangents != 0, axis=1, keepdims=True)
    lost = jnp.where(read == kept[0], 0.0, jnp.where(read == kept[1], jnp.nan, 1.0))
    return lost * cotangents, jnp.zeros_like(kept[0]), jnp.zeros_like(kept[1])


_lose.defvjp(_keep, _drop)


def _columns(*columns):
    """Logits of these columns, and of classes that are never the largest."""
    first = jnp.stack(columns, axis=1)
    rest = jnp.min(first, axis=1, keepdims=True) - 4.0 * jnp.arange(1.0, CLASSES - len(columns) + 1)[None]
    return jnp.concatenate([first, rest], axis=1)


def apply(variables, images):
    """A small network, smooth and deterministic where no defect is on. `traces` counts how often it was traced."""
    apply.traces += 1
    on = {name: variables[name] > 0 for name in DEFECTS}
    stop = jax.lax.stop_gradient
    x = jnp.where(on["quantised"], stop(jnp.round(images * 255.0) / 255.0), images)
    hidden = on["half_masked"] & (jnp.arange(SHAPE[1])[None, None, :, None] < 2)
    x = jnp.where(hidden, stop(x), x)
    logits = jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ variables["u"]) @ variables["w"]
    first = x[:, 0, 0, :1]
    logits = logits + jnp.where(
        on["exploding"], jnp.sqrt(jnp.where(on["exploding"], jnp.maximum(first - 2.0, 0.0), 1.0)), 0.0
    )
    total = jnp.sum(x, axis=(1, 2, 3))
    ripple = jnp.pad(jnp.stack([jnp.sin(700.0 * total), -jnp.sin(700.0 * total)], axis=1), ((0, 0), (0, CLASSES - 2)))
    logits = logits + 1.5 * variables["shattered"] * ripple
    wave = jnp.cos(
        variables["periodic"] * jnp.sum((x - 0.5) * jnp.sign(variables["u"][:, 0]).reshape(1, *SHAPE), axis=(1, 2, 3))
    )
    logits = jnp.where(on["periodic"], _columns(wave, -wave, 0.0 * wave - 3.0), logits)
    mean = jnp.mean(x, axis=(1, 2, 3))
    logits = jnp.where(on["unbreakable"], _columns(1.0 + jax.nn.softplus(mean), 0.0 * mean, -mean), logits)
    logits = jnp.where(on["constant"], 1.0 - jnp.arange(CLASSES)[None], logits)
    logits = logits * jnp.where(on["saturated"], 1e4, 1.0)
    logits = jnp.where(on["not_finite"], logits * jnp.log(jnp.where(on["not_finite"], first - 0.4, 1.0)), logits)
    logits = logits - variables["batch_normed"] * jnp.mean(logits, axis=0, keepdims=True)
    noise = jax.pure_callback(_noise, jax.ShapeDtypeStruct(logits.shape, logits.dtype), stop(logits))
    logits = logits + variables["stochastic"] * stop(noise)
    logits = jnp.where(on["probabilities"], jax.nn.softmax(logits), logits)
    return _lose(logits, variables["deaf"], variables["choked"])


apply.traces = 0


def build(**defects: float) -> classifier.Wrapped:
    """The model with these defects, each of a size; without any it is healthy."""
    assert set(defects) <= set(DEFECTS)
    rng = np.random.default_rng(3)
    size = int(np.prod(SHAPE))
    weights = {"u": 2 * rng.normal(size=(size, 16)) / np.sqrt(size), "w": rng.normal(size=(16, CLASSES))}
    numbers = {name: np.asarray(defects.get(name, 0.0)) for name in DEFECTS}
    return classifier.wrap(apply, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {**weights, **numbers}))


@jax.jit
def _logits(model, images):
    return model(images)


@functools.cache
def images(count: int = 48) -> np.ndarray:
    """Images in the middle of the box of which the healthy model is sure."""
    drawn = np.random.default_rng(5).uniform(0.35, 0.65, size=(4 * count, *SHAPE)).astype(np.float32)
    top = np.sort(np.asarray(_logits(build(), drawn)), axis=1)
    return drawn[np.argsort(top[:, -2] - top[:, -1], kind="stable")[:count]]


def labels(model, given: np.ndarray) -> np.ndarray:
    """The classes that the model gives to the images."""
    return np.asarray(_logits(model, given)).argmax(axis=1).astype(np.int32)
