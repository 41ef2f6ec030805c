"""Position tables: fixed 2-D sine-cosine, and the resizing of a table to another grid."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

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


def resize(
    table_1ND: Array,
    old: tuple[int, int],
    new: tuple[int, int],
    cls_tokens: int = 1,
    antialias: bool = False,
    groups: int = 1,
) -> Array:
    """Resize a position table to another (rows, columns) grid; rows of class tokens stay.

    The table holds the rows of each channel group, one after the other.

    Bicubic as PyTorch does it, which the official code uses: a = -0.75, edges clamped, corners not
    aligned. DINOv2 with registers and timm resize with antialiasing, with which PyTorch takes
    a = -0.5; others do not.

    Raises:
      UserError: the table is not one of the old grid.
    """
    rows = cls_tokens + groups * old[0] * old[1]
    if table_1ND.shape[1] != rows:
        raise UserError(
            f"a position table of {table_1ND.shape[1]} rows is not one of a grid of {old[0]} x"
            f" {old[1]} patches and {cls_tokens} cls token(s), which has {rows}"
        )
    if old == new:
        return table_1ND
    h, w = old
    image_GHWD = rearrange(table_1ND[0, cls_tokens:], "(g h w) d -> g h w d", h=h, w=w)
    shape = (len(image_GHWD), *new, table_1ND.shape[-1])
    method = "cubic" if antialias else "cubic-pytorch"
    image_GHWD = jax.image.resize(image_GHWD, shape, method, antialias=antialias)
    patches_1LD = rearrange(image_GHWD, "g h w d -> 1 (g h w) d")
    return jnp.concatenate([table_1ND[:, :cls_tokens], patches_1LD], axis=1)
