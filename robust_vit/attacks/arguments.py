"""What attacks check alike before they are built: sizes of balls, counts, names of ingredients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_vit import errors
from robust_vit.attacks import norms, threats


def ball(
    epsilon: float | jax.Array | None, norm: str | norms.Norm | None, threat: str | threats.ThreatModel | None
) -> tuple[Any, norms.Norm]:
    """The radius, as a number that compiles nothing anew, and the norm of a bounded attack.

    Args:
      epsilon: radius in pixel units [0, 1], one or an array of them.
      norm: its norm or the norm's name; the maximum norm where neither it nor `threat` is given.
      threat: a threat model or its name, in place of both.

    Raises:
      errors.UserError: both or neither are given, the radius is negative, not finite, or above 1 in the maximum norm.
    """
    if threat is not None:
        if epsilon is not None or norm is not None:
            raise errors.UserError(
                "an attack got a threat and also epsilon or norm: give the threat alone, or the others."
            )
        model = threats.threat(threat) if isinstance(threat, str) else threat
        epsilon, norm = model.epsilon, model.norm
    if epsilon is None:
        raise errors.UserError('an attack got no size: give epsilon=8/255, norm="linf", or threat="cifar10/linf-8".')
    if np.any(np.asarray(epsilon) < 0) or not np.all(np.isfinite(epsilon)):
        raise errors.UserError(f"epsilon is {epsilon}: expected a number from 0, in pixel units [0, 1] (8/255, not 8).")
    norm = norms.find("linf" if norm is None else norm)
    if norm is norms.LINF and np.any(np.asarray(epsilon) > 1):
        raise errors.UserError(
            f"epsilon is {epsilon}: pixels are in [0, 1], so the maximum norm ends at 1 (8/255, not 8)."
        )
    return number(epsilon), norm


def counts(*, least: int = 1, **values: int) -> None:
    """Refuses values that are no whole numbers from `least`, by name."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise errors.UserError(f"{name} is {value!r}: expected a whole number from {least}.")


def positive(**values: float | jax.Array) -> None:
    """Refuses values that are not finite and above zero, by name."""
    for name, value in values.items():
        if not np.all(np.isfinite(value)) or np.any(np.asarray(value) <= 0):
            raise errors.UserError(f"{name} is {value}: expected a positive number.")


def shares(**values: float | jax.Array) -> None:
    """Refuses values that are not between 0 and 1, both ends excluded, by name."""
    for name, value in values.items():
        if not (np.all(np.asarray(value) > 0) and np.all(np.asarray(value) < 1)):
            raise errors.UserError(f"{name} is {value}: expected a number between 0 and 1.")


def number(value: float | jax.Array) -> np.generic | jax.Array:
    """The value as a leaf of an attack: a NumPy scalar, since a Python float is weakly typed and so another program."""
    if isinstance(value, jax.Array):
        return value
    return np.asarray(value, jnp.result_type(float))[()]


def find(kind: str, value: Any, known: Mapping[str, Any]) -> Any:
    """What `known` holds under the name; anything but a name passes through."""
    if not isinstance(value, str):
        return value
    if value not in known:
        raise errors.unknown(kind, value, known)
    return known[value]
