"""One row for each registered attack: what it is, and the settings with which the shared tests of properties run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """An attack in the shared tests.

    Attributes:
      kind: `bounded` (takes epsilon) or `minimal` (seeks the nearest success).
      norms: that it knows.
      exact: those in which, with `options`, it meets the closed form of affine models in the box: a bounded one breaks at
        1.01 times the exact distance and not at 0.99; a minimal one ends within 2 % of it.
      goals: that it knows.
      options: settings for small models; few passes.
      sharp: settings for the closed forms, on top of `options`.
      restarts: whether it has the option `restarts`.
      classes: of the affine models without a target. Of more than two only an attack that tries each class in turn, or follows
        the nearest boundary, meets the closed form.
    """

    kind: str
    norms: tuple[str, ...]
    exact: tuple[str, ...]
    goals: tuple[str, ...] = ("untargeted", "targeted")
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sharp: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    restarts: bool = False
    classes: tuple[int, ...] = (2,)


ROWS = {
    "fgsm": Row("bounded", ("linf", "l2"), exact=("linf",)),
    "pgd": Row(
        "bounded",
        ("linf", "l2"),
        exact=("linf", "l2"),
        options={"steps": 5},
        sharp={"steps": 30, "relative_step": 0.25},
        restarts=True,
    ),
    "patch_fool": Row(
        "bounded",
        ("linf", "l2"),
        exact=("linf",),
        options={"patch": 3, "select": "saliency", "layers": (), "steps": 8, "learning_rate": 0.1},
        sharp={"steps": 15},
    ),
    "stickers": Row(
        "bounded",
        ("linf", "l2"),
        exact=("linf",),
        options={"steps": 8, "learning_rate": 0.1, "stop_on_success": True},
        sharp={"steps": 15},
    ),
}
