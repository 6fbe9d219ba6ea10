"""The benchmark of the sweep runs, and counts one compilation."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_the_sweep_compiles_once():
    command = [sys.executable, str(FOLDER / "representation_sweep.py"), "--tiny", "--images=2", "--directions=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| ViT-tiny")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["2 x 5 x 21", "1", "210 (336)"]
