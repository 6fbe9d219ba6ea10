"""The training step: accumulation, moving average, replicas, the guard against non-finite metrics, one trace."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_vit import trees
from robust_vit.training import optimizers, state, step


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Mean squared error of a linear model; counts its traces."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "draw")
    traces: ClassVar[list[Any]] = []

    def __call__(self, params, model_state, batch, key):
        self.traces.append(key)
        draw = jax.random.normal(key, ())
        loss = jnp.mean((batch["image"] @ params["kernel"] - batch["label"]) ** 2)
        return loss, (model_state, {"loss": loss, "draw": draw})


def _problem(seed=0):
    random = np.random.default_rng(seed)
    batch = {
        "image": jnp.asarray(random.normal(size=(8, 3)), jnp.float32),
        "label": jnp.asarray(random.normal(size=8), jnp.float32),
    }
    return {"params": {"kernel": jnp.asarray(random.normal(size=3), jnp.float32)}}, batch


def _fresh(variables, optimizer, average=False):
    return state.create(
        jax.tree.map(jnp.copy, variables),
        optimizer,
        metrics=(*LeastSquares.metrics, *step.STEP_METRICS),
        average=average,
    )


def test_one_step_is_one_step_of_gradient_descent():
    variables, batch = _problem()
    optimizer = optimizers.build("sgd", learning_rate=0.1, momentum=0.0)
    after = step.compile_step(step.build(LeastSquares(), optimizer))(
        _fresh(variables, optimizer), batch, jax.random.key(0)
    )
    kernel, images, labels = (
        np.asarray(x, np.float64) for x in (variables["params"]["kernel"], batch["image"], batch["label"])
    )
    gradient = 2.0 / 8 * images.T @ (images @ kernel - labels)
    np.testing.assert_allclose(after.params["kernel"], kernel - 0.1 * gradient, rtol=1e-5)
    assert int(after.step) == 1
    assert float(after.sums["gradient_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts):
    variables, batch = _problem()
    optimizer = optimizers.build("sgd", learning_rate=0.1)
    whole, cut = (
        step.compile_step(step.build(LeastSquares(), optimizer, accumulate=count))(
            _fresh(variables, optimizer), batch, jax.random.key(0)
        )
        for count in (1, parts)
    )
    # Measured: 1e-7 relative; only the order of the sum differs.
    np.testing.assert_allclose(cut.params["kernel"], whole.params["kernel"], rtol=1e-6)
    np.testing.assert_allclose(float(cut.sums["loss"]), float(whole.sums["loss"]), rtol=1e-6)


def test_the_moving_average_follows_its_recurrence():
    variables, batch = _problem()
    optimizer = optimizers.build("sgd", learning_rate=0.1, momentum=0.0)
    function = step.compile_step(step.build(LeastSquares(), optimizer, average_decay=0.3))
    current, expected = (
        _fresh(variables, optimizer, average=True),
        np.asarray(variables["params"]["kernel"], np.float64),
    )
    for count in range(5):
        current = function(current, batch, jax.random.key(0))
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * np.asarray(current.params["kernel"], np.float64)
    np.testing.assert_allclose(current.average["kernel"], expected, rtol=1e-5)
    assert state.variables(current)["params"] is current.average


def test_replicas_are_the_runs_that_each_seed_would_be_alone():
    optimizer = optimizers.build("adamw", learning_rate=0.1)
    problems = [_problem(seed)[0] for seed in range(3)]
    batch = _problem()[1]
    keys = jax.random.split(jax.random.key(1), 3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_fresh(variables, optimizer) for variables in problems])
    stacked = stacked._replace(step=jnp.int32(0))
    function = step.compile_step(step.build(LeastSquares(), optimizer), replicas=3)
    alone = step.compile_step(step.build(LeastSquares(), optimizer))
    together = function(stacked, batch, keys)
    for index, variables in enumerate(problems):
        single = alone(_fresh(variables, optimizer), batch, keys[index])
        np.testing.assert_allclose(state.replica(together.params, index)["kernel"], single.params["kernel"], rtol=1e-6)
    assert together.step.shape == ()


def test_the_first_bad_step_is_remembered_with_its_metric():
    variables, batch = _problem()
    optimizer = optimizers.build("sgd", learning_rate=0.1)
    function = step.compile_step(step.build(LeastSquares(), optimizer))
    current = function(_fresh(variables, optimizer), batch, jax.random.key(0))
    assert int(current.first_bad_step["loss"]) == state.NEVER
    poisoned = {**batch, "label": batch["label"].at[3].set(jnp.nan)}
    current = function(function(current, poisoned, jax.random.key(0)), batch, jax.random.key(0))
    assert int(current.first_bad_step["loss"]) == 2


def test_a_step_is_traced_once():
    variables, batch = _problem()
    optimizer = optimizers.build("sgd", learning_rate=optax.constant_schedule(0.1))
    function = step.compile_step(step.build(LeastSquares(), optimizer))
    current = function(_fresh(variables, optimizer), batch, jax.random.key(0))
    LeastSquares.traces.clear()
    for seed in range(3):
        current = function(current, batch, jax.random.key(seed))
    assert LeastSquares.traces == []


def test_each_step_has_draws_of_its_own_that_depend_on_key_and_step_alone():
    variables, batch = _problem()
    optimizer = optimizers.build("sgd", learning_rate=0.1)
    function = step.compile_step(step.build(LeastSquares(), optimizer))

    def draw(count, seed):
        fresh = _fresh(variables, optimizer)._replace(step=jnp.int32(count))
        return float(function(fresh, batch, jax.random.key(seed)).sums["draw"])

    draws = [draw(0, 0), draw(1, 0), draw(2, 0), draw(0, 1)]
    assert len(set(draws)) == 4
    assert draw(1, 0) == draws[1]


def test_sums_start_anew_after_a_log_line():
    variables, batch = _problem()
    optimizer = optimizers.build("sgd", learning_rate=0.1)
    current = step.compile_step(step.build(LeastSquares(), optimizer))(
        _fresh(variables, optimizer), batch, jax.random.key(0)
    )
    assert float(trees.norm(current.sums)) > 0
    assert float(trees.norm(state.reset_sums(current).sums)) == 0
