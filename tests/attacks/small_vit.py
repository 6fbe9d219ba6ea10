"""A small Vision Transformer trained in seconds on stripes, for the tests of attacks that need something to attack."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_vit import classifier, losses, models

SIDE, CLASSES, PATCH = 16, 4, 4


def images(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy coloured stripes in one of four directions, which is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    y, x = np.mgrid[:SIDE, :SIDE]
    angle = (np.pi * labels / CLASSES)[:, None, None] + rng.normal(0, 0.08, (count, 1, 1))
    wave = np.sin(1.1 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
    colour = rng.uniform(0.04, 0.1, (count, 1, 1, 3))
    drawn = 0.5 + colour * wave[..., None] + rng.normal(0, 0.05, (count, SIDE, SIDE, 3))
    return np.clip(drawn, 0, 1).astype(np.float32), labels.astype(np.int32)


@functools.cache
def model(seed: int = 0) -> classifier.Classifier:
    """Right on nearly all images that it has not seen."""
    module = models.build("vit", num_classes=CLASSES, width=32, depth=2, heads=2, mlp_width=64, patch=PATCH)
    spec = classifier.ImageSpec((SIDE, SIDE))
    made = classifier.Classifier(models.init(module, spec, jax.random.key(seed)), module, spec)
    pixels, labels = images(seed + 1, 2048)
    optimizer = optax.adam(2e-3)

    def step(carry, rows):
        params, moments = carry

        def loss(params):
            return losses.cross_entropy(
                made.with_params(params)(jnp.asarray(pixels)[rows]), jnp.asarray(labels)[rows]
            ).mean()

        moves, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, moves), moments), None

    rows = np.random.default_rng(seed).integers(0, len(labels), (150, 64))
    (params, _), _ = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows))(
        (made.params, optimizer.init(made.params)), rows
    )
    return made.with_params(params)
