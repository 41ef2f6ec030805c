"""Position tables: fixed 2-D sine-cosine."""

import numpy as np


def _sincos_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """(len(positions), width): sines of all frequencies, then their cosines (not interleaved)."""
    omega = 10000.0 ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(width: int, grid: tuple[int, int]) -> np.ndarray:
    """The fixed position table of a (rows, columns) grid, with the cls token's row of zeros first.

    The first half of the width encodes the column, the second half the row: the official
    checkpoints depend on this order (facebookresearch/mae#18). Computed in float64.

    Returns:
      (1 + rows * columns, width) float32.
    Raises:
      ValueError: width is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    rows, cols = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    table_LD = np.concatenate(
        [_sincos_1d(width // 2, cols.ravel()), _sincos_1d(width // 2, rows.ravel())], axis=1
    )
    return np.concatenate([np.zeros((1, width)), table_LD]).astype(np.float32)
