"""Random draws that are pure functions of (seed, purpose, epoch, row): a vectorised Philox4x64-10 in NumPy.

A counter-based generator has no state to advance, so the draws of one example do not depend on which examples came
before it, on the process that reads it, or on where a run was resumed.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from jaxtyping import Float, Int, UInt64

from robust_vit import errors

_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: UInt64[np.ndarray, " 4 *shape"], key: UInt64[np.ndarray, " 2 *shape"]) -> np.ndarray:
    """Philox4x64-10 blocks `[4, *shape]`: four random words for each counter and key.

    Equals `numpy.random.Philox(key=key, counter=counter - 1).random_raw(4)` for every column: NumPy counts up before it
    draws. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.

    Args:
      counter: four words a block.
      key: two words a block, broadcast against the counter.
    """
    with np.errstate(over="ignore"):  # Modular arithmetic: the overflow is the point.
        word0, word1, word2, word3 = (np.asarray(word, np.uint64) for word in counter)
        key0, key1 = (np.asarray(word, np.uint64) for word in key)
        for round_index in range(_ROUNDS):
            if round_index:
                key0, key1 = key0 + _WEYL[0], key1 + _WEYL[1]
            high0, low0 = _multiply(_MULTIPLIERS[0], word0)
            high1, low1 = _multiply(_MULTIPLIERS[1], word2)
            word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
    return np.stack(np.broadcast_arrays(word0, word1, word2, word3))


def words(rows: Int[np.ndarray, " rows"], *, seed: int, purpose: str, epochs: np.ndarray | int = 0, count: int = 1):
    """Random words `uint64 [rows, count]`, a pure function of (seed, purpose, epoch, row) and of the column.

    Args:
      rows: identity of each example.
      seed: non-negative.
      purpose: what the draw is for; different purposes are independent.
      epochs: the epoch of each row, or one for all.
      count: words a row.
    """
    if seed < 0:
        raise errors.UserError(f"seed is {seed}: expected a non-negative integer.")
    rows = np.asarray(rows, np.uint64)
    blocks = -(-count // 4)
    counter = np.zeros((4, len(rows), blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = rows[:, None]
    counter[2] = np.broadcast_to(np.asarray(epochs, np.uint64), rows.shape)[:, None]
    key = np.asarray([seed, _purpose_word(purpose)], np.uint64).reshape(2, 1, 1)
    block = philox(counter, key)  # [4, rows, blocks]
    return np.moveaxis(block, 0, -1).reshape(len(rows), 4 * blocks)[:, :count]


def uniforms(rows: Int[np.ndarray, " rows"], **options) -> Float[np.ndarray, "rows count"]:
    """Uniform draws float64 `[rows, count]` in [0, 1); options as in `words`."""
    return (words(rows, **options) >> np.uint64(11)) * 2.0**-53


def permutation(rows: Int[np.ndarray, " rows"], *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: positions into `rows`, sorted by a draw of each row.

    Sorting draws, rather than shuffling, keeps the order independent of the NumPy version; the order of a subset is the
    order of the whole with the others left out.
    """
    return np.argsort(words(rows, seed=seed, purpose="order", epochs=epoch)[:, 0], kind="stable")


def bits(*, seed: int, purpose: str, row: int, count: int) -> np.ndarray:
    """Many random words `uint64 [count]` for one row, from NumPy's own (compiled) Philox: whole noise fields."""
    generator = np.random.Philox(key=[seed, _purpose_word(purpose)], counter=[0, row, 0, 1])
    return generator.random_raw(count)


@functools.cache
def _purpose_word(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def _multiply(constant: np.uint64, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low words of a 128-bit product, by 32-bit halves."""
    constant_low, constant_high = constant & _LOW, constant >> _HALF
    word_low, word_high = word & _LOW, word >> _HALF
    low = constant_low * word_low
    middle = constant_high * word_low + (low >> _HALF)
    cross = constant_low * word_high + (middle & _LOW)
    high = constant_high * word_high + (middle >> _HALF) + (cross >> _HALF)
    return high, constant * word
