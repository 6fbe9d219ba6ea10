"""Configurations of a file, for benchmarks that train."""

from __future__ import annotations

import importlib.util
import pathlib

import ml_collections


def load(path: pathlib.Path | str, argument: str = "") -> ml_collections.ConfigDict:
    """What `get_config(argument)` of the file gives."""
    specification = importlib.util.spec_from_file_location("configuration", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.get_config(argument)
