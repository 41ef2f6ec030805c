"""Adapt a network to another grid, patch size or channels: positions, embedding, predictions.

The numbers of a patch, P, are in the order of `patchify`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from mae_jax.errors import UserError
from mae_jax.models.channel_groups import sincos_table
from mae_jax.models.spec import ModelSpec, Size, ViTSpec


def positions(
    table_1ND: Array,
    old: tuple[int, int],
    new: tuple[int, int],
    cls_tokens: int = 1,
    antialias: bool = False,
    groups: int = 1,
) -> Array:
    """Resize a position table to another (rows, columns) grid; rows of class tokens stay.

    The table holds the rows of each channel group, one after the other.

    Bicubic as PyTorch does it, which the official code uses: a = -0.75, edges clamped, corners not
    aligned. DINOv2 with registers and timm resize with antialiasing, with which PyTorch takes
    a = -0.5; others do not.

    Raises:
      UserError: the table is not one of the old grid.
    """
    rows = cls_tokens + groups * old[0] * old[1]
    if table_1ND.shape[1] != rows:
        raise UserError(
            f"a position table of {table_1ND.shape[1]} rows is not one of a grid of {old[0]} x"
            f" {old[1]} patches and {cls_tokens} cls token(s), which has {rows}"
        )
    if old == new:
        return table_1ND
    h, w = old
    image_GHWD = rearrange(table_1ND[0, cls_tokens:], "(g h w) d -> g h w d", h=h, w=w)
    shape = (len(image_GHWD), *new, table_1ND.shape[-1])
    method = "cubic" if antialias else "cubic-pytorch"
    image_GHWD = jax.image.resize(image_GHWD, shape, method, antialias=antialias)
    patches_1LD = rearrange(image_GHWD, "g h w d -> 1 (g h w) d")
    return jnp.concatenate([table_1ND[:, :cls_tokens], patches_1LD], axis=1)


def positions_of(table_1ND: Array | None, old: Size, vit: ViTSpec, spec: ModelSpec) -> Array:
    """Return the position table of an encoder or decoder of `spec`, from one of an `old` grid.

    A table that is missing is the sine-cosine one.

    Raises:
      UserError: the table is not one of the old grid.
    """
    groups, cls_tokens = spec.num_groups, spec.cls_tokens
    if table_1ND is None:
        table_1ND = jnp.asarray(sincos_table(vit.width, old, groups=groups)[None])
    return positions(table_1ND, old, spec.grid, cls_tokens, bool(vit.registers), groups)


def patch_embedding(
    kernel_PD: Array, bias_D: Array, old: ModelSpec, new: ModelSpec
) -> tuple[Array, Array]:
    """Return kernel and bias for the patches of another network, with nearly equal embeddings.

    The embedding of a grey image, whose channels are equal before they are normalised, stays the
    same whatever the channels. For another patch size see `patch_kernel`.

    Raises:
      UserError: the numbers of channels differ and neither is 1: how the new channels relate to
        the old ones is not known.
    """
    before, after = old.channels, new.channels
    if before != after:
        if 1 not in (before, after):
            raise UserError(
                f"a patch embedding of {before} channels cannot be adapted to {after}: only from 1"
                " channel to any number, or from any number to 1"
            )
        if before == 1:  # each channel gets an equal share of the response
            kernel_PD = jnp.repeat(kernel_PD, after, 0) * np.float32(1 / after)
        mean, std = (jnp.asarray(old.mean), jnp.asarray(old.std))  # (1,) or (C,)
        shift_C, scale_C = (jnp.asarray(new.mean) - mean) / std, jnp.asarray(new.std) / std
        kernel_NCD = rearrange(kernel_PD, "(n ch) d -> n ch d", ch=max(before, after))
        bias_D = bias_D + (kernel_NCD * shift_C[:, None]).sum((0, 1))
        kernel_NCD = kernel_NCD * scale_C[:, None]
        if after == 1:  # exact for a grey image that was given in every channel
            kernel_NCD = kernel_NCD.sum(1, keepdims=True)
        kernel_PD = rearrange(kernel_NCD, "n ch d -> (n ch) d")
    if old.patch_size != new.patch_size:
        kernel_PD = patch_kernel(kernel_PD, old.patch_size, new.patch_size)
    return kernel_PD, bias_D


def patch_kernel(kernel_PD: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Return a kernel for patches of size `new`: PI-resize (arXiv 2212.08013 section 3.4).

    A patch that is enlarged bilinearly keeps exactly its embedding; that of a shrunk patch is as
    near as can be, in the mean over patches of independent pixels.
    """
    # The pseudo-inverse for both axes is made of those for each, as the resizing itself is.
    rows, cols = (np.linalg.pinv(_bilinear(o, n).T) for o, n in zip(old, new, strict=True))
    kernel = rearrange(kernel_PD, "(r c ch) d -> r c ch d", r=old[0], c=old[1])
    return rearrange(
        jnp.einsum("ir,jc,rchd->ijhd", rows, cols, kernel, precision="highest"),
        "r c ch d -> (r c ch) d",
    ).astype(kernel_PD.dtype)


def prediction(
    kernel_EP: Array, bias_P: Array, old: tuple[int, int], new: tuple[int, int]
) -> tuple[Array, Array]:
    """Return a layer whose predicted patches of size `new` are the old ones, resized bilinearly."""
    rows, cols = (_bilinear(o, n) for o, n in zip(old, new, strict=True))

    def resized(x_NP: Array) -> Array:
        x = rearrange(x_NP, "n (r c ch) -> n r c ch", r=old[0], c=old[1])
        y = jnp.einsum("ir,jc,nrch->nijh", rows, cols, x, precision="highest")
        return rearrange(y, "n r c ch -> n (r c ch)").astype(x_NP.dtype)

    return resized(kernel_EP), resized(bias_P[None])[0]


def _bilinear(old: int, new: int) -> np.ndarray:
    """Return the matrix (new, old) that resizes a row of pixels."""
    with jax.ensure_compile_time_eval():  # a constant, inside jit too
        return np.asarray(jax.image.resize(np.eye(old), (new, old), "bilinear"), np.float64)
