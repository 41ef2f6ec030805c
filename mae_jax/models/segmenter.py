"""The linear segmentation head: patch tokens to the class of each pixel.

Shape suffixes as in models/vit.py. The tokens of some blocks are joined, normalised by a batch norm
over all patches, mapped to logits by one matrix (a 1x1 convolution), and enlarged bilinearly. The
batch norm needs no scale and bias of its own, since the matrix after it has them.
"""

import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.models.probe import BatchStats, LinearHead, batch_norm
from mae_jax.models.spec import Size


def logits(
    head: LinearHead, params: dict, stats: BatchStats, x_BLD: Array, grid: Size, train: bool
) -> tuple[Array, BatchStats]:
    """Return logits (B, rows, columns, Y) of patches, and the running statistics after them.

    Training takes the statistics of all patches of the batch.
    """
    x_ND, stats = batch_norm(
        x_BLD.reshape(-1, x_BLD.shape[-1]), stats, x_BLD.shape[0] * x_BLD.shape[1], train
    )
    logits_NY: Array = head.apply({"params": params}, x_ND)  # type: ignore[assignment]
    return logits_NY.reshape(len(x_BLD), *grid, -1), stats


def enlarge(logits_BHWY: Array, size: Size) -> Array:
    """Return logits of each pixel, bilinearly between the centres of the patches."""
    shape = (len(logits_BHWY), *size, logits_BHWY.shape[-1])
    return jax.image.resize(logits_BHWY, shape, "bilinear")


def cross_entropy(logits_BHWY: Array, map_BHW: Array) -> Array:
    """Return the mean cross-entropy over the pixels with a class, 0 if there are none.

    Args:
      map_BHW: classes from 0 to Y - 1; any other number is ignored.
    """
    map_BHW = map_BHW.astype(jnp.int32)
    classes = logits_BHWY.shape[-1]
    labelled_BHW = map_BHW < classes
    log_BHWY = jax.nn.log_softmax(logits_BHWY)
    true_BHW = jnp.where(labelled_BHW, map_BHW, 0)[..., None]
    loss_BHW = -jnp.take_along_axis(log_BHWY, true_BHW, -1)[..., 0]
    return jnp.where(labelled_BHW, loss_BHW, 0.0).sum() / jnp.maximum(labelled_BHW.sum(), 1)
