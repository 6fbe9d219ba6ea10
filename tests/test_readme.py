"""The README is true: its Python runs as it stands, its commands name files that exist."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from robust_vit import settings

REPOSITORY = pathlib.Path(__file__).parents[1]
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# A block of Python, and what it prints where the README shows it right below.
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", TEXT, flags=re.DOTALL)
MOST_LINES = 12  # Of a curvature block, without blank ones.

# All in one process, each with names of its own: importing and compiling is most of their time.
DRIVER = """
import contextlib, io, json, sys
for block in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    print(json.dumps(printed.getvalue()), flush=True)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that the blocks ran in, what each of them printed up to the first that failed, and how that one failed."""
    folder = tmp_path_factory.mktemp("readme")
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Most of the time is compilation, and that it runs is what is asked.
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([code for code, _ in BLOCKS]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return folder, [json.loads(line) for line in done.stdout.splitlines()], done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_every_python_block_runs_and_prints_what_it_says(index, ran):
    folder, printed, failure = ran
    assert index < len(printed), failure
    code, expected = BLOCKS[index]
    assert printed[index].strip()
    if expected:
        agree(printed[index], expected)
    if "report_card" in code:
        report = folder / "runs" / "digits" / "report" / "index.html"
        assert str(report.relative_to(folder)) in printed[index]
        assert "not applicable" not in report.read_text(encoding="utf-8").lower()
    if "imsave" in code:
        assert (folder / "curvature.png").stat().st_size


def agree(found, expected):
    """The same words, and numbers within 1 % or 0.02: their last digits are the machine's. A bar is as long as its number."""
    pairs = zip(*(re.findall(r"-?\d+(?:\.\d*)?|[^\W\d]+", text) for text in (found, expected)), strict=True)
    for one, other in pairs:
        if one[-1].isalpha():
            assert one == other, found
        else:
            assert float(one) == pytest.approx(float(other), rel=0.01, abs=0.02), found


def test_curvature_takes_a_dozen_lines_and_shows_what_comes_out():
    shown = [(code, expected) for code, expected in BLOCKS if expected]
    assert [next(name for name in ("density(", "input_hessian(", "lanczos(") if name in code) for code, _ in shown] == [
        "lanczos(",
        "density(",
        "input_hessian(",
    ]
    for code, _ in shown:
        assert sum(bool(line.strip()) for line in code.splitlines()) <= MOST_LINES, code
        assert "configs" not in code
    values, curve, _ = (expected for _, expected in shown)
    assert len(re.findall(r"\d\.\d+", values)) == 10
    assert len(curve.splitlines()) > 8


def test_every_file_that_it_names_exists():
    for name in re.findall(r"`((?:configs|launch|tests|robust_vit)/[\w/]+\.\w+)", TEXT):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"--config=(configs/\w+\.py)", TEXT):
        assert (REPOSITORY / name).exists(), name


def test_every_key_that_it_names_exists():
    config = settings.default()
    with config.unlocked():
        config.studies.attack_curve = settings.study("attack_curve")
    keys = re.findall(r"--config\.([a-z_.]+)=", TEXT)
    assert keys
    for key in keys:
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]
