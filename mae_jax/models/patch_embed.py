"""The linear embedding of patches, for patches of other pixels: another size, other channels.

Kernels are (P, D), the values of a patch in the order of `patchify`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array


class Pixels(NamedTuple):
    """What the patches of an encoder are made of."""

    patch: tuple[int, int]  # rows, columns
    mean: tuple[float, ...]  # of each channel, by which images are normalised
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.patch[0]} x {self.patch[1]} pixels of {len(self.mean)} channel(s)"


def adapt(kernel_PD: Array, bias_D: Array, old: Pixels, new: Pixels) -> tuple[Array, Array]:
    """Kernel and bias for other patches, so that embeddings change as little as can be.

    Of a grey image, whose channels are equal before they are normalised, the embedding stays the
    same whatever the channels; for another patch size see `resize`.

    Raises:
      ValueError: neither side has one channel and their numbers differ: what the new channels
        have to do with the old ones is not known.
    """
    before, after = len(old.mean), len(new.mean)
    if before != after:
        if 1 not in (before, after):
            raise ValueError(
                f"patches of {before} channels cannot be made ones of {after}: only of 1 channel"
                " are there ones of any number, and of any number ones of 1"
            )
        if before == 1:
            kernel_PD = recolour(kernel_PD, 1, after)
        mean, std = (jnp.asarray(old.mean), jnp.asarray(old.std))  # (1,) or (C,)
        shift_C, scale_C = (jnp.asarray(new.mean) - mean) / std, jnp.asarray(new.std) / std
        kernel_NCD = rearrange(kernel_PD, "(n ch) d -> n ch d", ch=max(before, after))
        bias_D = bias_D + (kernel_NCD * shift_C[:, None]).sum((0, 1))
        kernel_PD = rearrange(kernel_NCD * scale_C[:, None], "n ch d -> (n ch) d")
        if after == 1:
            kernel_PD = recolour(kernel_PD, before, 1)
    if old.patch != new.patch:
        kernel_PD = resize(kernel_PD, old.patch, new.patch)
    return kernel_PD, bias_D


def recolour(kernel_PD: Any, old: int, new: int) -> Any:
    """For images of `new` channels: weights are repeated, and scaled to keep the response.

    For one channel that is their sum: exact for a grey image that was given three times.
    """
    kernel = rearrange(kernel_PD, "(n ch) d -> n ch d", ch=old)
    kernel = kernel.sum(1, keepdims=True) if new == 1 else kernel[:, np.arange(new) % old]
    scale = 1.0 if new == 1 else old / new
    return rearrange(kernel * np.float32(scale), "n ch d -> (n ch) d")


def resize(kernel_PD: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """For patches of another (rows, columns): PI-resize of FlexiViT (arXiv 2212.08013 section 3.4).

    Patches that are enlarged bilinearly get exactly the embedding that they had; of smaller ones
    the embedding is as near as can be, in the mean over patches of independent pixels.
    """
    # The pseudo-inverse for both axes is made of those for each, as the resizing itself is.
    rows, cols = (np.linalg.pinv(_bilinear(o, n).T) for o, n in zip(old, new, strict=True))
    kernel = rearrange(kernel_PD, "(r c ch) d -> r c ch d", r=old[0], c=old[1])
    return rearrange(
        jnp.einsum("ir,jc,rchd->ijhd", rows, cols, kernel, precision="highest"),
        "r c ch d -> (r c ch) d",
    ).astype(kernel_PD.dtype)


def _bilinear(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that resizes a row of pixels."""
    with jax.ensure_compile_time_eval():  # a constant, inside jit too
        return np.asarray(jax.image.resize(np.eye(old), (new, old), "bilinear"), np.float64)
