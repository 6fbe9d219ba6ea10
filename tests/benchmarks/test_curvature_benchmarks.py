"""The benchmarks of curvature run from the command line at tiny size and print whole tables; torch's side is made up."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent
LIMIT = 600  # Seconds, after which a process is killed.

# Answers each request of `curvature.py` with numbers of the right shape.
PEER = """#!{python}
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    count = len(request.get("vectors", range(request.get("count", 0))))
    answers = {{
        "version": {{"torch": "none", "threads": 1}},
        "build": {{"loss": request.get("seed", -1)}},
        "eigenvalues": {{
            "values": [5.0, 4.0, 3.0, -2.0, 1.0],
            "residuals": [0.1] * 5,
            "products": request.get("products"),
            "seconds": 1.0 if request.get("rule") == "residual" else 2.0,
        }},
        "lanczos": {{"values": [5.0, 4.0, 3.0, -2.0, 1.0], "residuals": [0.0] * 5}},
        "quadratic_forms": {{"values": [1.0 + number for number in range(count)]}},
        "signs": {{"values": [8.0, 2.0, 5.0, 5.001, 9.0, 1.0][:count]}},
    }}
    print(json.dumps(answers[request["do"]]), flush=True)
"""


def printed(tmp_path, script, *options, devices=1):
    environment = {
        **os.environ,
        "PYTHONPATH": str(FOLDER.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # That it runs is what is asked.
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, str(FOLDER / script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(text):
    """The cells of each row of the Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[1:]]


@pytest.fixture
def peer(tmp_path):
    path = tmp_path / "peer"
    path.write_text(PEER.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    return f"--peer_python={path}"


@pytest.mark.slow
@pytest.mark.parametrize("table", ["exact", "time", "trace"])
def test_beside_a_peer(table, tmp_path, data_dir, peer):
    options = {
        "exact": ("--rank=10", "--probes=3"),
        "time": ("--rank=10", "--rounds=1", "--rule=residual", "--products=77"),
        "trace": ("--signs=6", "--samples=6"),
    }
    common = (peer, "--model=resnet", "--images=4", "--seed=3", f"--data={data_dir}")
    text = printed(tmp_path, "curvature.py", table, *common, *options[table])
    assert "torch's 3.000000" in text  # The seed went to the peer.
    if table == "exact":
        found = rows(text)
        assert [row[0] for row in found] == ["1", "2", "3", "4", "5"]
        assert all(len(row) == 9 for row in found)
        assert "Trace over the same 3 vectors of signs: float64 2.000000" in text
    elif table == "time":
        (row,) = rows(text)
        assert (row[4], row[5], row[7]) == ("1.0", "77", "5 of 5")
        assert float(row[3]) < 1  # A true residual, measured.
    else:
        # The means are 8, 5, 5: the third vector changes them by nothing.
        assert "PyHessian's rule stops after 3 vectors" in text
        assert re.search(r"Of 1000 orders of these vectors \d+ stop, after", text)
        assert json.loads(re.search(r"Trace: (-?[\d.]+) by", text)[1]) > -1e9


@pytest.mark.slow
def test_what_a_product_costs(tmp_path):
    found = rows(printed(tmp_path, "curvature_cost.py", "--size=Ti", "--depth=1", "--side=32", "--batch=2"))
    cost = {row[0]: float(row[2]) for row in found}
    assert len(found) == 9
    assert cost["gradient"] == 1
    # 8/3 of a gradient, 2 with the batch's part kept.
    assert 2.4 < cost["Hessian"] < 3.3
    assert cost["Hessian, linearised"] < 2.4
    assert cost["Gauss-Newton"] < cost["Hessian"]


@pytest.mark.slow
def test_two_stopping_rules(tmp_path):
    found = rows(printed(tmp_path, "stopping_rules.py", "--starts=2"))
    assert len(found) == 12
    residuals = {(row[0], row[1]): float(row[3]) for row in found}
    for top in ("1 and 0.9", "1 and -0.999", "1 and -1.02"):
        assert residuals[top, "residual, Lanczos"] < 1e-3 < residuals[top, "PyHessian's"]


@pytest.mark.slow
def test_what_is_sent(tmp_path):
    found = rows(printed(tmp_path, "curvature_traffic.py", devices=2))
    assert [row[0].split(",")[0] for row in found] == ["data", "fsdp"]
    assert "all-reduce" in found[0][1]
    assert "all-gather" in found[1][1]
