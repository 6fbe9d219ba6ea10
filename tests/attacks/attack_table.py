"""One row for each registered attack: what it is, and the settings with which the shared tests of properties run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """An attack in the shared tests.

    Attributes:
      kind: `bounded` (takes epsilon), `minimal` (seeks the nearest success) or `spatial` (moves pixels: has no ball).
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
    "fgsm": Row("bounded", ("linf", "l2", "l1"), exact=("linf",)),
    "bim": Row("bounded", ("linf",), exact=("linf",), options={"steps": 5}),
    "mi_fgsm": Row("bounded", ("linf",), exact=("linf",), options={"steps": 5}),
    "pgd": Row(
        "bounded",
        ("linf", "l2", "l1"),
        exact=("linf", "l2", "l1"),
        options={"steps": 5},
        sharp={"steps": 40, "relative_step": 0.5, "schedule": "cosine"},
        restarts=True,
    ),
    "apgd": Row("bounded", ("linf", "l2", "l1"), exact=(), options={"steps": 6}, restarts=True),
    # In L1 its steps are equal whatever the gradient, which the projection takes back where two or three values are all that
    # matters; see test_attack_apgd.
    "apgd_ce": Row(
        "bounded",
        ("linf", "l2", "l1"),
        exact=("linf", "l2"),
        options={"steps": 10},
        sharp={"steps": 50},
        restarts=True,
    ),
    "apgd_dlr": Row(
        "bounded", ("linf", "l2", "l1"), exact=(), goals=("untargeted",), options={"steps": 10}, restarts=True
    ),
    "apgd_t": Row(
        "bounded",
        ("linf",),
        exact=("linf",),
        goals=("untargeted",),
        options={"steps": 6, "targets": 3},
        sharp={"steps": 50},
        restarts=True,
        classes=(4,),
    ),
    "deep_fool": Row(
        "minimal",
        ("l2", "linf"),
        exact=("l2", "linf"),
        goals=("untargeted",),
        options={"candidates": 4},
        sharp={"overshoot": 0.005},
    ),
    "ddn": Row("minimal", ("l2",), exact=("l2",), options={"steps": 30}, sharp={"steps": 300}),
    "fmn": Row(
        "minimal",
        ("linf", "l2", "l1"),
        exact=("linf", "l2", "l1"),
        options={"steps": 30},
        sharp={"steps": 300},
        restarts=True,
    ),
    "carlini_wagner": Row(
        "minimal",
        ("l2",),
        exact=("l2",),
        options={"steps": 40, "rounds": 4, "start_weight": 0.1, "learning_rate": 0.05},
        sharp={"steps": 300, "rounds": 6},
    ),
    "fab": Row(
        "minimal",
        ("linf", "l2", "l1"),
        exact=("linf", "l2", "l1"),
        options={"steps": 6, "candidates": 4},
        sharp={"steps": 30},
        restarts=True,
        classes=(4,),
    ),
    "fab_t": Row(
        "minimal",
        ("linf", "l2", "l1"),
        exact=("linf", "l2", "l1"),
        goals=("untargeted",),
        options={"steps": 6, "targets": 3},
        sharp={"steps": 30},
        restarts=True,
        classes=(4,),
    ),
    "square": Row(
        "bounded", ("linf", "l2"), exact=("linf",), options={"queries": 60}, sharp={"queries": 400}, restarts=True
    ),
    "hop_skip_jump": Row(
        "minimal", ("linf", "l2"), exact=(), options={"rounds": 3, "probes": 20, "narrowings": 3, "together": 5}
    ),
    "nes": Row("bounded", ("linf", "l2"), exact=(), options={"samples": 10, "steps": 10}),
    "spsa": Row("bounded", ("linf", "l2"), exact=(), options={"samples": 10, "steps": 10}),
    "roto_translation": Row(
        "spatial", ("linf",), exact=(), options={"shift": 0.3, "degrees": 90.0, "grid": (3, 3, 5), "together": 4}
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
    "adam": Row(
        "bounded", ("linf", "l2"), exact=("linf",), options={"steps": 5}, sharp={"steps": 10, "relative_step": 0.5}
    ),
}
