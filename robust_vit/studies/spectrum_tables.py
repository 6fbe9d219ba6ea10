"""The tables of Hessian spectra and densities: one row a run and phase, or a block of these."""

from __future__ import annotations

from collections.abc import Mapping

from robust_vit import tables
from robust_vit.studies import spectrum_numbers, study, training_loss


def eigenvalues(findings: Mapping[str, study.Finding], *, title: str, caption: str) -> tables.Table:
    """Ends of the top eigenvalues, APE and NEP of each run, the early phase above the end; overlaps where they were measured."""
    early = any("early" in finding.summary for finding in findings.values())
    overlapping = any("chance_overlap" in finding.summary for finding in findings.values())
    rows = []
    for run, finding in findings.items():
        summary = finding.summary
        for phase, prefix in _phases(finding).items():
            part = summary["early"] if prefix else summary
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


def blocks(findings: Mapping[str, study.Finding], *, title: str, caption: str) -> tables.Table:
    """Mean magnitudes by rank, NEP and APE of each block of each run, the early phase above the end."""
    early = any("early" in finding.summary for finding in findings.values())
    found = {
        (run, phase): spectrum_numbers.blocks(finding.records, prefix)
        for run, finding in findings.items()
        for phase, prefix in _phases(finding).items()
    }
    most = max(len(block["magnitudes"]) for entries in found.values() for block in entries.values())
    rows = [
        (
            run,
            *((phase,) if early else ()),
            name,
            *(study.number(entry, ".3g") for entry in block["magnitudes"]),
            *(None for _ in range(most - len(block["magnitudes"]))),
            study.number(block["ape"], ".3g"),
            study.number(block["nep"], ".0%"),
        )
        for (run, phase), entries in found.items()
        for name, block in entries.items()
    ]
    ranks = (f"|λ{''.join('₀₁₂₃₄₅₆₇₈₉'[int(digit)] for digit in str(rank))}|" for rank in range(1, most + 1))
    columns = ("run", *(("phase",) if early else ()), "block", *ranks, "APE (mean positive λ)", "NEP (negative share)")
    return tables.Table(title, columns, rows, caption)


def densities(findings: Mapping[str, study.Finding], *, title: str, caption: str) -> tables.Table:
    """Trace, norm, effective rank, negative shares and both ends of each run, the early phase above the end."""
    early = any("early" in finding.summary for finding in findings.values())
    rows = []
    for run, finding in findings.items():
        for phase, prefix in _phases(finding).items():
            part = finding.summary["early"] if prefix else finding.summary
            rows.append(
                (
                    run,
                    *((phase,) if early else ()),
                    study.number(part["trace"], ".4g"),
                    tables.Number(part["trace_of_l2"], format=".4g"),
                    study.number(part["frobenius"], ".4g"),
                    study.number(part["effective_rank"], ".3g"),
                    study.number(part["negative_share"], ".2%"),
                    study.number(part["negative_mass"], ".1%"),
                    study.number(part["negative_mass_of_loss"], ".1%"),
                    _with_residual(part["largest"]),
                    _with_residual(part["smallest"]),
                    tables.Number(part["condition_number_at_least"], format=".2g"),
                    tables.Number(part["loss"], format=".3f"),
                    finding.summary["parameters"],
                )
            )
    columns = (
        "run",
        *(("phase",) if early else ()),
        "trace of the loss",
        "trace of L2",
        "Frobenius norm of the loss",
        "effective rank of the loss",
        "negative eigenvalues",
        "negative mass",
        "negative mass of the loss",
        "largest λ",
        "smallest λ",
        "condition number at least",
        "loss (nats)",
        "parameters",
    )
    return tables.Table(title, columns, rows, caption)


def _phases(finding: study.Finding) -> dict[str, str]:
    """Name -> prefix of the records of each phase, the early one first."""
    if "early" not in finding.summary:
        return {"end": ""}
    return {f"early (step {finding.summary['early']['step']:,})": training_loss.EARLY, "end": ""}


def _with_residual(entry: Mapping[str, float]) -> tables.Number:
    value, residual = entry["value"], entry["residual"]
    return tables.Number(value, value - residual, value + residual, "residual", ".4g")
