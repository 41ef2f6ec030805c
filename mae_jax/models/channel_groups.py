"""Channel groups: several tokens for each patch, each of some of its channels, with masks apart.

For images of many bands (`config.model.channel_groups`), as SatMAE has them (arXiv 2207.08051). A
token is its patch with the channels of the other groups set to zero, so that a group has its own
rows of the embedding's kernel, and its own columns of the prediction's. With G groups an image has
G times as many tokens, those of the first group first; `ModelSpec.num_patches` counts all of them.

Shape suffixes as in models/vit.py, and G groups, A places of patches in the image: L = G * A.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import Array

from mae_jax.errors import UserError
from mae_jax.models.masking import Mask, keep_lowest
from mae_jax.models.posemb import sincos_1d, sincos_2d

Groups = tuple[tuple[int, ...], ...]


def parse_groups(value: Any, channels: int) -> Groups:
    """Return config.model.channel_groups as tuples; () = no groups.

    Raises:
      UserError: a channel is in no group, or in several.
    """
    nested = isinstance(value, Iterable) and all(isinstance(x, Iterable) for x in value)
    groups = tuple(map(tuple, value)) if nested else ()
    named = [channel for group in groups for channel in group]
    if not nested or (groups and sorted(map(str, named)) != sorted(map(str, range(channels)))):
        raise UserError(
            f"config.model.channel_groups={value!r}: each of the channels 0 to {channels - 1} must"
            " be in one group, such as ((0, 1, 2), (3, 4))"
        )
    return groups


def own_channels(groups: Groups, patch_dim: int) -> np.ndarray:
    """Return (G, P): 1 for the numbers of a patch that belong to a group, 0 for others."""
    channels = sum(map(len, groups))
    own_GC = np.array([[channel in group for channel in range(channels)] for group in groups])
    return np.tile(own_GC.astype(np.float32), patch_dim // channels)


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
    group_LD = np.repeat(sincos_1d(quarter, np.arange(groups)), len(place_LD) // groups, axis=0)
    table_LD = np.concatenate([place_LD, group_LD], axis=1)
    return np.concatenate([np.zeros((cls_tokens, width)), table_LD]).astype(np.float32)


def split(patches_BAP: Array, groups: Groups) -> Array:
    """Return the tokens (B, L, P) of patches: a copy for each group, others' channels zero."""
    own_GP = own_channels(groups, patches_BAP.shape[-1])
    return rearrange(patches_BAP[:, None] * own_GP[:, None], "b g a p -> b (g a) p")


def merge(tokens_BLP: Array, groups: Groups) -> Array:
    """Return patches (B, A, P) of tokens: from each group its own channels. Undoes `split`."""
    own_GP = own_channels(groups, tokens_BLP.shape[-1])
    tokens_BGAP = rearrange(tokens_BLP, "b (g a) p -> b g a p", g=len(groups))
    return (tokens_BGAP * own_GP[:, None]).sum(1)


def independent(score_BGA: Array) -> Array:
    """Return scores (B, L) whose lowest keep equally many patches of each group.

    A score becomes its rank inside its group, so that the lowest of each group are kept.
    """
    rank_BGA = jnp.argsort(jnp.argsort(score_BGA, axis=-1), axis=-1)
    return rearrange(rank_BGA, "b g a -> b (g a)").astype(jnp.float32)


def shared(mask: Mask, groups: Groups) -> Mask:
    """Return the mask (of L) that hides the same places (of A) in every group."""
    score_BGA = repeat(mask.restore_BL, "b a -> b g a", g=len(groups))
    return keep_lowest(independent(score_BGA), len(groups) * mask.keep_BK.shape[1])


def channel_mean(error_BLP: Array, groups: Groups) -> Array:
    """Return the mean (B, L) of an error over the channels of a token's group."""
    own_GP = own_channels(groups, error_BLP.shape[-1])
    error_BGAP = rearrange(error_BLP, "b (g a) p -> b g a p", g=len(groups))
    sum_BGA = (error_BGAP * own_GP[:, None]).sum(-1)
    return rearrange(sum_BGA / own_GP.sum(-1)[:, None], "b g a -> b (g a)")
