"""Curvature: second derivatives as operators on pytrees, and solvers that say how far to trust what they return.

`hessian(loss, params, batch)` makes an operator, `lanczos(operator, key, rank=..., top=...)` its extreme eigenvalues, and
`density(operator, key)` its spectral density.
"""

from __future__ import annotations

from typing import Any

from robust_vit import registry
from robust_vit.curvature import (
    batches,
    bends,
    densities,
    estimates,
    jacobians,
    krylov,
    operators,
    power,
    products,
    representations,
    traces,
)

OPERATORS = {
    "hessian": "robust_vit.curvature.products:hessian",
    "gauss_newton": "robust_vit.curvature.products:gauss_newton",
    "fisher": "robust_vit.curvature.products:fisher",
    "input_hessian": "robust_vit.curvature.products:input_hessian",
}

Bend = bends.Bend
Density = densities.Density
Eigenvalues = krylov.Eigenvalues
Estimate = estimates.Estimate
Jacobian = jacobians.Jacobian
Operator = operators.Operator
Turning = representations.Turning
asymmetry = operators.asymmetry
density = densities.density
diagonal = traces.diagonal
direction_change = representations.direction_change
fisher = products.fisher
frobenius = traces.frobenius
gauss_newton = products.gauss_newton
hessian = products.hessian
indeterminism = operators.indeterminism
input_hessian = products.input_hessian
jacobian = jacobians.jacobian
lanczos = krylov.lanczos
linearise = batches.linearise
power_iteration = power.power_iteration
programs = krylov.planned
project_paths = bends.project
random_directions = representations.random_directions
stream = batches.stream
sweep_directions = representations.sweep
tangent_change = representations.tangent_change
trace = traces.trace
trajectory = representations.trajectory
turning = representations.turning


def build(name: str, *arguments: Any, **options: Any) -> operators.Operator:
    """The operator of that name, one of `OPERATORS`, from the arguments and options of the function that it names."""
    return registry.find("operator", name, OPERATORS)(*arguments, **options)
