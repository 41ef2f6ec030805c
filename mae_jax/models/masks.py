"""Masks with structure: those of the paper's Table 1f, and since. For the contract of masking.py.

Options beyond the four arguments are keyword-only; a config gives them beside the name, as in
`config.masking.cell = 4`.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.errors import UserError
from mae_jax.models.masking import num_kept


def block(rng: Array, batch: int, grid: tuple[int, int], ratio: float) -> Array:
    """Hide large blocks, as BEiT does and as the paper's Table 1f compares with.

    Rectangles (area uniform between 16 patches and the number to hide, log-uniform aspect
    0.3 .. 1/0.3) are laid one after another; what the earlier ones cover is hidden first, so that
    exactly as many patches are hidden as with `random`. The official sampling was never published.
    """
    rows, cols = grid
    num_hidden = rows * cols - num_kept(rows * cols, ratio)
    draws = 32  # by then nearly every patch is covered; those that are not come after, at random
    area_rng, aspect_rng, top_rng, left_rng, tie_rng = jax.random.split(rng, 5)
    shape = (batch, draws)
    smallest = min(16, num_hidden)
    area = jax.random.uniform(
        area_rng, shape, minval=smallest, maxval=max(num_hidden, smallest + 1)
    )
    bound = math.log(1 / 0.3)
    aspect = jnp.exp(jax.random.uniform(aspect_rng, shape, minval=-bound, maxval=bound))
    height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
    width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, cols)
    top = jnp.floor(jax.random.uniform(top_rng, shape) * (rows - height + 1))
    left = jnp.floor(jax.random.uniform(left_rng, shape) * (cols - width + 1))

    row = jnp.arange(rows)[:, None]
    col = jnp.arange(cols)[None, :]
    top, left, height, width = (x[..., None, None] for x in (top, left, height, width))
    inside = (row >= top) & (row < top + height) & (col >= left) & (col < left + width)
    first = jnp.where(inside.any(1), inside.argmax(1), draws).reshape(batch, rows * cols)
    return -first.astype(jnp.float32) + jax.random.uniform(tie_rng, (batch, rows * cols))


def grid(rng: Array, batch: int, grid: tuple[int, int], ratio: float) -> Array:
    """Keep one patch of every 2 x 2, always the same one (Table 1f); in random order.

    Raises:
      UserError: the ratio is not 0.75, or the grid has an odd side.
    """
    rows, cols = grid
    if ratio != 0.75 or rows % 2 or cols % 2:
        raise UserError(
            f"masking 'grid' keeps one patch of every 2 x 2: mask_ratio must be 0.75, not {ratio},"
            f" and both sides of the patch grid even (it is {rows} x {cols})"
        )
    hidden = (jnp.arange(rows)[:, None] % 2 > 0) | (jnp.arange(cols)[None, :] % 2 > 0)
    noise_BL = jax.random.uniform(rng, (batch, rows * cols))
    return noise_BL + hidden.reshape(-1).astype(jnp.float32)


def granular(
    rng: Array, batch: int, grid: tuple[int, int], ratio: float, *, cell: int = 2
) -> Array:
    """Keep or hide cells of `cell` x `cell` patches as a whole (Pixio, arXiv 2512.15715).

    Their ablations have cells of 2, their model for web images cells of 4, at 256 pixels. Where the
    kept patches are no whole number of cells, as 49 with cells of 4 patches, the upper patches of
    one cell are kept. A cell of 1 is `random`.

    Raises:
      UserError: cells do not divide the grid.
    """
    del ratio
    rows, cols = grid
    if cell < 1 or rows % cell or cols % cell:
        sizes = [n for n in range(1, min(grid) + 1) if rows % n == 0 and cols % n == 0]
        raise UserError(
            f"masking.cell={cell} does not divide the grid of {rows} x {cols} patches: give one of"
            f" {', '.join(map(str, sizes))}, or another image size"
        )
    score = jax.random.uniform(rng, (batch, rows // cell * (cols // cell)))
    score = score.reshape(batch, rows // cell, cols // cell)
    return score.repeat(cell, 1).repeat(cell, 2).reshape(batch, rows * cols)


def green(
    rng: Array,
    batch: int,
    grid: tuple[int, int],
    ratio: float,
    *,
    sigma_fine: float = 0.5,
    sigma_coarse: float = 2.0,
) -> Array:
    """Hide where noise of a middle frequency is high: "green" (ColorMAE, arXiv 2407.13036).

    White noise blurred by a Gaussian, minus the same noise blurred by a wider one. The paper has
    the widths in its supplement, which we have not seen: these two, in patches, are our choice.

    Raises:
      UserError: the first width is not the smaller one.
    """
    del ratio
    if not 0 < sigma_fine < sigma_coarse:
        raise UserError(
            f"masking.sigma_fine={sigma_fine} must be above 0 and below"
            f" masking.sigma_coarse={sigma_coarse}"
        )
    margin = math.ceil(3 * sigma_coarse)
    white = jax.random.normal(rng, (batch, *(side + 2 * margin for side in grid)))
    fine, coarse = (_blur(white, grid, sigma) for sigma in (sigma_fine, sigma_coarse))
    return (fine - coarse).reshape(batch, math.prod(grid))


def _blur(noise: Array, grid: tuple[int, int], sigma: float) -> Array:
    """Return the middle of an image, of `grid` pixels, blurred by a Gaussian."""

    def weights(side: int, size: int) -> Array:
        centre = jnp.arange(side)[:, None] + (size - side) // 2
        weight = jnp.exp(-(((jnp.arange(size) - centre) / sigma) ** 2) / 2)
        return weight / weight.sum(1, keepdims=True)

    down, across = map(weights, grid, noise.shape[1:])
    return jnp.einsum("ri,bij,cj->brc", down, noise, across, precision="highest")


def inverse_block(
    rng: Array, batch: int, grid: tuple[int, int], ratio: float, *, roll: bool = True
) -> Array:
    """Keep one block, and hide all around it (CAPI, arXiv 2502.08769; data2vec 2.0 has the idea).

    The block is a rectangle of log-uniform aspect 1/2 .. 2, as far as that fits, at a uniform
    place; the patches that are too many are left out of its last rows.

    Args:
      roll: the block wraps around the edges of the grid.
    """
    rows, cols = grid
    kept = num_kept(rows * cols, ratio)
    aspect_rng, top_rng, left_rng = jax.random.split(rng, 3)
    aspect = jnp.exp2(jax.random.uniform(aspect_rng, (batch,), minval=-1.0, maxval=1.0))
    height = jnp.clip(jnp.ceil(jnp.sqrt(kept * aspect)).astype(int), -(-kept // cols), rows)
    width = -(-kept // height)
    places_down = rows if roll else rows - height + 1
    places_across = cols if roll else cols - width + 1
    top = jax.random.randint(top_rng, (batch,), 0, places_down)
    left = jax.random.randint(left_rng, (batch,), 0, places_across)

    top, left, height, width = (x[:, None, None] for x in (top, left, height, width))
    row = (jnp.arange(rows)[:, None] - top) % rows  # within the block, from its corner
    col = (jnp.arange(cols)[None, :] - left) % cols
    visible = (row < height) & (col < width) & (row * width + col < kept)
    return 1.0 - visible.reshape(batch, rows * cols)
