"""Tests under 8 virtual devices, which a process has to be born with: `tests/test_sharding.py` starts it."""

from __future__ import annotations

import os

if os.environ.get("JAX_NUM_CPU_DEVICES") != "8":
    collect_ignore_glob = ["*"]
