"""The host layer of attacks: many examples over a fixed number of slots, each refilled when its example is finished."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PURPOSE = 0x61747461  # "atta": keeps the draws of attacks apart from those of everything else under the same seed.


def example_keys(seed: int, rows: jax.Array) -> jax.Array:
    """One typed key an example from (seed, "attack", row): the same for a row in any batch, order or process."""
    base = jax.random.fold_in(jax.random.key(seed), PURPOSE)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, jnp.asarray(rows, jnp.uint32))
