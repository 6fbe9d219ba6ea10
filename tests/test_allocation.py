"""Keeping freed memory: counted in pages that the kernel hands out, not in time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

from robust_vit import allocation

# Gradients whose temporary memory is tens of megabytes. The heap grows in the first calls, and settles.
SCRIPT = """
import resource, sys
from robust_vit import allocation
kept = sys.argv[1] == "keep" and allocation.keep_freed_memory()
import jax, jax.numpy as jnp
x = jnp.full((3000, 20), 1e-3)
f = jax.jit(jax.grad(lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ x.T) @ x) @ x.T)))
counts = []
for _ in range(20):
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(f(x))
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages)
print(kept, sorted(counts)[10])
"""


def _run(word: str) -> tuple[str, int]:
    """Whether it says that memory is kept, and the pages handed out in the middle one of twenty calls."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, word],
        env={**inherited, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    kept, pages = found.stdout.split()
    return kept, int(pages)


def test_a_program_finds_the_memory_of_its_last_call():
    kept, pages = _run("keep")
    plain, handed_out = _run("leave")
    on_glibc = platform.libc_ver()[0] == "glibc"
    assert (kept, plain) == (str(on_glibc), "False")
    if on_glibc:
        assert handed_out > 5000
        assert pages < handed_out / 20


def test_what_the_user_sets_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not allocation.keep_freed_memory()
