"""Random vectors: moments, independence, and draws that know nothing of their neighbours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from robust_vit.curvature import probes

LIKE = {"a": jnp.zeros((300, 100)), "b": {"c": jnp.zeros((300, 100)), "d": jnp.zeros(())}}


def _flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def test_entries_are_uniform_with_mean_zero_and_variance_one():
    entries = _flat(probes.draw(jax.random.key(0), LIKE))
    assert np.abs(entries).max() < np.sqrt(3) * (1 + 1e-6)
    assert scipy.stats.kstest(entries / np.sqrt(12) + 0.5, "uniform").pvalue > 0.01
    assert abs(entries.mean()) < 4 / np.sqrt(entries.size)
    assert abs(entries.var() - 1) < 4 * np.sqrt(0.8 / entries.size)


def test_entries_are_uncorrelated():
    """Between neighbours in every direction, leaves and keys: each correlation is of order one over the root of the size."""
    one, two = (probes.draw(jax.random.key(seed), LIKE) for seed in (0, 1))
    grid = np.asarray(one["a"], np.float64)
    pairs = {
        "columns": (grid[:, 1:], grid[:, :-1]),
        "rows": (grid[1:], grid[:-1]),
        "stride of a power of two": (grid.ravel()[256:], grid.ravel()[:-256]),
        "leaves": (grid, one["b"]["c"]),
        "keys": (grid, two["a"]),
        "squares": (grid[:, 1:] ** 2 - 1, grid[:, :-1] ** 2 - 1),
    }
    for name, (left, right) in pairs.items():
        left, right = np.ravel(left), np.ravel(right)
        assert abs(np.mean(left * right)) < 4.5 / np.sqrt(left.size), name


def test_low_bits_are_random_too():
    cells = np.round((_flat(probes.draw(jax.random.key(3), LIKE)) / np.sqrt(3) + 1) * 2**22 - 0.5).astype(np.int64)
    for bit in (1, 4, 22):
        ones = ((cells >> bit) & 1).sum()
        assert scipy.stats.binomtest(int(ones), cells.size).pvalue > 1e-3


def test_a_leaf_knows_its_path_and_key_alone():
    whole = probes.draw(jax.random.key(0), LIKE)
    alone = probes.draw(jax.random.key(0), {"b": {"c": LIKE["b"]["c"]}})
    np.testing.assert_array_equal(whole["b"]["c"], alone["b"]["c"])
    assert not np.array_equal(whole["a"], whole["b"]["c"])
    jitted = jax.jit(probes.draw)(jax.random.key(0), LIKE)
    jax.tree.map(np.testing.assert_array_equal, whole, jitted)


def test_float64_draws_the_same_numbers():
    narrow = probes.draw(jax.random.key(0), LIKE)
    with jax.enable_x64(True):
        wide = probes.draw(jax.random.key(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float64), LIKE))
        assert wide["a"].dtype == jnp.float64
    np.testing.assert_allclose(_flat(narrow), _flat(wide), rtol=3e-7)
