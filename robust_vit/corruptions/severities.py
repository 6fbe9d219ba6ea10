"""Severities: the five levels of the ImageNet-C benchmark (Hendrycks & Dietterich 2019, arXiv 1903.12261)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_vit import errors

SEVERITIES = (1, 2, 3, 4, 5)


def level(table: tuple[float, ...], severity: int | jax.Array) -> jax.Array:
    """The entry of a table of five for a severity from 1 to 5, which may be traced; a concrete one is checked."""
    if not isinstance(severity, jax.core.Tracer) and int(severity) not in SEVERITIES:
        raise errors.UserError(f"severity is {severity}: expected one of 1, 2, 3, 4, 5.")
    return jnp.asarray(table, jnp.float32)[jnp.asarray(severity, jnp.int32) - 1]
