"""Calibration errors against closed forms, oracles and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.special

from robust_vit import errors
from robust_vit.metrics import calibration, classification


def simulate(seed, examples, *, shift=0.0, low=0.3):
    generator = np.random.default_rng(seed)
    confidences = generator.uniform(low, 1.0, examples)
    return confidences, generator.random(examples) < np.clip(confidences + shift, 0, 1)


def test_bins_are_open_below_and_closed_above():
    confidences = np.array([0.0, 0.1, 0.1000001, 0.3, 0.7, 0.70001, 1.0])
    diagram = calibration.reliability(confidences, np.ones(7, bool), bins=10)
    np.testing.assert_array_equal(diagram.counts, [2, 1, 1, 0, 0, 0, 1, 1, 0, 1])


def test_a_diagram_by_hand():
    confidences = np.array([0.55, 0.59, 0.95, 0.97, 0.99])
    correct = np.array([True, False, True, True, False])
    diagram = calibration.reliability(confidences, correct)
    np.testing.assert_allclose(diagram.accuracy[[5, 9]], [1 / 2, 2 / 3])
    np.testing.assert_allclose(diagram.confidence[[5, 9]], [0.57, 0.97])
    assert np.isnan(diagram.accuracy[0])
    expected = 2 / 5 * 0.07 + 3 / 5 * (0.97 - 2 / 3)
    np.testing.assert_allclose(calibration.expected_error(confidences, correct), expected)
    np.testing.assert_allclose(calibration.signed_error(confidences, correct), -expected)


@pytest.mark.parametrize(("bins", "binning"), itertools.product((1, 2, 7, 10, 15, 100), ("width", "mass")))
def test_the_signed_error_is_accuracy_minus_mean_confidence_for_any_binning(bins, binning):
    confidences, correct = simulate(0, 500, shift=-0.07)
    expected = correct.mean() - confidences.mean()
    kim = calibration.signed_error(confidences, correct, bins=bins, binning=binning)
    np.testing.assert_allclose(kim, expected, atol=1e-12)
    park = calibration.signed_error(confidences, correct, bins=bins, binning=binning, sign="park")
    np.testing.assert_allclose(park, -expected, atol=1e-12)
    assert calibration.expected_error(confidences, correct, bins=bins, binning=binning) >= abs(expected) - 1e-12


def test_debiased_squared_error_is_unbiased():
    # Two confidences, known accuracies: the squared error is 0.5 (0.05² + 0.10²).
    generator = np.random.default_rng(0)
    confidences = np.repeat([0.65, 0.85], 40)
    truth = np.repeat([0.70, 0.75], 40)
    draws = [calibration.debiased_squared_error(confidences, generator.random(80) < truth) for _ in range(3000)]
    plug_in = [
        np.sum(d.weights * d.gaps**2)
        for d in (calibration.reliability(confidences, generator.random(80) < truth) for _ in range(500))
    ]
    error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - 0.5 * (0.05**2 + 0.10**2)) < 4 * error
    assert np.mean(plug_in) > 0.5 * (0.05**2 + 0.10**2) + 0.003


def test_debiasing_takes_most_of_the_bias_off():
    # Calibrated model, true error 0. Measured over these 200 sets of 300 images: plug-in 0.0497, debiased 0.0281.
    sets = [simulate(seed, 300) for seed in range(200)]
    plug_in = np.mean([calibration.expected_error(*pair) for pair in sets])
    debiased = np.mean([calibration.debiased_error(*pair) for pair in sets])
    assert plug_in > 0.04
    assert debiased < 0.6 * plug_in
    # And it leaves a real error alone: shift 0.1 has a true error of 0.1 less what is clipped at 1.
    confidences, correct = simulate(1, 200_000, shift=-0.1, low=0.5)
    np.testing.assert_allclose(calibration.debiased_error(confidences, correct), 0.1, atol=0.004)


def test_error_interval_covers_where_a_bootstrap_does_not():
    # Calibrated and shifted models, 300 images; measured coverage over 100 sets: 1.00 and 0.93.
    for shift, truth in ((0.0, 0.0), (-0.08, 0.08)):
        found = [calibration.error_interval(*simulate(seed, 300, shift=shift), draws=200) for seed in range(100)]
        assert np.mean([interval.low - 1e-3 <= truth <= interval.high + 1e-3 for interval in found]) >= 0.9
        assert all(interval.low <= interval.value <= interval.high for interval in found)
        assert abs(np.median([interval.value for interval in found]) - truth) < 0.02


def test_error_interval_of_a_perfect_model_is_zero():
    found = calibration.error_interval(np.ones(50), np.ones(50, bool))
    assert (found.low, found.value, found.high) == (0.0, 0.0, 0.0)


def test_consistency_test_is_level_under_calibration_and_finds_miscalibration():
    p_values = [calibration.consistency(*simulate(seed, 200), draws=100).p_value for seed in range(100)]
    assert 0.01 <= np.mean(np.asarray(p_values) <= 0.1) <= 0.2
    assert calibration.consistency(*simulate(1, 500, shift=-0.15), draws=200).p_value == 1 / 201


def test_adaptive_bins_hold_equal_shares_and_ignore_the_order():
    generator = np.random.default_rng(0)
    confidences = np.round(generator.beta(5, 1, 1000), 2)  # Many ties.
    correct = generator.random(1000) < confidences
    diagram = calibration.reliability(generator.random(1000), correct, binning="mass")
    assert np.ptp(diagram.counts) <= 2  # Quantiles in floating point miss by one row at each edge.
    shuffled = generator.permutation(1000)
    for function in (calibration.expected_error, calibration.debiased_error):
        value = function(confidences, correct, binning="mass")
        np.testing.assert_allclose(
            function(confidences[shuffled], correct[shuffled], binning="mass"), value, rtol=1e-12
        )


def test_smooth_error_of_a_constant_confidence_is_the_gap():
    for confidence, right in ((0.8, 60), (0.5, 90), (1.0, 70)):
        correct = np.arange(100) < right
        found = calibration.smooth_error(np.full(100, confidence), correct)
        np.testing.assert_allclose(found, abs(right / 100 - confidence), atol=1e-9)


def test_smooth_error_against_direct_quadrature_with_reflected_kernels():
    confidences, correct = simulate(4, 80, shift=-0.1)
    found = calibration.smooth_error(confidences, correct)
    grid = (np.arange(20_000) + 0.5) / 20_000
    total = np.zeros_like(grid)
    for confidence, residual in zip(confidences, correct - confidences, strict=True):
        for image in range(-3, 4):
            for center in (2 * image + confidence, 2 * image - confidence):
                total += residual * np.exp(-0.5 * ((grid - center) / found) ** 2)
    direct = np.abs(total).mean() / (found * math.sqrt(2 * math.pi) * len(confidences))
    # It is the fixed point: at width `found` the smoothed error is `found`. Measured difference 3e-11.
    np.testing.assert_allclose(direct, found, atol=1e-9)


def test_smooth_error_is_zero_for_a_model_without_residuals():
    assert calibration.smooth_error(np.ones(50), np.ones(50, bool)) < 1e-6


def test_temperature_undoes_a_known_scale():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (20_000, 5))
    labels = np.array([generator.choice(5, p=p) for p in scipy.special.softmax(logits[:4000], axis=1)])
    logits = logits[:4000]
    fitted = calibration.fit_temperature(logits, labels)
    assert abs(fitted.value - 1.0) < 0.06
    scaled = calibration.fit_temperature(3.0 * logits, labels)
    np.testing.assert_allclose(scaled.value, 3.0 * fitted.value, rtol=1e-8)
    assert not scaled.at_bound
    assert scaled.after < scaled.before
    for factor in (0.98, 1.02):
        other = classification.negative_log_likelihood(logits / (fitted.value * factor), labels).mean()
        assert other > fitted.after


def test_temperature_that_the_data_do_not_determine_is_flagged():
    logits = 10.0 * np.eye(4)
    assert calibration.fit_temperature(logits, np.arange(4)).at_bound
    assert calibration.fit_temperature(logits, np.arange(4)).value == pytest.approx(1e-2)
    assert calibration.fit_temperature(logits, (np.arange(4) + 1) % 4).value == pytest.approx(1e2)


def test_what_is_no_probability_is_told():
    with pytest.raises(errors.UserError, match=r"range from .* to 7.*softmax"):
        calibration.expected_error(np.array([0.5, 7.0]), np.array([True, False]))
    with pytest.raises(errors.UserError, match="did you mean 'width'"):
        calibration.reliability(np.ones(2), np.ones(2, bool), binning="widht")
    with pytest.raises(errors.UserError, match="sign"):
        calibration.signed_error(np.ones(2), np.ones(2, bool), sign="guo")
