"""Position tables: fixed 2-D sine-cosine."""

import numpy as np

from mae_jax.errors import UserError


def _sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """Return (len(positions), width): the sines of all frequencies, then their cosines."""
    omega = 10000.0 ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(width: int, grid: tuple[int, int], cls_tokens: int = 1) -> np.ndarray:
    """Return the fixed position table of a (rows, columns) grid; the first rows, of cls, are zeros.

    The first half of the width encodes the column, the second half the row: the official
    checkpoints depend on this order (facebookresearch/mae#18). Computed in float64.

    Returns:
      (cls_tokens + rows * columns, width) float32.
    Raises:
      UserError: width is not divisible by 4.
    """
    if width % 4:
        raise UserError(f"sine-cosine positions need a width divisible by 4, not {width}")
    rows, cols = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    table_LD = np.concatenate(
        [_sincos_1d(width // 2, cols.ravel()), _sincos_1d(width // 2, rows.ravel())], axis=1
    )
    return np.concatenate([np.zeros((cls_tokens, width)), table_LD]).astype(np.float32)


def sincos_table(
    width: int, grid: tuple[int, int], cls_tokens: int = 1, groups: int = 1
) -> np.ndarray:
    """Return the fixed position table, for several channel groups as for one.

    With several the last quarter of the width encodes the group (arXiv 2207.08051).

    Returns:
      (cls_tokens + groups * rows * columns, width) float32.
    """
    if groups == 1:
        return sincos_2d(width, grid, cls_tokens)
    quarter = max(width // 16 * 4, 4)
    place_LD = np.tile(sincos_2d(width - quarter, grid, 0), (groups, 1))
    group_LD = np.repeat(_sincos_1d(quarter, np.arange(groups)), len(place_LD) // groups, axis=0)
    table_LD = np.concatenate([place_LD, group_LD], axis=1)
    return np.concatenate([np.zeros((cls_tokens, width)), table_LD]).astype(np.float32)
