"""The README is true: its Python runs as it stands, its commands name files that exist."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from robust_vit import settings

REPOSITORY = pathlib.Path(__file__).parents[1]
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_every_python_block_runs(index, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Most of the time is compilation, and that it runs is what is asked.
    }
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[index]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    if "report_card" in BLOCKS[index]:
        report = tmp_path / "runs" / "digits" / "report" / "index.html"
        assert str(report.relative_to(tmp_path)) in done.stdout
        assert "not applicable" not in report.read_text(encoding="utf-8").lower()


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
