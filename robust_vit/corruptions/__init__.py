"""Corruptions draw a worse input: `corrupt(keys, images, severity)`, pure functions of canonical pixels.

`build(name, **options)` makes one. The severity is one scalar a call, 1 to 5, and may be traced: one compilation for all.
"""

from __future__ import annotations

from typing import Any

from robust_vit import registry
from robust_vit.corruptions import severities

CORRUPTIONS = {
    "gaussian_noise": "robust_vit.corruptions.noise:gaussian_noise",
}

SEVERITIES = severities.SEVERITIES


def build(name: str, **options: Any) -> Any:
    """The corruption of that name.

    Args:
      name: one of `CORRUPTIONS`.
      **options: keyword arguments of the function that it names; an unknown one is a `UserError` with the nearest known.
    """
    return registry.build("corruption", name, CORRUPTIONS, options)
