"""Which patches the encoder sees.

A masking strategy scores every patch of every image; the patches with the lowest scores are kept,
in the order of their scores. To write your own, return scores from a function of the same arguments
and name it in the config: `config.masking.name = "my_fork.masks.spiral"`. More masks: masks.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.errors import UserError

KEYS = ("tokens_in_encoder",)  # of config.masking, which are no options of a mask function


class Mask(NamedTuple):
    """Which patches are kept, and how to undo the shuffle."""

    keep_BK: Array  # row-major index of each kept patch, in the order that the encoder sees them
    restore_BL: Array  # where patch l stands in [kept patches, hidden patches]; "ids_restore"
    mask_BL: Array  # 1 = hidden, 0 = kept


def num_kept(num_patches: int, ratio: float) -> int:
    """Return trunc(L * (1 - ratio)), in floats as the official code: L=100 at 0.8 keeps 19.

    Raises:
      UserError: the ratio keeps no patch, or hides none.
    """
    kept = int(num_patches * (1 - ratio))
    if not 0 < kept < num_patches:
        raise UserError(
            f"mask_ratio={ratio} keeps {kept} of {num_patches} patches; at least one must be kept"
            f" and one hidden: choose one above 0 and below {1 - 1 / num_patches:.4f}"
        )
    return kept


def keep_lowest(score_BL: Array, num: int) -> Mask:
    """Keep the `num` patches with the lowest scores of each image (ties: the earlier patch)."""
    shuffle_BL = jnp.argsort(score_BL, axis=1)
    restore_BL = jnp.argsort(shuffle_BL, axis=1)
    mask_BL = (restore_BL >= num).astype(jnp.float32)
    return Mask(shuffle_BL[:, :num], restore_BL, mask_BL)


def random(rng: Array, batch: int, grid: tuple[int, int], ratio: float) -> Array:
    """Return uniform noise: every patch is hidden independently of its place."""
    del ratio
    return jax.random.uniform(rng, (batch, math.prod(grid)))


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
