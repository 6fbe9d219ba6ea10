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
    blocks,
    densities,
    directions,
    eigenvalues,
    estimates,
    jacobians,
    krylov,
    landscapes,
    operators,
    per_example,
    power,
    products,
    representations,
    sharpness,
    spectra,
    streams,
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
Eigenvalues = eigenvalues.Eigenvalues
Estimate = estimates.Estimate
ExampleValues = per_example.ExampleValues
Jacobian = jacobians.Jacobian
Operator = operators.Operator
Scaled = operators.Scaled
Trajectory = directions.Trajectory
Turning = representations.Turning
WorstCase = sharpness.WorstCase
asymmetry = operators.asymmetry
average_case = sharpness.average_case
condition_number = spectra.condition_number
density = densities.density
diagonal = traces.diagonal
direction_change = representations.direction_change
effective_rank = spectra.effective_rank
example_eigenvalues = per_example.lanczos
example_singular_values = per_example.singular_values
feature_path = representations.feature_path
fisher = products.fisher
frobenius = traces.frobenius
gauss_newton = products.gauss_newton
gradient_norms = per_example.gradient_norms
grid = landscapes.grid
hessian = products.hessian
indeterminism = operators.indeterminism
input_hessian = products.input_hessian
jacobian = jacobians.jacobian
lanczos = eigenvalues.lanczos
landscape = landscapes.landscape
line_directions = representations.line_directions
linearise = batches.linearise
m_sharpness = sharpness.m_sharpness
negative_share = spectra.negative_share
normalise_directions = directions.normalise
offsets = landscapes.offsets
overlap = spectra.overlap
parameter_blocks = blocks.blocks
positive_mean = spectra.positive_mean
power_iteration = power.power_iteration
programs = krylov.planned
project_paths = bends.project
random_directions = directions.random
scales = sharpness.scales
stream = streams.stream
sweep_directions = representations.sweep
tangent_change = representations.tangent_change
together = batches.together
trace = traces.trace
trajectory = directions.trajectory
turning = representations.turning
within = blocks.within
worst_case = sharpness.worst_case


def build(name: str, *arguments: Any, **options: Any) -> operators.Operator:
    """The operator of that name, one of `OPERATORS`, from the arguments and options of the function that it names."""
    return registry.find("operator", name, OPERATORS)(*arguments, **options)
