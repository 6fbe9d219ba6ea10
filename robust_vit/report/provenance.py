"""What a result owes to its circumstances: versions, hardware, time. Kept apart, so that results stay comparable."""

from __future__ import annotations

import datetime
import functools
import os
import pathlib
import platform
from importlib import metadata
from typing import Any

import jax

import robust_vit

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matplotlib")


def collect() -> dict[str, Any]:
    """Versions, hardware and the present time (UTC), as plain JSON."""
    return {
        "versions": versions(),
        "hardware": hardware(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, this library and what it computes with."""
    found = {"python": platform.python_version(), "robust_vit": robust_vit.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """Devices as JAX names them, processes and cores."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": devices[0].platform,
        "processes": jax.process_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
