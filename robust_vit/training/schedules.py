"""Learning rate schedules by name, as functions of the step."""

from __future__ import annotations

from collections.abc import Callable

import optax

from robust_vit import errors

SCHEDULES = ("cosine", "linear", "step", "constant")


def build(
    name: str,
    *,
    peak: float,
    steps: int,
    warmup: int = 0,
    final: float = 0.0,
    boundaries: tuple[float, ...] = (0.3, 0.6, 0.9),
    factor: float = 0.1,
) -> Callable:
    """A schedule `step -> learning rate`: linear warm-up from 0 to `peak`, then the named decay to the last step.

    Args:
      name: one of `SCHEDULES`.
      peak: the largest learning rate.
      steps: length of training in steps, the warm-up included.
      warmup: steps of warm-up.
      final: the learning rate at the end, as a share of `peak` (cosine and linear).
      boundaries: where `step` multiplies by `factor`, as shares of `steps`.
      factor: the multiplier of `step`.
    """
    if not 0 <= warmup < max(steps, 1):
        raise errors.UserError(
            f"a warm-up of {warmup} steps does not fit a training of {steps}: shorten optimizer.warmup_epochs."
        )
    decay = max(steps - warmup, 1)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, decay, alpha=final)
    elif name == "linear":
        after = optax.linear_schedule(peak, peak * final, decay)
    elif name == "step":
        after = optax.piecewise_constant_schedule(
            peak, {max(int(share * steps) - warmup, 1): factor for share in boundaries}
        )
    elif name == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise errors.unknown("schedule", name, SCHEDULES)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
