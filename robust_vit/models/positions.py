"""Position embeddings: fixed tables, indices of relative offsets, and resizing to another grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("learned", "sincos1d", "sincos2d", "relative", "none")
_TEMPERATURE = 10_000.0


def sincos1d(tokens: int, width: int) -> np.ndarray:
    """Sine-cosine table `[tokens, width]`: sines in the first half, cosines in the second, of position / 10000^(i / (width/2)).

    The functions of Vaswani et al. 2017 (arXiv 1706.03762, section 3.5), which interleaves the two halves. `width` is even.
    """
    frequencies = _TEMPERATURE ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(tokens)[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Sine-cosine table `[rows * columns, width]`: one half of the width tells the row, the other the column.

    As Chen et al. 2021 (MoCo v3, arXiv 2104.02057). `width` is a multiple of 4.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    half = sincos1d(max(grid), width // 2)
    return np.concatenate([half[rows], half[columns]], axis=1)


def relative_offsets(grid: tuple[int, int], *, class_token: bool) -> tuple[np.ndarray, int]:
    """For each pair of tokens, the row of a bias table that its offset reads (Liu et al. 2021, Swin, arXiv 2103.14030).

    Returns:
      index: int32 `[tokens, tokens]`. With a class token three more rows serve, as in BEiT (Bao et al. 2021, arXiv
        2106.08254): class to patch, patch to class, class to class.
      length: rows of the table, `(2 rows - 1)(2 columns - 1)`, and 3 more with a class token.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    down = rows[:, None] - rows[None, :] + grid[0] - 1
    right = columns[:, None] - columns[None, :] + grid[1] - 1
    index = down * (2 * grid[1] - 1) + right
    length = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    if class_token:
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0, 1:], index[1:, 0], index[0, 0] = length, length + 1, length + 2
        length += 3
    return index.astype(np.int32), length


def resize_table(
    table: Float[Array, "tokens width"], *, old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "resized width"]:
    """A learned table on another grid, by bilinear interpolation; rows before the grid's (a class token) are kept.

    Args:
      table: `[extra + old rows * old columns, width]`.
      old: rows and columns that it was learned on.
      new: rows and columns that are wanted.
    """
    extra = table.shape[0] - old[0] * old[1]
    patches = table[extra:].reshape(*old, -1)
    patches = jax.image.resize(patches, (*new, patches.shape[-1]), "bilinear", antialias=False)
    return jnp.concatenate([table[:extra], patches.reshape(new[0] * new[1], -1)])


def resize_relative(
    table: Float[Array, "offsets heads"], *, old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "resized heads"]:
    """A relative bias table on another grid, by bilinear interpolation over offsets; rows after the offsets' are kept."""
    old_offsets, new_offsets = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old, new))
    count = old_offsets[0] * old_offsets[1]
    offsets = table[:count].reshape(*old_offsets, -1)
    offsets = jax.image.resize(offsets, (*new_offsets, offsets.shape[-1]), "bilinear", antialias=False)
    return jnp.concatenate([offsets.reshape(new_offsets[0] * new_offsets[1], -1), table[count:]])
