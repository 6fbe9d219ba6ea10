"""Tables: what a study hands to the report, and how they are written as CSV and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Number:
    """A reported number with its interval.

    Attributes:
      value: the estimate.
      low: lower end of the interval, or None where there is none.
      high: upper end.
      over: what the interval is over: "images", "seeds", "draws", ...
      format: a format specification of Python, for example ".1%".
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    over: str = ""
    format: str = ".3f"

    def __str__(self) -> str:
        if self.value is None or not math.isfinite(self.value):
            return "n/a"
        text = format(self.value, self.format)
        if self.low is None or self.high is None:
            return text
        return f"{text} [{format(self.low, self.format)}, {format(self.high, self.format)}]"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text and `Number`s.

    Attributes:
      title: one line.
      columns: the headings.
      rows: as many cells each as there are columns.
      caption: what the intervals are over, which protocol, caveats.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str | int | float | Number | None]]
    caption: str = ""

    def csv(self) -> str:
        """Comma-separated values; a number with an interval takes three columns."""
        spread = [
            any(isinstance(row[i], Number) and row[i].low is not None for row in self.rows)
            for i in range(len(self.columns))
        ]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        header = []
        for name, wide in zip(self.columns, spread, strict=True):
            header += [name, f"{name} (low)", f"{name} (high)"] if wide else [name]
        writer.writerow(header)
        for row in self.rows:
            cells = []
            for cell, wide in zip(row, spread, strict=True):
                if isinstance(cell, Number):
                    cells += [cell.value, cell.low, cell.high] if wide else [cell.value]
                else:
                    cells += [cell, "", ""] if wide else [cell]
            writer.writerow(cells)
        return buffer.getvalue()

    def latex(self) -> str:
        """A `tabular` for the booktabs package."""
        lines = [r"\begin{tabular}{l" + "r" * (len(self.columns) - 1) + "}", r"\toprule"]
        lines.append(" & ".join(_escape(name) for name in self.columns) + r" \\")
        lines.append(r"\midrule")
        lines += [" & ".join(_escape(text(cell)) for cell in row) + r" \\" for row in self.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
        return "\n".join(lines) + "\n"


def text(cell: str | int | float | Number | None) -> str:
    """A cell as a reader sees it."""
    if cell is None:
        return ""
    return format(cell, ".4g") if isinstance(cell, float) else str(cell)


def _escape(value: str) -> str:
    replacements = {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "_": r"\_",
        "#": r"\#",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    return "".join(replacements.get(character, character) for character in value)
