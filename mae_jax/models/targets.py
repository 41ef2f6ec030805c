"""What the decoder is asked to predict for each patch: a function (patches_BLP) -> target_BLP.

The patches are those of the normalised image. To predict something else of the same shape, write
such a function and name it in the config: `config.target.name = "my_fork.targets.hog"`.
"""

import jax.numpy as jnp
from jax import Array


def pixels(patches_BLP: Array) -> Array:
    """The pixels themselves, after mean and std normalisation of the whole image."""
    return patches_BLP


def patch_statistics(patches_BLP: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each patch over all its pixels and channels, (B, L, 1) each.

    The variance is the unbiased one (divide by P - 1) plus 1e-6, inside the root.
    """
    mean_BL1 = patches_BLP.mean(-1, keepdims=True)
    var_BL1 = patches_BLP.var(-1, ddof=1, keepdims=True)
    return mean_BL1, jnp.sqrt(var_BL1 + 1e-6)


def norm_pixels(patches_BLP: Array) -> Array:
    """Each patch minus its mean, over its standard deviation: the official `norm_pix_loss`."""
    mean_BL1, std_BL1 = patch_statistics(patches_BLP)
    return (patches_BLP - mean_BL1) / std_BL1
