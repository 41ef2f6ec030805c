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
    """The patches that are kept, and the order that undoes the shuffle."""

    keep_BK: Array  # row-major index of each kept patch, in the order that the encoder sees them
    restore_BL: Array  # where patch l stands in [kept patches, hidden patches]; "ids_restore"
    mask_BL: Array  # 1 = hidden, 0 = kept


def num_kept(num_patches: int, ratio: float) -> int:
    """Return trunc(L * (1 - ratio)), in floats as the official code: L=100 at 0.8 keeps 19.

    Raises:
      UserError: the ratio keeps no patch, or hides none.
    """
    kept = int(num_patches * (1 - ratio)) if 0 < ratio < 1 else 0
    if not 0 < kept < num_patches:
        raise UserError(
            f"mask_ratio={ratio} keeps {kept} of {num_patches} patches; at least one must be kept"
            f" and one hidden: choose one above 0, and at most {1 - 1 / num_patches:.4f}"
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
