"""Threat models: the noun that attacks, training, certificates and reports share."""

from __future__ import annotations

import dataclasses
import re

from robust_vit import errors
from robust_vit.attacks import norms

_FORM = "<dataset>/<linf, l2 or l1>-<size>"
_NAME = re.compile(r"(?P<dataset>[a-z0-9_]+)/(?P<norm>[a-z0-9]+)-(?P<size>[0-9.]+(?:/[0-9]+)?)")


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """What an adversary may do to an image.

    Attributes:
      dataset: the data that the size is customary for; a label only.
      norm: the norm of the perturbation.
      epsilon: its largest size, in pixel units [0, 1] (canonical pixels, never normalised ones).
      source: where the convention comes from.
      examples: how many test images a published evaluation takes, which is what studies take that are not told otherwise: the
        first in the order of the data set, or all that there are; None is all. (RobustBench names its 5,000 of ImageNet in
        `helper_files/imagenet_test_image_ids.txt`. That list is not shipped: the first 5,000 of the validation split as it
        was prepared are taken, the same in every run and others than those.)
    """

    dataset: str
    norm: norms.Norm
    epsilon: float
    source: str = ""
    examples: int | None = None

    @property
    def name(self) -> str:
        """`cifar10/linf-8`: whole numbers are in 255ths for the maximum norm; numbers with a point are in pixel units."""
        levels = self.epsilon * 255
        if self.norm is norms.LINF and levels >= 0.5 and abs(levels - round(levels)) < 1e-9:
            return f"{self.dataset}/{self.norm.name}-{round(levels)}"
        size = repr(float(self.epsilon))
        return f"{self.dataset}/{self.norm.name}-{size}"


_ROBUSTBENCH = "Croce et al. 2021, RobustBench, arXiv 2010.09670"

THREATS = {
    threat.name: threat
    for threat in (
        ThreatModel("mnist", norms.LINF, 0.3, "Madry et al. 2018, arXiv 1706.06083", 10_000),
        ThreatModel("fashion_mnist", norms.LINF, 0.1, "Croce & Hein 2020, arXiv 1907.02044", 10_000),
        ThreatModel("cifar10", norms.LINF, 8 / 255, _ROBUSTBENCH, 10_000),
        ThreatModel("cifar10", norms.L2, 0.5, _ROBUSTBENCH, 10_000),
        ThreatModel("cifar10", norms.L1, 12.0, "Croce & Hein 2021, arXiv 2103.01208", 1_000),
        ThreatModel("cifar100", norms.LINF, 8 / 255, _ROBUSTBENCH, 10_000),
        ThreatModel("imagenet", norms.LINF, 4 / 255, _ROBUSTBENCH, 5_000),
        ThreatModel("imagenet", norms.L2, 3.0, "Engstrom et al. 2019, the robustness library", 5_000),
    )
}


def threat(name: str) -> ThreatModel:
    """The threat model of a name: a registered one, or any `<dataset>/<norm>-<size>`.

    Args:
      name: `cifar10/linf-8` (8/255), `fashion_mnist/linf-0.1` (pixel units), `cifar10/linf-8/255`, `cifar10/l2-0.5`,
        `cifar10/l1-12`. For the maximum norm a whole number counts 255ths, one with a point is in pixel units; all others
        are in pixel units.
    """
    if name in THREATS:
        return THREATS[name]
    match = _NAME.fullmatch(name)
    if match is None or match["norm"] not in norms.NORMS:
        raise errors.unknown("threat model", name, [*THREATS, _FORM])
    norm = norms.NORMS[match["norm"]]
    size = match["size"]
    try:
        if "/" in size:
            above, below = size.split("/")
            epsilon = float(above) / float(below)
        else:
            epsilon = float(size) / (255 if norm is norms.LINF and "." not in size else 1)
    except (ValueError, ZeroDivisionError):
        raise errors.unknown("threat model", name, [*THREATS, _FORM]) from None
    found = ThreatModel(match["dataset"], norm, epsilon)
    return THREATS.get(found.name, found)
