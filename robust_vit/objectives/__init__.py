"""What training minimises. Chosen by name; each is a callable in the form of `training.step.Objective`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from robust_vit import errors

OBJECTIVES = {"supervised": "robust_vit.objectives.supervised:Supervised"}


def build(name: str, module: Any, spec: Any, **options: Any) -> Any:
    """The objective of this name for a model.

    Args:
      name: a key of `OBJECTIVES`.
      module: the Linen module.
      spec: its `classifier.ImageSpec`.
      **options: of the objective.

    Raises:
      errors.UserError: an unknown name or option, with the nearest known.
    """
    if name not in OBJECTIVES:
        raise errors.unknown("objective", name, OBJECTIVES)
    path, _, attribute = OBJECTIVES[name].partition(":")
    objective = getattr(importlib.import_module(path), attribute)
    known = [parameter for parameter in inspect.signature(objective).parameters if parameter not in ("module", "spec")]
    for option in options:
        if option not in known:
            raise errors.unknown(f"option of objective {name!r}", option, known)
    return objective(module=module, spec=spec, **options)
