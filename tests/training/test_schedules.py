"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from robust_vit import errors
from robust_vit.training import schedules


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(name):
    schedule = schedules.build(name, peak=0.4, steps=100, warmup=10)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(0.2)
    assert float(schedule(10)) == pytest.approx(0.4)


def test_cosine_is_the_cosine_and_ends_at_its_share():
    schedule = schedules.build("cosine", peak=1.0, steps=110, warmup=10, final=0.1)
    for step in (10, 35, 60, 110):
        expected = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * (step - 10) / 100))
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)


def test_linear_and_constant():
    assert float(schedules.build("linear", peak=1.0, steps=100)(25)) == pytest.approx(0.75)
    assert float(schedules.build("constant", peak=0.3, steps=100)(99)) == pytest.approx(0.3)


def test_step_multiplies_at_its_shares_of_training_whatever_the_warm_up():
    schedule = schedules.build("step", peak=1.0, steps=100, warmup=10, boundaries=(0.5, 0.8), factor=0.1)
    assert [round(float(schedule(step)), 6) for step in (20, 49, 51, 79, 81)] == [1.0, 1.0, 0.1, 0.1, 0.01]


def test_bad_input():
    with pytest.raises(errors.UserError, match="did you mean 'cosine'"):
        schedules.build("cosin", peak=1.0, steps=10)
    with pytest.raises(errors.UserError, match="warm-up of 10 steps does not fit"):
        schedules.build("cosine", peak=1.0, steps=10, warmup=10)
