"""A small smooth model with random weights, its images and predictions, and an attack on it one step at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import attacks, classifier
from robust_vit.attacks import skeleton

SHAPE = (3, 3, 2)
KEYS = attacks.example_keys(0, np.arange(6))
TRACES = []


def _bent(variables, images):
    TRACES.append(None)
    return jnp.tanh(images.reshape(images.shape[0], -1) @ variables["u"]) @ variables["w"]


def model(seed=0, classes=4, dtype=np.float32):
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    variables = {"u": 2 * rng.normal(size=(size, 16)) / np.sqrt(size), "w": rng.normal(size=(16, classes))}
    return classifier.wrap(_bent, jax.tree.map(lambda a: jnp.asarray(a, dtype), variables))


def images(seed=0, count=6, dtype=np.float32):
    return np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(dtype)


def predict(model, images):
    return np.array(model(jnp.asarray(images)).argmax(axis=-1), np.int32)


def walk(attack, model, keys, images, labels, steps):
    """The states after 0 to `steps` steps."""
    states = [attack.init(keys, jnp.asarray(images), jnp.asarray(labels))]
    for _ in range(steps):
        states.append(_advance(states[-1], 0, attack, model))
    return states


_advance = jax.jit(skeleton.advance)
