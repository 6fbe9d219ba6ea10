"""Paired tests between all runs of a report, adjusted as one family."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from robust_vit import studies, tables
from robust_vit.metrics import statistics
from robust_vit.report import results


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison between two runs.

    Attributes:
      label: the study's label.
      first: the run that is subtracted.
      second: the run that it is subtracted from.
      comparison: the difference, with its interval and its own p-value.
      adjusted: the p-value adjusted over the whole report, or None where there is no test.
    """

    label: str
    first: str
    second: str
    comparison: studies.Comparison
    adjusted: float | None = None


def collect(found: Mapping[str, Mapping[str, results.Result]]) -> list[Row]:
    """All comparisons of all pairs of runs, p-values adjusted over all of them together (Holm 1979).

    Args:
      found: label -> run name -> result.
    """
    rows = []
    for label, by_run in found.items():
        ready = {run: result for run, result in by_run.items() if result.finding is not None}
        for (first, left), (second, right) in itertools.combinations(ready.items(), 2):
            if left.study.name == right.study.name:
                rows += [Row(label, first, second, item) for item in left.study.compare(left.finding, right.finding)]
    p_values = [_or_nan(row.comparison.p_value) for row in rows]
    adjusted = statistics.holm(p_values) if rows else []
    return [
        dataclasses.replace(row, adjusted=None if math.isnan(value) else float(value))
        for row, value in zip(rows, adjusted, strict=True)
    ]


def table(rows: Sequence[Row], family: int) -> tables.Table:
    """The comparisons as a table; one line a difference, second run minus first.

    Args:
      rows: some or all of the comparisons, at least one.
      family: how many tests the adjustment was over.
    """
    lines: list[tuple] = []
    pairs: dict[str, None] = {}
    for row in rows:
        item = row.comparison
        difference = tables.Number(item.difference, item.low, item.high, item.over, item.format)
        pair = f"{row.second} − {row.first}"
        pairs[pair] = None
        lines.append((item.quantity, pair, difference, p_text(item.p_value), p_text(row.adjusted), item.test))
    columns = ("quantity", "runs", "difference", "p", "p (Holm)", "test")
    title = "Differences between runs"
    if len(pairs) == 1:
        # One pair is said once.
        title = f"Differences, {next(iter(pairs))}"
        lines = [(line[0], *line[2:]) for line in lines]
        columns = (columns[0], *columns[2:])
    over = sorted({row.comparison.over for row in rows if row.comparison.over})
    return tables.Table(
        title=title,
        columns=columns,
        rows=lines,
        caption=(
            f"Second run minus first, paired; 95 % intervals over {' and '.join(over) or 'images'}. "
            f"Holm's adjustment is over {'the one test' if family == 1 else f'all {family} tests'} of this report. "
            "Bold where it leaves p below 0.05."
        ),
    )


def p_text(value: float | None) -> str:
    """A p-value as a reader sees it."""
    if value is None or math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
