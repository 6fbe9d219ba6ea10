"""Builds the report: figures and tables of every study over all runs, paired tests, the evaluation card, one HTML page."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

import robust_vit
from robust_vit import files, plots, progress, studies, tables
from robust_vit.report import card, comparisons, curves, results, svg
from robust_vit.report import runs as run_lib

_logger = logging.getLogger(__name__)
PAGE = "index.html"
_CAPTIONS = {"training_curves": "Training: solid lines are means over training batches, dashed ones are held-out data."}


@dataclasses.dataclass(frozen=True)
class _Figure:
    number: int
    caption: str
    svg: markupsafe.Markup
    links: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class _Table:
    number: int
    table: tables.Table
    numeric: tuple[bool, ...]
    strong: tuple[bool, ...]
    stacked: bool
    links: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class _Section:
    label: str
    title: str
    question: str
    paper: str
    protocol: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    figures: tuple[_Figure, ...]
    tables: tuple[_Table, ...]
    caveats: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    records: tuple[tuple[str, str], ...]


def write(runs: Sequence[os.PathLike | str | tuple[str, os.PathLike | str]], out: os.PathLike | str) -> pathlib.Path:
    """Writes the report of any number of runs and returns the path of its page.

    Args:
      runs: workdirs, runs (`<workdir>/<run>`), or pairs of a name and a run's folder; in the order of the report.
      out: the report's folder: `index.html` (one self-contained file), `figures/*.svg|pdf`, `tables/*.csv|tex`,
        `card.json`.

    Raises:
      UserError: a path that holds no results, or damaged ones.
    """
    out = pathlib.Path(out)
    found = run_lib.find(runs)
    by_label = {
        label: {run.name: run.results[label] for run in found if label in run.results}
        for label in run_lib.labels(found)
    }
    # Beside the seeds of a run lies a folder that holds nothing but how they were trained.
    judged = [run for run in found if run.results] or found
    compared = comparisons.collect(by_label)
    family = sum(row.adjusted is not None for row in compared)
    writer = _Writer(out)
    glance = writer.tables({"at_a_glance": _glance(judged, by_label)}, "report")
    sections = [_section(writer, label, by_run, compared, family) for label, by_run in by_label.items()]
    # After the sections: figures are numbered in the order of the page.
    drawn = curves.training(found)
    training = writer.figures({"training_curves": drawn}, "report", _CAPTIONS) if drawn is not None else ()
    content = card.build(found, compared, beside=out)
    files.write_json(out / "card.json", content)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=_title(judged),
            runs=[_describe(index, run) for index, run in enumerate(judged)],
            data=sorted({_data_line(result) for run in found for result in run.results.values()}),
            glance=[table for table in glance if table.table.rows and len(table.table.columns) > 1],
            training=training,
            colors={run.name: plots.color(index) for index, run in enumerate(judged)},
            sections=sections,
            family=family,
            versions=_versions(found),
            version=robust_vit.__version__,
        )
    )
    files.write_text(out / PAGE, page)
    _logger.debug("report of %d runs and %d studies: %s", len(found), len(sections), out / PAGE)
    return out / PAGE


class _Writer:
    """Writes figures and tables beside the page and numbers them."""

    def __init__(self, out: pathlib.Path):
        self._out = out
        self._figures = 0
        self._tables = 0

    def figures(self, drawn: Mapping[str, Any], label: str, captions: Mapping[str, str]) -> tuple[_Figure, ...]:
        made = []
        for name, figure in drawn.items():
            self._figures += 1
            caption = captions.get(name, _sentence(name))
            paths = plots.save(figure, self._out / "figures" / _file_name(label, name), ("svg", "pdf"))
            content = paths[0].read_text(encoding="utf-8")
            drawing = svg.inline(content, prefix=f"figure{self._figures}", label=caption)
            made.append(_Figure(self._figures, caption, markupsafe.Markup(drawing), self._links(paths)))
        return tuple(made)

    def tables(self, given: Mapping[str, tables.Table], label: str) -> tuple[_Table, ...]:
        return tuple(self.table(table, label, name) for name, table in given.items())

    def table(self, table: tables.Table, label: str, name: str, strong: Sequence[bool] = ()) -> _Table:
        self._tables += 1
        stem = self._out / "tables" / _file_name(label, name)
        paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("csv", "tex")]
        files.write_text(paths[0], table.csv())
        files.write_text(paths[1], table.latex())
        strong = tuple(strong) or (False,) * len(table.rows)
        spread = [any(_interval(row[i]) for row in table.rows) for i in range(len(table.columns))]
        # Many intervals side by side would not fit: they go under their numbers.
        stacked = sum(spread) >= 4
        return _Table(self._tables, table, _numeric(table), strong, stacked, self._links(paths))

    def link(self, path: pathlib.Path) -> str:
        return pathlib.PurePath(os.path.relpath(path, self._out)).as_posix()

    def _links(self, paths: Sequence[pathlib.Path]) -> tuple[tuple[str, str], ...]:
        names = {"tex": "LaTeX"}
        return tuple((names.get(path.suffix[1:], path.suffix[1:].upper()), self.link(path)) for path in paths)


def _section(
    writer: _Writer,
    label: str,
    by_run: Mapping[str, results.Result],
    compared: Sequence[comparisons.Row],
    family: int,
) -> _Section:
    ready = {run: result for run, result in by_run.items() if result.finding is not None}
    skipped = tuple((run, result.skipped) for run, result in by_run.items() if result.skipped is not None)
    if not ready:
        return _Section(label, _sentence(label), "", "", (), (), (), (), (), skipped, ())
    first = next(iter(ready.values()))
    study = first.study
    findings = {run: result.finding for run, result in ready.items()}
    shown = list(writer.tables(study.tables(findings), label))
    rows = [row for row in compared if row.label == label]
    if rows:
        strong = [row.adjusted is not None and row.adjusted < 0.05 for row in rows]
        shown.append(writer.table(comparisons.table(rows, family), label, "comparisons", strong))
    return _Section(
        label=label,
        title=study.title if label == study.name else f"{study.title} ({label})",
        question=study.question,
        paper=study.paper,
        protocol=_paragraphs(type(study)),
        settings=tuple(_settings(first)),
        figures=writer.figures(study.figures(findings), label, study.captions),
        tables=tuple(shown),
        caveats=tuple(_caveats(ready)) + tuple(_unequal(ready)),
        skipped=skipped,
        records=tuple((run, writer.link(result.directory / results.RECORDS)) for run, result in ready.items()),
    )


def _glance(found: Sequence[run_lib.Run], by_label: Mapping[str, Mapping[str, results.Result]]) -> tables.Table:
    """One row a run, the headline numbers of all studies side by side."""
    cells: dict[str, dict[str, tables.Number]] = {run.name: {} for run in found}
    for label, by_run in by_label.items():
        for run, result in by_run.items():
            if result.finding is not None:
                suffix = "" if label == result.study.name else f" ({label})"
                headline = result.study.headline(result.finding)
                cells[run] |= {f"{heading}{suffix}": number for heading, number in headline.items()}
    columns = dict.fromkeys(heading for row in cells.values() for heading in row)
    rows = [(run, *(row.get(heading) for heading in columns)) for run, row in cells.items()]
    return tables.Table(
        "At a glance", ("run", *columns), rows, "95 % intervals in brackets; each study says over what."
    )


def _caveats(ready: Mapping[str, results.Result]) -> Iterator[tuple[str, str]]:
    """Caveats with the runs that they hold for; no name where they hold for all."""
    holders: dict[str, list[str]] = {}
    for run, result in ready.items():
        for caveat in result.finding.summary.get("caveats", ()):
            holders.setdefault(caveat, []).append(run)
    for caveat, names in holders.items():
        yield ("" if len(names) == len(ready) else ", ".join(names), caveat)


def _unequal(ready: Mapping[str, results.Result]) -> Iterator[tuple[str, str]]:
    """What keeps runs from being compared: other settings, other images."""
    first_name, first = next(iter(ready.items()))
    for run, result in list(ready.items())[1:]:
        settings = first.asked["settings"]
        differing = [key for key, value in settings.items() if result.asked["settings"].get(key) != value]
        if differing:
            yield run, f"Other settings than {first_name}: {', '.join(differing)}. The numbers are not of one protocol."
        if result.asked["data"]["fingerprint"] != first.asked["data"]["fingerprint"]:
            yield run, f"Judged on other images than {first_name}: no paired test was made."


def _settings(result: results.Result) -> Iterator[tuple[str, str]]:
    for key, value in result.asked["settings"].items():
        if key != "name":
            text = ", ".join(map(_plain, value)) if isinstance(value, list) else _plain(value)
            yield key.replace("_", " "), text
    yield "seed", str(result.asked["seed"])
    if result.asked["threat"]:
        yield "threat model", result.asked["threat"]


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return format(value, ".4g") if isinstance(value, float) else str(value)


def _paragraphs(kind: type[studies.Study]) -> tuple[str, ...]:
    """The study's docstring, which states its protocol, without the list of its attributes."""
    text = inspect.cleandoc(kind.__doc__ or "").split("\nAttributes:")[0]
    return tuple(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def _describe(index: int, run: run_lib.Run) -> dict[str, Any]:
    provenances = [result.provenance for result in run.results.values() if result.skipped is None]
    steps = sorted({result.step for result in run.results.values() if result.step > 0})
    seconds = sum(provenance.get("wall_seconds", 0.0) for provenance in provenances)
    return {
        "name": run.name,
        "color": plots.color(index),
        "step": ", ".join(f"{step:,}" for step in steps),
        "studies": len(provenances),
        "time": progress.duration(seconds),
        "finished": max((provenance.get("finished", "") for provenance in provenances), default="")[:10],
        "model": next((result.asked["model"] for result in run.results.values()), ""),
    }


def _title(found: Sequence[run_lib.Run]) -> str:
    names = [run.name for run in found]
    if len(names) > 3:
        return f"{len(names)} models compared"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _data_line(result: results.Result) -> str:
    data = result.asked["data"]
    return f"{data['name']}, {data['examples']:,} test images"


def _versions(found: Sequence[run_lib.Run]) -> list[tuple[str, str]]:
    """Distinct versions and hardware over all results."""
    values: dict[str, dict[str, None]] = {}
    for run in found:
        for result in run.results.values():
            hardware = result.provenance.get("hardware", {})
            line = {**result.provenance.get("versions", {})}
            if hardware:
                line["hardware"] = f"{hardware['devices']} ({hardware['processor']}, {hardware['cores']} cores)"
            for key, value in line.items():
                values.setdefault(key, {})[str(value)] = None
    return [(key, "; ".join(options)) for key, options in values.items()]


def _numeric(table: tables.Table) -> tuple[bool, ...]:
    """Which columns hold numbers, and so are set flush right."""
    kinds = int | float | tables.Number | None
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return tuple(
        all(isinstance(cell, kinds) or _reads_as_number(cell) for cell in column) and any(c is not None for c in column)
        for column in columns
    )


def _reads_as_number(cell: Any) -> bool:
    return isinstance(cell, str) and bool(re.fullmatch(r"(< ?)?[+\-−]?[\d.,]*\d%?|", cell))


def _sentence(name: str) -> str:
    words = name.replace("_", " ").replace("/", ", ")
    return words[:1].upper() + words[1:]


def _file_name(label: str, name: str) -> str:
    text = name if name.startswith(label) else f"{label}_{name}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _interval(number: Any) -> str:
    """The interval as it stands behind its number; the unit is said once. Empty for what has none."""
    if not isinstance(number, tables.Number) or number.low is None or number.high is None:
        return ""
    low, high = (format(end, number.format) for end in (number.low, number.high))
    if low.endswith("%") and high.endswith("%"):
        low, high = low[:-1], high[:-1]
    return f"[{low}, {high}]".replace("-", "−")


def _breakable(name: str) -> markupsafe.Markup:
    """A run's name that a narrow column may break after its separators."""
    return markupsafe.Markup(re.sub(r"([_./-])(?=.)", r"\1<wbr>", str(markupsafe.escape(name))))


def _marked(text: str) -> markupsafe.Markup:
    """Prose with the names of settings, which stand between backquotes, as code."""
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _value(cell: Any) -> str:
    """A cell without its interval, with a true minus sign before numbers."""
    if isinstance(cell, tables.Number):
        return str(dataclasses.replace(cell, low=None, high=None)).replace("-", "−")
    text = tables.text(cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        text = f"{cell:,}"
    return text.replace("-", "−", 1) if isinstance(cell, int | float) else text


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robust_vit.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = _value
    environment.filters["interval"] = _interval
    environment.filters["breakable"] = _breakable
    environment.filters["marked"] = _marked
    return environment
