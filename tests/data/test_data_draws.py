"""The vectorised Philox against NumPy's, and what the draws may depend on."""

from __future__ import annotations

import numpy as np
import pytest

from robust_vit.data import draws


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_philox_equals_numpy(seed):
    generator = np.random.default_rng(seed)
    key = generator.integers(0, 2**64, 2, dtype=np.uint64)
    counter = generator.integers(0, 2**64, (4, 50), dtype=np.uint64)
    counter[0, :2] = 1, 2**64 - 1  # NumPy counts up before it draws, so start at 1.
    ours = draws.philox(counter, key[:, None])
    for column in range(counter.shape[1]):
        before = counter[:, column].copy()
        before[0] -= np.uint64(1)
        np.testing.assert_array_equal(ours[:, column], np.random.Philox(key=key, counter=before).random_raw(4))


def test_a_rows_draws_do_not_depend_on_its_neighbours():
    rows = np.asarray([5, 900, 3, 5])
    together = draws.words(rows, seed=3, purpose="crop", epochs=np.asarray([0, 1, 2, 0]), count=7)
    assert together.shape == (4, 7)
    np.testing.assert_array_equal(together[0], together[3])
    for i, (row, epoch) in enumerate([(5, 0), (900, 1), (3, 2)]):
        alone = draws.words(np.asarray([row]), seed=3, purpose="crop", epochs=epoch, count=7)
        np.testing.assert_array_equal(together[i], alone[0])


@pytest.mark.parametrize("other", [{"seed": 4}, {"purpose": "flip"}, {"epochs": 1}])
def test_each_of_seed_purpose_epoch_changes_every_draw(other):
    rows = np.arange(500)
    base = {"seed": 3, "purpose": "crop", "epochs": 0, "count": 5}
    first, second = draws.words(rows, **base), draws.words(rows, **{**base, **other})
    assert len(np.unique(np.concatenate([first, second]))) == 2 * first.size


def test_uniforms_are_uniform():
    values = draws.uniforms(np.arange(40_000), seed=0, purpose="test", count=2)
    assert values.min() >= 0
    assert values.max() < 1
    # Standard error of the mean .0014, of the correlation .005; four of each.
    np.testing.assert_allclose(values.mean(0), 0.5, atol=0.006)
    np.testing.assert_allclose(values.var(0), 1 / 12, atol=0.003)
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.02


def test_an_order_is_a_permutation_and_a_subset_keeps_it():
    rows = np.arange(100)
    order = draws.permutation(rows, seed=0, epoch=4)
    assert sorted(order) == list(range(100))
    assert not np.array_equal(order, draws.permutation(rows, seed=0, epoch=5))
    subset = rows[rows % 3 == 0]
    np.testing.assert_array_equal(
        subset[draws.permutation(subset, seed=0, epoch=4)], [row for row in rows[order] if row % 3 == 0]
    )


def test_bits_are_numpys_stream_of_the_row():
    first = draws.bits(seed=1, purpose="noise", row=7, count=16)
    np.testing.assert_array_equal(first, draws.bits(seed=1, purpose="noise", row=7, count=32)[:16])
    assert not np.intersect1d(first, draws.bits(seed=1, purpose="noise", row=8, count=16)).size
