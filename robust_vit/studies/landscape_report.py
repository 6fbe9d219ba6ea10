"""What a reader is told of a loss landscape: its table, and what not to read into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_vit import tables
from robust_vit.studies import study

_PLANES = {
    "random": "random directions",
    "eigenvectors": "eigenvectors of the Hessian",
    "trajectory": "training trajectory",
}
_LAST = {"eigenvectors": ("eigenvalues (Lanczos)",), "trajectory": ("variance explained",)}


def table(findings: Mapping[str, study.Finding], settings: Mapping[str, Any]) -> tables.Table:
    """One row a run; `settings` are the study's, with the normalisation that it chose."""
    rows = []
    for run, finding in findings.items():
        summary = finding.summary
        known = [values for values in (summary["eigenvalues"], summary["explained"]) if values]
        cells = (
            study.number(summary["loss"], ".3g"),
            tables.Number(summary["l2"], format=".3g"),
            tables.Number(summary["accuracy"], format=".1%"),
            *(study.number(value, ".3g") for value in summary["curvature"]),
            study.number(summary["rise"], ".3g"),
            study.number(summary["radius"], ".3g"),
            study.number(summary["negative"], ".1%"),
            study.number(summary["roughness"], ".3f"),
            *(", ".join(f"{value:.3g}" for value in values) for values in known),
        )
        rows.append((run, *cells))
    columns = (
        "run",
        "loss at the weights (nats)",
        "L2 there",
        "accuracy there",
        *(f"curvature, axis {axis + 1}" for axis in range(settings["dimensions"])),
        "rise half way to the edge",
        "distance at which it doubles",
        "negative second differences",
        "roughness",
        *_LAST.get(settings["plane"], ()),
    )
    normalised = settings["normalisation"] != "none"
    unit = "the filters' norms" if normalised else "distance in the weights"
    normalisation = f", {settings['normalisation']}" if normalised else ""
    return tables.Table(
        f"Loss landscape: {_PLANES[settings['plane']]}{normalisation}",
        columns,
        rows,
        f"Loss: {'NLL + L2' if settings['l2'] else 'NLL'} of {settings['examples']} training images as augmented. "
        f"{settings['points']} points along each axis, in units of {unit}. Curvature: of the parabola fitted to the five points "
        "about the weights. Roughness: how far the lines of the grid go up and down beyond one valley, over their range. 95 % "
        f"bootstrap intervals over {'images' if settings['draws'] == 1 else 'planes; of the loss over images'}.",
    )


def caveats(settings: Mapping[str, Any], numbers: Mapping[str, Any], exhibits: Mapping[str, np.ndarray]) -> list[str]:
    """What a reader must know, in sentences."""
    found = []
    if settings["plane"] == "random":
        found.append(_of_draws(settings["draws"]))
    total = numbers["loss"]["value"]
    if settings["l2"] and numbers["l2"] > 0.5 * total:
        found.append(
            f"{numbers['l2'] / total:.0%} of the loss at the weights is the L2 term, whose landscape is a bowl of its own: look "
            "at the NLL (l2=False) too, above all where weight decay is decoupled (AdamW) and in no loss."
        )
    if numbers["finite"] < 1:
        found.append(f"The loss is not finite in {1 - numbers['finite']:.1%} of the points; they are left out.")
    radius = numbers["radius"]
    if radius is not None and radius["reached"] < 1:
        some = "the mean" if radius["reached"] > 0 else "it"
        where = " in every plane" if radius["reached"] > 0 else ""
        found.append(
            f"Up to a distance of {radius['limit']:.3g} the loss does not double{where}: the distance is counted as that much, "
            f"and {some} is a lower bound."
        )
    if radius is not None and radius["value"] < numbers["step"]:
        found.append(
            f"The loss doubles within one step of the grid ({numbers['step']:.3g}): the distance is interpolated; a smaller span "
            "resolves it."
        )
    if not exhibits.get("eigenvalue_converged", np.ones(1, bool)).all():
        found.append(
            f"An eigenvalue did not reach a relative residual of {settings['tolerance']:g} in {settings['rank']} Lanczos steps: "
            "its axis is near to an eigenvector, not one; raise `rank`."
        )
    if settings["plane"] == "trajectory":
        found.append(
            f"The plane holds {sum(numbers['explained']):.1%} of the variance of the checkpoints: these are drawn where they "
            "are seen from above, and have losses of their own."
        )
        if exhibits["running_statistics"].any():
            found.append("BatchNorm's running statistics are the final ones everywhere: each checkpoint had its own.")
    return found


def _of_draws(draws: int) -> str:
    if draws > 1:
        return f"The directions are {draws} draws of all that there are: most are flat, and none shows the sharpest."
    return (
        "The directions are one draw of all that there are: most are flat, and none shows the sharpest. Intervals are over "
        "images, at this draw; `draws` says how much another one differs."
    )
