"""Predictions as pixel levels, and two predictors that learn nothing to compare them with.

"Levels" are pixel values from 0 to 255.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from mae_jax.errors import UserError
from mae_jax.models import targets

CAPTIONS = {  # targets made of pixels, and what to say under pictures of their predictions
    "pixels": "The model predicts pixels; no statistics of patches are used.",
    "norm_pixels": "Predictions are un-normalised with means and standard deviations estimated from"
    " the visible patches around them.",
}


def patch_statistics(
    patches_BLP: Array, mask_BL: Array, grid: tuple[int, int], source: str = "visible"
) -> tuple[Array, Array]:
    """Return mean and standard deviation of each patch, (B, L, 1) each, to undo `norm_pixels`.

    Args:
      patches_BLP: patches of the normalised images.
      mask_BL: 1 = hidden.
      grid: (rows, columns) of patches.
      source: "visible" estimates those of a hidden patch from all visible patches, weighted by
        1 / distance^3, and uses nothing of hidden patches. Of inverse distances to the powers 2, 3,
        4 and 6, Gaussians, and linear interpolation, the power 3 had the smallest error on crops of
        the bundled photographs, at 8 x 8 and at 14 x 14 patches. "true" takes the patches' own
        statistics, which the model never saw.
    """
    mean_BL1, std_BL1 = targets.patch_statistics(patches_BLP)
    if source == "true":
        return mean_BL1, std_BL1
    if source != "visible":
        raise UserError(f"patch statistics from {source!r}: there are 'visible' and 'true'")
    position_L2 = np.argwhere(np.ones(grid))  # row and column of each patch
    distance_LL = np.sqrt(np.square(position_L2[:, None] - position_L2).sum(-1))
    weight_LL = np.where(distance_LL > 0, distance_LL, np.inf).astype(np.float32) ** -3
    hidden_BL1 = mask_BL[..., None] > 0

    def estimate(x_BL1: Array) -> Array:
        visible_BL2 = jnp.where(hidden_BL1, 0, jnp.concatenate([x_BL1, jnp.ones_like(x_BL1)], -1))
        sums_BL2 = jnp.einsum("lm,bmk->blk", weight_LL, visible_BL2, precision="highest")
        # A patch that is the only visible one has weights of 0; it keeps its own statistics.
        mean_BL1 = sums_BL2[..., :1] / jnp.maximum(sums_BL2[..., 1:], 1e-20)
        return jnp.where(hidden_BL1, mean_BL1, x_BL1)

    return estimate(mean_BL1), estimate(std_BL1)


def unnormalize(patches_BLP: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Return patches of normalised images as levels, not clipped."""
    scale_P, shift_P = (_repeated(x, patches_BLP.shape[-1]) for x in (std, mean))
    return 255 * (patches_BLP * scale_P + shift_P)


def from_levels(levels_BLP: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Return patches of levels as patches of normalised images: the inverse of `unnormalize`."""
    scale_P, shift_P = (_repeated(x, levels_BLP.shape[-1]) for x in (std, mean))
    return (levels_BLP / 255 - shift_P) / scale_P


def _repeated(per_channel: tuple[float, ...], patch_dim: int) -> np.ndarray:
    """Return (P,): the channel's number for each number of a patch, where channels vary fastest."""
    return np.tile(np.asarray(per_channel, np.float32), patch_dim // len(per_channel))


def predicted_levels(
    pred_BLT: Array,
    levels_BLP: Array,
    mask_BL: Array,
    *,
    grid: tuple[int, int],
    target: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    source: str = "visible",
    clip: bool = True,
) -> Array:
    """Return predictions as levels, (B, L, P), clipped to 0..255.

    Args:
      clip: False for images whose own levels may be outside, as with a value_range.
      pred_BLT: in the space of the target, "pixels" or "norm_pixels", so that T is P.
      levels_BLP: the images' own patches, of which `patch_statistics` sees what `source` allows.
      mean, std: of the channels, with which the images were normalised.
    """
    if target == "norm_pixels":
        patches_BLP = from_levels(levels_BLP, mean, std)
        mean_BL1, std_BL1 = patch_statistics(patches_BLP, mask_BL, grid, source)
        pred_BLT = pred_BLT * std_BL1 + mean_BL1
    levels_BLP = unnormalize(pred_BLT, mean, std)
    return jnp.clip(levels_BLP, 0, 255) if clip else levels_BLP


def mean_colour(levels_LP: np.ndarray, mask_L: np.ndarray, channels: int) -> np.ndarray:
    """Return the mean colour of the visible patches of the image for every pixel, (L, P)."""
    colour_C = rearrange(levels_LP[mask_L == 0], "k (n c) -> (k n) c", c=channels).mean(0)
    return np.tile(colour_C, (len(levels_LP), levels_LP.shape[1] // channels))


def interpolation(
    levels_LP: np.ndarray, mask_L: np.ndarray, patch: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """Return every pixel interpolated from the mean colours of visible patches around it, (L, P).

    The colours stand at the centres of their patches and are interpolated linearly inside the
    Delaunay triangles of these. Elsewhere, and if fewer than three patches are visible or all are
    in one line, the nearest colour is taken.
    """
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import QhullError, cKDTree

    (rows, cols), (height, width), size = grid, patch, np.array(patch)
    centre_K2 = np.argwhere(mask_L.reshape(grid) == 0) * size + (size - 1) / 2
    colour_KC = rearrange(levels_LP[mask_L == 0], "k (n c) -> k n c", n=height * width).mean(1)
    pixel_2HW = np.mgrid[: rows * height, : cols * width]
    pixel_N2 = rearrange(pixel_2HW, "k (h r) (w c) -> (h w r c) k", r=height, c=width)
    try:
        value_NC = LinearNDInterpolator(centre_K2, colour_KC)(pixel_N2)
    except (QhullError, ValueError):
        value_NC = np.full((len(pixel_N2), colour_KC.shape[1]), np.nan)
    outside = np.isnan(value_NC[:, 0])
    value_NC[outside] = colour_KC[cKDTree(centre_K2).query(pixel_N2[outside])[1]]
    return rearrange(value_NC, "(l n) c -> l (n c)", l=rows * cols)
