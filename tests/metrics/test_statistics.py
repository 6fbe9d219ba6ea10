"""Intervals cover, tests have their published p-values, and what is paired is paired."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from robust_vit import errors
from robust_vit.metrics import statistics


def test_clopper_pearson_closed_forms():
    none = statistics.proportion(0, 30)
    assert none.low == 0.0
    np.testing.assert_allclose(none.high, 1 - 0.025 ** (1 / 30), rtol=1e-12)
    every = statistics.proportion(30, 30)
    assert every.high == 1.0
    np.testing.assert_allclose(every.low, 0.025 ** (1 / 30), rtol=1e-12)
    assert (every.over, every.method) == ("images", "Clopper-Pearson")


def test_clopper_pearson_covers_for_every_p():
    trials = 20
    intervals = [statistics.proportion(k, trials) for k in range(trials + 1)]
    for p in np.linspace(0.01, 0.99, 99):
        inside = [interval.low <= p <= interval.high for interval in intervals]
        assert scipy.stats.binom.pmf(np.arange(trials + 1), trials, p)[inside].sum() >= 0.95


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_proportion_refuses_what_is_none(successes, trials):
    with pytest.raises(errors.UserError, match="trials"):
        statistics.proportion(successes, trials)


def test_mean_interval_has_the_width_of_theory_and_is_reproducible():
    values = np.random.default_rng(1).normal(2.0, 3.0, 500)
    found = statistics.mean(values, draws=4000)
    assert found == statistics.mean(values, draws=4000)
    assert found.value == values.mean()
    expected = 2 * 1.96 * values.std() / np.sqrt(500)
    assert abs((found.high - found.low) / expected - 1) < 0.05


def test_pairing_removes_what_two_models_share():
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 10, 400)
    first, second = shared + generator.normal(0, 0.1, 400), shared + 1.0 + generator.normal(0, 0.1, 400)
    found = statistics.paired_difference(first, second)
    assert abs(found.value - 1.0) < 0.02
    assert found.high - found.low < 0.04
    np.testing.assert_allclose(statistics.paired_difference(second, first).value, -found.value)


def test_bootstrap_resamples_rows_of_all_arrays_together():
    rows = np.arange(50.0)
    found = statistics.bootstrap(lambda a, b: float(np.abs(a - b).max()), rows, rows + 3.0, draws=50)
    assert (found.low, found.value, found.high) == (3.0, 3.0, 3.0)


def test_pivotal_interval_is_the_reflected_percentile_interval():
    values = np.random.default_rng(0).exponential(size=100)
    plain = statistics.bootstrap(np.mean, values)
    pivotal = statistics.bootstrap(np.mean, values, pivotal=True)
    np.testing.assert_allclose([pivotal.low, pivotal.high], [2 * plain.value - plain.high, 2 * plain.value - plain.low])


def test_hierarchical_bootstrap_knows_of_seeds_and_of_shared_images():
    generator = np.random.default_rng(3)
    image, seed_a, seed_b = generator.normal(0, 1, 300), generator.normal(0, 0.5, 8), generator.normal(0, 0.5, 8)
    first, second = seed_a[:, None] + image, 1.0 + seed_b[:, None] + image
    found = statistics.hierarchical_difference(first, second)
    assert found.over == "seeds and images"
    # The images cancel: only the spread over seeds is left, var(a) / 8 + var(b) / 8.
    expected = 2 * 1.96 * np.sqrt(seed_a.var() / 8 + seed_b.var() / 8)
    assert abs((found.high - found.low) / expected - 1) < 0.1
    alone = statistics.hierarchical_difference(first[:1], second[:1])
    assert alone.over == "images"
    assert alone.high - alone.low < 1e-9


def test_mcnemar_is_the_binomial_test_of_the_discordant():
    first = np.array([True] * 1 + [False] * 7 + [True] * 40)
    second = np.array([False] * 1 + [True] * 7 + [True] * 40)
    test = statistics.mcnemar(first, second)
    np.testing.assert_allclose(test.p_value, 2 * (1 + 8) / 2**8)
    assert test.statistic == 6
    assert statistics.mcnemar(second, first).statistic == -6
    assert statistics.mcnemar(first, first).p_value == 1.0


def test_sign_flip_counts_sign_patterns():
    # Of the eight sign patterns of (1, 1, 1), two have a mean as far from zero.
    test = statistics.sign_flip(np.zeros(3), np.ones(3), draws=20000)
    assert abs(test.p_value - 0.25) < 0.01


def test_swap_of_a_mean_agrees_with_sign_flip():
    generator = np.random.default_rng(5)
    first, second = generator.normal(0, 1, 60), generator.normal(0.1, 1, 60)
    swapped = statistics.swap(np.mean, [first], [second], draws=4000)
    flipped = statistics.sign_flip(first, second, draws=4000)
    np.testing.assert_allclose(swapped.statistic, flipped.statistic, rtol=1e-12)
    assert 0.1 < flipped.p_value < 0.6
    assert abs(swapped.p_value - flipped.p_value) < 0.03


def test_equivalence_is_two_one_sided_t_tests():
    generator = np.random.default_rng(2)
    first, second = generator.normal(0, 1, 80), generator.normal(0.05, 1, 80)
    difference = second - first
    sides = [
        scipy.stats.ttest_1samp(difference, -0.5, alternative="greater").pvalue,
        scipy.stats.ttest_1samp(difference, 0.5, alternative="less").pvalue,
    ]
    np.testing.assert_allclose(statistics.equivalence(first, second, margin=0.5).p_value, max(sides), rtol=1e-10)
    assert statistics.equivalence(first, first + 1.0, margin=0.5).p_value == 1.0
    assert statistics.equivalence(first, first, margin=0.5).p_value == 0.0


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        ((0.01, 0.04, 0.03), (0.03, 0.06, 0.06)),
        ((0.5, 0.9), (1.0, 1.0)),
        ((0.04, float("nan"), 0.01), (0.04, float("nan"), 0.02)),
        ((), ()),
    ],
)
def test_holm(given, adjusted):
    np.testing.assert_allclose(statistics.holm(given), adjusted)


def test_paired_values_must_be_paired():
    with pytest.raises(errors.UserError, match="same examples"):
        statistics.mcnemar(np.ones(3, bool), np.ones(4, bool))
