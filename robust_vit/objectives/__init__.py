"""What training minimises. Chosen by name; each is a callable in the form of `training.step.Objective`."""

from __future__ import annotations

from typing import Any

from robust_vit import registry

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
    return registry.build("objective", name, OBJECTIVES, options, fixed={"module": module, "spec": spec})
