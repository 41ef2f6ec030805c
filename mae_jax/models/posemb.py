"""Position tables: fixed 2-D sine-cosine."""

import numpy as np


def sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
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
    """
    rows, cols = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    table_LD = np.concatenate(
        [sincos_1d(width // 2, cols.ravel()), sincos_1d(width // 2, rows.ravel())], axis=1
    )
    return np.concatenate([np.zeros((cls_tokens, width)), table_LD]).astype(np.float32)
