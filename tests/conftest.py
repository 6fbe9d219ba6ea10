"""What every test shares: strict JAX, the real data where it is, no network."""

from __future__ import annotations

import os
import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real images and weights: `ROBUST_VIT_DATA`, or `shared/data` beside the checkout."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("ROBUST_VIT_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set ROBUST_VIT_DATA")
    return path
