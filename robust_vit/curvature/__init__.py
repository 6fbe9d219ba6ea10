"""Curvature: second derivatives as operators on pytrees, and solvers that say how far to trust what they return.

`hessian(loss, params, batch)` makes an operator and `lanczos(operator, key, rank=..., top=...)` its extreme eigenvalues.
"""

from __future__ import annotations

from typing import Any

from robust_vit import registry
from robust_vit.curvature import krylov, operators

OPERATORS = {
    "hessian": "robust_vit.curvature.operators:hessian",
}

Eigenvalues = krylov.Eigenvalues
Operator = operators.Operator
asymmetry = operators.asymmetry
hessian = operators.hessian
lanczos = krylov.lanczos
programs = krylov.planned


def build(name: str, *arguments: Any, **options: Any) -> operators.Operator:
    """The operator of that name, one of `OPERATORS`, from the arguments and options of the function that it names."""
    return registry.find("operator", name, OPERATORS)(*arguments, **options)
