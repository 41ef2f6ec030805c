"""What the decoder predicts for each patch: a function (images_BHWC, patch_size) -> target_BLT.

It gets whole normalised images, so that a target such as HOG can look across patches, and T may be
any width. Name your own in the config: `config.target.name = "my_fork.targets.hog"`.
"""

import jax.numpy as jnp
from jax import Array

from mae_jax.models.patchify import patchify


def pixels(images_BHWC: Array, patch_size: tuple[int, int]) -> Array:
    """Return the pixels themselves, after mean and std normalisation of the whole image."""
    return patchify(images_BHWC, patch_size)


def norm_pixels(images_BHWC: Array, patch_size: tuple[int, int]) -> Array:
    """Return each patch minus its mean, over its standard deviation: official `norm_pix_loss`."""
    patches_BLP = patchify(images_BHWC, patch_size)
    mean_BL1, std_BL1 = patch_statistics(patches_BLP)
    return (patches_BLP - mean_BL1) / std_BL1


def patch_statistics(patches_BLP: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of each patch over its P numbers, (B, L, 1) each.

    The variance is the unbiased one (divided by P - 1) plus 1e-6, inside the root.
    """
    mean_BL1 = patches_BLP.mean(-1, keepdims=True)
    var_BL1 = patches_BLP.var(-1, ddof=1, keepdims=True)
    return mean_BL1, jnp.sqrt(var_BL1 + 1e-6)
