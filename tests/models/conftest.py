"""Weights for tests of models, without compiling an initialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _random_variables(module, shape, seed=0):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    draw = np.random.default_rng(seed)

    def leaf(path, like):
        values = draw.standard_normal(like.shape) * (0.3 if like.ndim < 2 else 1 / np.sqrt(np.prod(like.shape[:-1])))
        positive = path[-1].key.startswith(("scale", "var", "attention_scale", "mlp_scale"))
        return jnp.asarray(1.0 + 0.3 * np.tanh(values) if positive else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="session")
def random_variables():
    """`random_variables(module, image_shape, seed=0)`: no zeros, as a fresh ViT's head, which hides all."""
    return _random_variables
