"""The PCA target of the paper's Table 1d: the largest principal coefficients of each patch."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from mae_jax.errors import UserError
from mae_jax.models.patchify import patchify

NEIGHBOUR = 0.95  # correlation of pixels that touch
COLOURS = 0.9  # correlation of two channels of a pixel


def pca(images_BHWC: Array, patch_size: tuple[int, int], *, components: int = 96) -> Array:
    """Return the `components` largest principal coefficients of each patch, (B, L, components).

    The basis is that of a model of photographs and not of the data set, so that a run needs no pass
    over its images: pixels whose correlation falls by NEIGHBOUR with each step, and by COLOURS
    between channels. On photographs its first 96 hold as much of the variance as the principal
    components of these photographs themselves, but for a hundredth (tests/test_axes.py).

    Raises:
      UserError: a patch has fewer numbers.
    """
    channels = images_BHWC.shape[-1]
    if not 0 < components <= patch_size[0] * patch_size[1] * channels:
        raise UserError(
            f"target.components={components}: patches of {patch_size[0]} x {patch_size[1]} pixels"
            f" of {channels} channel(s) have {patch_size[0] * patch_size[1] * channels} numbers"
        )
    basis_PT = _basis(patch_size, channels)[:, :components]
    return patchify(images_BHWC, patch_size) @ jnp.asarray(basis_PT, jnp.float32)


def _basis(patch_size: tuple[int, int], channels: int) -> np.ndarray:
    """Return the components as columns, the largest first; rows are ordered as in `patchify`."""
    steps = (np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in patch_size)
    factors = [NEIGHBOUR**distance for distance in steps]
    factors.append(np.where(np.eye(channels) > 0, 1.0, COLOURS))
    variance: np.ndarray = np.ones(1)
    basis: np.ndarray = np.ones((1, 1))
    for factor in factors:  # the principal components of a Kronecker product are products
        values, vectors = np.linalg.eigh(factor)
        variance, basis = np.kron(variance, values), np.kron(basis, vectors)
    return basis[:, np.argsort(-variance, kind="stable")]
