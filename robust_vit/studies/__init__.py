"""Studies: one file per question asked of a model.

`STUDIES` names them; `build` makes a configured one. A study reads a `Subject` chunk by chunk, keeps per-example
records, and computes every scalar, interval, table and figure from the records alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from robust_vit import registry
from robust_vit.studies.study import Comparison as Comparison
from robust_vit.studies.study import Finding as Finding
from robust_vit.studies.study import Snapshot as Snapshot
from robust_vit.studies.study import Study as Study
from robust_vit.studies.study import Subject as Subject
from robust_vit.studies.study import introduce as introduce

STUDIES = {
    "accuracy": "robust_vit.studies.accuracy:Accuracy",
    "attack_curve": "robust_vit.studies.attack_curve:AttackCurve",
    "auto_attack": "robust_vit.studies.auto_attack:AutoAttack",
    "boundary_travel": "robust_vit.studies.boundary_travel:BoundaryTravel",
    "calibration": "robust_vit.studies.calibration:Calibration",
    "certificate": "robust_vit.studies.certificate:Certificate",
    "hessian_density": "robust_vit.studies.hessian_density:HessianDensity",
    "hessian_spectrum": "robust_vit.studies.hessian_spectrum:HessianSpectrum",
    "input_curvature": "robust_vit.studies.input_curvature:InputCurvature",
    "loss_landscape": "robust_vit.studies.loss_landscape:LossLandscape",
    "loss_progression": "robust_vit.studies.loss_progression:LossProgression",
    "patch_attack": "robust_vit.studies.patch_attack:PatchAttack",
    "physical_attack": "robust_vit.studies.physical_attack:PhysicalAttack",
    "representation_curvature": "robust_vit.studies.representation_curvature:RepresentationCurvature",
    "sharpness": "robust_vit.studies.sharpness:Sharpness",
    "spatial_attack": "robust_vit.studies.spatial_attack:SpatialAttack",
    "transfer": "robust_vit.studies.transfer:Transfer",
}

# What is asked of a model by default, with options: seconds to a minute each on two cores, which the images of a published
# robust accuracy would not be; the others are asked for by name.
STANDARD = {"accuracy": {}, "calibration": {}, "attack_curve": {"examples": 256}, "hessian_spectrum": {}}


def build(name: str, **options: Any) -> Study:
    """A configured study.

    Args:
      name: a key of `STUDIES`.
      **options: settings of that study (its dataclass fields); lists become tuples, so settings read from JSON fit.

    Raises:
      UserError: for an unknown study or option (naming the nearest), or a value that the study refuses.
    """
    kind = registry.find("study", name, STUDIES)
    registry.check_options("study", name, options, [field.name for field in dataclasses.fields(kind)])
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
