"""Initial values of kernels and tables.

Each is drawn as one flat vector: XLA on CPU takes four times as long to compile the bits of a 4-D draw (measured on ResNet-8).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

_POSITION_DEVIATION = 0.02


def glorot(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform of variance 2 / (fan in + fan out) (Glorot & Bengio 2010)."""
    fan_in, fan_out = _fans(shape)
    return _uniform(key, shape, dtype, 2.0 / (fan_in + fan_out))


def square_projections(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """`glorot` of each of several square projections side by side in one kernel `[width, count * width]`."""
    return _uniform(key, shape, dtype, 1.0 / shape[0])


def lecun(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform of variance 1 / fan in."""
    return _uniform(key, shape, dtype, 1.0 / _fans(shape)[0])


def he(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal of variance 2 / fan out (He et al. 2015, arXiv 1502.01852)."""
    return _normal(key, shape, dtype, (2.0 / _fans(shape)[1]) ** 0.5)


def position(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal of deviation 0.02, for learned positions (Dosovitskiy et al. 2021)."""
    return _normal(key, shape, dtype, _POSITION_DEVIATION)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    receptive = math.prod(shape[:-2])
    return receptive * shape[-2], receptive * shape[-1]


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any, variance: float) -> jax.Array:
    limit = (3.0 * variance) ** 0.5
    return jax.random.uniform(key, (math.prod(shape),), dtype, -limit, limit).reshape(shape)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    return deviation * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
