"""What every test shares: strict JAX, the real data where it is, no network."""

from __future__ import annotations

import os
import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Files of minutes: they start first, so that no worker is left alone with one at the end.
LONGEST = (
    "test_sharding.py",
    "test_processes.py",
    "test_main.py",
    "test_planning.py",
    "test_train.py",
    "test_readme.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first; otherwise as collected."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """A program that two tests compile is compiled once; nothing outlives the session."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compilation")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real images and weights: `ROBUST_VIT_DATA`, or `shared/data` beside the checkout."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("ROBUST_VIT_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set ROBUST_VIT_DATA")
    return path
