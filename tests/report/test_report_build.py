"""The report from fabricated results: what stands in it, what is compared, what a mistake gets."""

from __future__ import annotations

import html.parser
import json
import re

import fabricated_study
import numpy as np
import pytest

from robust_vit import errors, plots, report
from robust_vit.metrics import statistics
from robust_vit.report import __main__ as command
from robust_vit.report import build, comparisons, curves, results, runs, svg


class _Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, the ids, and whether tags are balanced."""

    void = frozenset(("meta", "link", "br", "img", "input", "hr"))

    def __init__(self, content: str):
        super().__init__()
        self.ids, self.links, self.fetched, self.text, self.open = [], [], [], [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        self._note(tag, dict(attributes))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._note(tag, dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def _note(self, tag, attributes):
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        elif tag in ("script", "iframe", "object", "embed", "img", "link", "video", "audio", "source"):
            self.fetched.append(attributes.get("src") or attributes.get("href") or tag)
        elif "href" in attributes or "xlink:href" in attributes:
            self.fetched.append(attributes.get("href") or attributes["xlink:href"])


def _parsed(page):
    content = page.read_text(encoding="utf-8")
    return content, _Page(content)


def test_the_page_needs_nothing_but_itself(page):
    content, parsed = _parsed(page)
    assert parsed.open == []
    assert all(target.startswith(("#", "data:")) for target in parsed.fetched)
    assert not re.search(r"@import|url\((?!#|'?data:)|src=", content)
    assert len(parsed.ids) == len(set(parsed.ids))
    for link in parsed.links:
        target = link[1:] if link.startswith("#") else None
        assert (target in parsed.ids) if target else (page.parent / link).is_file(), link
    references = set(re.findall(r"url\(#([^)]+)\)", content)) | {t[1:] for t in parsed.fetched if t.startswith("#")}
    assert references <= set(parsed.ids)


def test_what_is_in_the_page(page):
    content, parsed = _parsed(page)
    text = " ".join(" ".join(parsed.text).split())
    for expected in (
        "resnet and vit",
        "How often is a coin right?",
        "A coin sees <nothing>: raise",
        "vit. This coin is hardly better than chance.",
        "Second paragraph of the protocol.",
        "coins, 200 test images",
        "Differences, vit − resnet",
        "exact McNemar",
        "step 100",
    ):
        assert expected in text, expected
    assert "resnet. This coin" not in text
    assert "A fabricated &lt;study&gt;" in content
    assert "raise <code>flips</code>." in content
    assert "<nothing>" not in content.replace("&lt;nothing&gt;", "")
    assert 'name="viewport"' in content
    assert "prefers-color-scheme: dark" in content
    numbers = [int(number) for number in re.findall(r"<b>Figure (\d+)\.</b>", content)]
    assert numbers == list(range(1, len(numbers) + 1))
    numbers = [int(number) for number in re.findall(r"<b>Table (\d+)\.</b>", content)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_same_results_give_the_same_bytes(workdir, page):
    first, second = page.parent, workdir / "again"
    report.write([workdir], second)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) > 8
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_shown_numbers_are_those_of_the_records(workdir, page):
    content, _ = _parsed(page)
    for run in ("resnet", "vit"):
        records = results.read(results.folder(workdir / run, "coin", 100)).finding.records
        interval = statistics.proportion(int(records["correct"].sum()), 200)
        assert f"{interval.value:.1%} <span" in content
        assert f"[{interval.low * 100:.1f}, {interval.high * 100:.1f}]" in content


def test_card(page):
    card = json.loads((page.parent / "card.json").read_text())
    assert list(card["runs"]) == ["resnet", "vit"]
    entry = card["runs"]["vit"]["studies"]["coin"]
    assert entry["data"] == {"name": "coins", "fingerprint": "0123", "examples": 200}
    assert entry["settings"]["epsilons"] == [0.0, 0.5]
    assert entry["caveats"] == ["A coin sees <nothing>: raise `flips`.", "This coin is hardly better than chance."]
    assert entry["provenance"]["versions"] == {"jax": "0.10.2"}
    assert (page.parent / entry["result"] / results.RESULT).is_file()
    (comparison,) = card["comparisons"]
    assert (comparison["first"], comparison["second"], comparison["test"]) == ("resnet", "vit", "exact McNemar")
    assert comparison["p_value_holm"] == comparison["p_value"] < 1e-6


def test_tables_and_figures_beside_the_page(page):
    csv = (page.parent / "tables" / "coins.csv").read_text().splitlines()
    assert csv[0] == "run,accuracy,accuracy (low),accuracy (high),images"
    assert r"\toprule" in (page.parent / "tables" / "coins.tex").read_text()
    assert (page.parent / "tables" / "coin_comparisons.csv").read_text().count("\n") == 2
    assert (page.parent / "figures" / "coin_running_total.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in (page.parent / "figures" / "coin_running_total.svg").read_bytes()


def test_holm_is_over_the_whole_report(tmp_path):
    for index, rate in enumerate((0.75, 0.6, 0.68)):
        for label in ("coin", "other"):
            fabricated_study.write(tmp_path / f"run{index}", label=label, rate=rate, seed=index, examples=150)
    found = runs.find([tmp_path])
    by_label = {label: {run.name: run.results[label] for run in found} for label in runs.labels(found)}
    rows = comparisons.collect(by_label)
    assert [(row.first, row.second) for row in rows[:3]] == [("run0", "run1"), ("run0", "run2"), ("run1", "run2")]
    assert len(rows) == 6
    expected = statistics.holm([row.comparison.p_value for row in rows])
    np.testing.assert_array_equal([row.adjusted for row in rows], expected)
    smallest = min(row.comparison.p_value for row in rows)
    assert min(row.adjusted for row in rows) == pytest.approx(min(6 * smallest, 1))
    table = comparisons.table(rows, 6)
    assert "all 6 tests" in table.caption
    assert table.rows[1][:2] == ("accuracy", "run2 − run0")
    one_pair = comparisons.table(rows[:1], 6)
    assert (one_pair.title, one_pair.columns[1]) == ("Differences, run1 − run0", "difference")


def test_no_paired_test_over_other_images(tmp_path):
    fabricated_study.write(tmp_path / "one", data="aaaa")
    fabricated_study.write(tmp_path / "two", data="bbbb", seed=1)
    content = report.write([tmp_path], tmp_path / "report").read_text()
    assert "Judged on other images than one" in content
    assert "Differences" not in content


def test_other_settings_are_said(tmp_path):
    fabricated_study.write(tmp_path / "one")
    fabricated_study.write(tmp_path / "two", study=fabricated_study.Fabricated(epsilons=(1.0,)))
    content = report.write([tmp_path], tmp_path / "report").read_text()
    assert "Other settings than one: epsilons." in content


def test_skipped_study_says_why(tmp_path):
    fabricated_study.write(tmp_path / "one", skipped="it has no variables.")
    content = report.write([tmp_path], tmp_path / "report").read_text()
    assert "<b>one</b> was left out: it has no variables." in content
    assert "At a glance" not in content


def test_two_labels_of_one_study_keep_apart(tmp_path):
    fabricated_study.write(tmp_path / "one", label="coin", rate=0.9)
    fabricated_study.write(tmp_path / "one", label="fabricated", rate=0.1)
    table = build._glance((found := runs.find([tmp_path])), {k: {"one": v} for k, v in found[0].results.items()})
    assert table.columns == ("run", "accuracy (coin)", "accuracy")


def test_the_newest_step_is_shown(tmp_path):
    fabricated_study.write(tmp_path / "one", step=90)
    fabricated_study.write(tmp_path / "one", step=1000)
    (run,) = runs.find([tmp_path])
    assert run.results["coin"].step == 1000


def test_runs_may_come_from_anywhere_and_share_names(tmp_path):
    for workdir in ("a", "b"):
        fabricated_study.write(tmp_path / workdir / "vit")
    fabricated_study.write(tmp_path / "b" / "resnet")
    found = runs.find([tmp_path / "b", tmp_path / "a" / "vit", tmp_path / "b"])
    assert [run.name for run in found] == ["resnet", "b/vit", "a/vit"]
    found = runs.find([tmp_path / "b", ("mine", tmp_path / "b" / "vit"), tmp_path / "a" / "vit"])
    assert [run.name for run in found] == ["resnet", "mine", "vit"]
    found = runs.find([("mine", tmp_path / "a" / "vit"), tmp_path / "b" / "vit"])
    assert [run.name for run in found] == ["mine", "vit"]


def test_training_curves(workdir):
    found = runs.find([workdir])
    assert len(found[0].metrics) == 20  # The torn last line is left out.
    (loss, accuracy, rate) = curves.training(found).axes
    titles = [axis.get_title(loc="left") for axis in (loss, accuracy, rate)]
    assert titles == ["loss (nats)", "accuracy", "learning rate"]
    lines = {line.get_label(): line for line in loss.lines}
    assert set(lines) == {f"{run}, {split}" for run in ("resnet", "vit") for split in ("train", "validation")}
    np.testing.assert_allclose(lines["vit, train"].get_xydata()[0], (10, 2.3 * 0.98**10), atol=1e-4)
    assert lines["vit, train"].get_linestyle() == "-"
    assert lines["vit, validation"].get_linestyle() == "--"
    assert lines["vit, train"].get_color() == plots.color(1)


def test_seeds_are_judged_and_their_common_folder_is_not(tmp_path):
    fabricated_study.write_metrics(tmp_path / "vit")
    for seed in range(2):
        fabricated_study.write(tmp_path / f"vit.seed{seed}", seed=seed)
    content = report.write([tmp_path], tmp_path / "report").read_text()
    assert "<h1>vit.seed0 and vit.seed1</h1>" in content
    assert "vit, train" in content  # The training curve.


def test_metrics_of_replicas_are_averaged(tmp_path):
    fabricated_study.write(tmp_path / "one")
    (tmp_path / "one" / "metrics.jsonl").write_text('{"step": 5, "validation/accuracy": [0.5, 0.7]}\n')
    (axis,) = curves.training(runs.find([tmp_path])).axes
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [(5, 0.6)])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "examples.npz").write_bytes(b"PK\x03\x04torn"), "is damaged"),
        (lambda folder: (folder / "examples.npz").unlink(), "is missing"),
        (lambda folder: (folder / "result.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "result.json").write_text("[]"), "not a result"),
    ],
)
def test_damage_is_named(tmp_path, break_it, message):
    folder = fabricated_study.write(tmp_path / "one")
    break_it(folder)
    with pytest.raises(errors.UserError, match=message):
        report.write([tmp_path], tmp_path / "report")
    assert not (tmp_path / "report" / "index.html").exists()


def test_a_study_without_result_is_not_taken_for_finished(tmp_path):
    folder = fabricated_study.write(tmp_path / "one")
    fabricated_study.write(tmp_path / "two")
    (folder / "result.json").unlink()
    assert {run.name: list(run.results) for run in runs.find([tmp_path])} == {"two": ["coin"], "one": []}


def test_command(workdir, tmp_path, capsys, monkeypatch):
    assert command.main([str(workdir)]) == 0
    assert capsys.readouterr().out.strip() == str(workdir / "report" / "index.html")
    monkeypatch.chdir(tmp_path)
    assert command.main([f"old={workdir / 'vit'}", str(workdir / "resnet"), "--out", "both"]) == 0
    assert "old and resnet" in (tmp_path / "both" / "index.html").read_text()
    capsys.readouterr()
    for given, message in ((str(tmp_path / "no"), "there is no folder"), (str(tmp_path / "both"), "holds no results")):
        assert command.main([given]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_svg_identifiers_and_label():
    content = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg width="72pt" height="36pt" viewBox="0 0 72 36"><defs><path id="a"/></defs>'
        '<use xlink:href="#a" style="clip-path: url(#b)"/></svg>'
    )
    made = svg.inline(content, prefix="f1", label='a "b" <c>')
    assert made.startswith('<svg viewBox="0 0 72 36" style="width:96px;--natural:96px" role="img"')
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in made
    assert 'id="f1-a"' in made
    assert 'href="#f1-a"' in made
    assert "url(#f1-b)" in made


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (float("nan"), ""), (0.0004, "< 0.001"), (0.04999, "0.050"), (1.0, "1.000")]
)
def test_p_values(value, text):
    assert comparisons.p_text(value) == text
