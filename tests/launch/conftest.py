"""The machine on which the launchers are tried."""

from __future__ import annotations

import machines
import pytest


@pytest.fixture
def machine(tmp_path) -> machines.Machine:
    """A machine on which no cloud can be reached: their programs only note the call and fail."""
    found = machines.Machine(tmp_path)
    for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "scancel", "squeue", "curl"):
        found.program(name, "exit 99")
    return found
