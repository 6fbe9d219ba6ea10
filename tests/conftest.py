"""What every test shares: strict JAX, the real data where it is, no network."""

from __future__ import annotations

import os
import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Files of minutes: they start first, so that no worker is left alone with one at the end.
LONGEST = (
    "test_main.py",
    "test_planning.py",
    "test_train.py",
    "test_readme.py",
)

# Files that verify one attack or study in depth: `-m slow` runs them, and so does CI. What holds of every attack and
# study is in the default run (`test_attack_properties.py`, `test_studies_registry.py`).
IN_DEPTH = (
    "test_attack_adam.py",
    "test_attack_apgd.py",
    "test_attack_carlini_wagner.py",
    "test_attack_channel.py",
    "test_attack_checks.py",
    "test_attack_curve.py",
    "test_attack_detectors.py",
    "test_attack_estimation.py",
    "test_attack_expectation.py",
    "test_attack_gradient.py",
    "test_attack_hop_skip_jump.py",
    "test_attack_hyperplanes.py",
    "test_attack_jpeg.py",
    "test_attack_minimal.py",
    "test_attack_patch.py",
    "test_attack_patch_fool.py",
    "test_attack_planting.py",
    "test_attack_progression.py",
    "test_attack_smoothing.py",
    "test_attack_spatial.py",
    "test_attack_square.py",
    "test_attack_stickers.py",
    "test_attack_suites.py",
    "test_attack_travel.py",
    "test_attack_universal.py",
    "test_attack_warps.py",
    "test_auto_attack_study.py",
    "test_boundary_travel.py",
    "test_certificate_study.py",
    "test_curvature_per_example.py",
    "test_curvature_sharpness.py",
    "test_hessian_density_study.py",
    "test_hessian_spectrum.py",
    "test_input_curvature_study.py",
    "test_loss_landscape_study.py",
    "test_physical_studies.py",
    "test_representation_curvature_study.py",
    "test_sharding_attack_studies.py",
    "test_sharding_attacks.py",
    "test_sharding_curvature.py",
    "test_sharding_landscapes.py",
    "test_sharpness_study.py",
    "test_spatial_attack_study.py",
)


# A process may have 65,530 maps of memory, of which a compiled program takes a dozen: beyond them it crashes.
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 30_000


# Rooms whose default tests ask what is computed, not to which byte: compiled without most of XLA's optimisations, which is a
# third of their time. `-m slow` and `-m parity` compile all as users do.
PLAIN = ("corruptions", "curvature", "data", "metrics", "models", "objectives", "report", "studies", "training")


def pytest_runtest_setup(item):
    """Sets how the test and its fixtures are compiled."""
    in_depth = item.get_closest_marker("slow") or item.get_closest_marker("parity")
    jax.config.update("jax_disable_most_optimizations", item.path.parent.name in PLAIN and not in_depth)


def pytest_runtest_teardown():
    """Gives up what is compiled before it is too much for the process."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


def pytest_itemcollected(item):
    """Marks what is left to `-m slow`."""
    if item.path.name in IN_DEPTH:
        item.add_marker(pytest.mark.slow)


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
