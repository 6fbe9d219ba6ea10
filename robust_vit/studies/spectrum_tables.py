"""The table of Hessian spectra: one row a run and phase."""

from __future__ import annotations

from collections.abc import Mapping

from robust_vit import tables
from robust_vit.studies import study


def eigenvalues(findings: Mapping[str, study.Finding], *, title: str, caption: str) -> tables.Table:
    """Ends of the top eigenvalues, APE and NEP of each run, the early phase above the end; overlaps where they were measured."""
    early = any("early" in finding.summary for finding in findings.values())
    overlapping = any("chance_overlap" in finding.summary for finding in findings.values())
    rows = []
    for run, finding in findings.items():
        summary = finding.summary
        phases = {"end": summary}
        if "early" in summary:
            phases = {f"early (step {summary['early']['step']:,})": summary["early"], **phases}
        for phase, part in phases.items():
            rows.append(
                (
                    run,
                    *((phase,) if early else ()),
                    study.number(part["largest"], ".4g"),
                    study.number(part["smallest"], ".4g"),
                    study.number(part["ape"], ".4g"),
                    study.number(part["nep"], ".1%"),
                    *((study.number(part.get("overlap"), ".3f"),) if overlapping else ()),
                    *((study.number(part.get("overlap_with_end"), ".3f"),) if early and overlapping else ()),
                    tables.Number(part["converged"], format=".0%"),
                    tables.Number(part["median_relative_residual"], format=".1e"),
                    tables.Number(part["loss"]["value"], format=".3f"),
                    summary["parameters"],
                )
            )
    columns = (
        "run",
        *(("phase",) if early else ()),
        "largest λ",
        "smallest of the top λ",
        "APE (mean positive λ)",
        "NEP (negative share)",
        *(("overlap between mini-batches",) if overlapping else ()),
        *(("overlap with the end",) if early and overlapping else ()),
        "converged",
        "median relative residual",
        "loss (nats)",
        "parameters",
    )
    if overlapping:
        chance = max(finding.summary.get("chance_overlap", 0.0) for finding in findings.values())
        caption += f" Random subspaces would overlap by {chance:.1e} or less."
    return tables.Table(title, columns, rows, caption)
