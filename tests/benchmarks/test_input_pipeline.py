"""The benchmark of the input pipeline runs, so that it cannot rot: made images, one turn, no peer."""

from __future__ import annotations

import pathlib
import subprocess
import sys


def test_the_benchmark_runs_at_tiny_size(tmp_path):
    script = pathlib.Path(__file__).with_name("input_pipeline.py")
    output = tmp_path / "table.md"
    done = subprocess.run(
        ["timeout", "-s", "KILL", "120", sys.executable, str(script), "--tiny", f"--output={output}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == 3 + 5 + 3 + 10  # Three heads, pipelines, ways to the device, augmentations.
    assert all(line.split("|")[2].strip() not in ("", "-") for line in rows)
