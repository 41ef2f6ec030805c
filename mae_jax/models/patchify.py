"""Images to patches and back."""

from einops import rearrange
from jax import Array


def patchify(images_BHWC: Array, patch_size: tuple[int, int]) -> Array:
    """Cut images into patches, row-major; inside a patch the order is (row, column, channel).

    Returns (B, L, P) with L = (H / rows) * (W / columns) and P = rows * columns * C.
    """
    rows, cols = patch_size
    return rearrange(images_BHWC, "b (h r) (w c) ch -> b (h w) (r c ch)", r=rows, c=cols)


def unpatchify(patches_BLP: Array, patch_size: tuple[int, int], grid: tuple[int, int]) -> Array:
    """The exact inverse of `patchify`, for a grid of (rows, columns) of patches."""
    rows, cols = patch_size
    return rearrange(
        patches_BLP,
        "b (h w) (r c ch) -> b (h r) (w c) ch",
        h=grid[0],
        w=grid[1],
        r=rows,
        c=cols,
    )
