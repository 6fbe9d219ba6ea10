"""The memory that a CPU backend computes in: kept between calls instead of handed back to the system."""

from __future__ import annotations

import ctypes
import os
import sys

# Options of glibc's mallopt(3) with the values set, and the environment variables by which a user sets them: one arena for
# all threads (their own ones give memory back whatever the rest says), nothing mapped for one allocation alone, a heap that
# never shrinks.
_OPTIONS = {"MALLOC_ARENA_MAX": (-8, 1), "MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, so that the next call of a compiled program uses it again.

    XLA on a CPU allocates the temporary memory of a program in each call, gigabytes for a large batch. glibc hands it back to the
    system after the call, and the kernel clears it page by page in the next: a third of a gradient's time (measured:
    tests/benchmarks/results/throughput_cpu.md). The process then holds the most memory that it ever used at a time,
    and holes in it: 0 to 80 % more (a gradient of ViT-Ti/16 on 64 images: 3.0 -> 5.3 GB, its parameters' 3.8 -> 3.7). No number
    that is computed changes. Call it first: threads that have allocated already keep their arenas.

    Returns:
      Whether it was done: not where the C library is not glibc, nor where the user's environment sets one of the options
      (`MALLOC_ARENA_MAX`, `MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`).
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OPTIONS):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all([library.mallopt(*option) == 1 for option in _OPTIONS.values()])
