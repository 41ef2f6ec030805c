"""Turn images into what a network reads: normalised and cut into patches; and back."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from mae_jax.models import channel_groups
from mae_jax.models.spec import ModelSpec


def normalize(images_BHWC: Array, spec: ModelSpec) -> Array:
    """Return images as float32: scaled to 0..1, minus the mean, over the deviation.

    spec.value_range says which values become 0 and 1; without it they are 0 and 255.
    """
    low, high = spec.value_range or (0, 255)
    values_BHWC = jnp.asarray(images_BHWC, jnp.float32)
    scaled_BHWC = (values_BHWC - low if low else values_BHWC) / (high - low)
    return (scaled_BHWC - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)


def to_levels(images_BHWC: Array, value_range: tuple[float, ...]) -> Array:
    """Return images as float32 levels, in which the ends of the value range are 0 and 255."""
    values_BHWC = jnp.asarray(images_BHWC, jnp.float32)
    if not value_range:
        return values_BHWC
    low, high = value_range
    return (values_BHWC - low) * (255 / (high - low))


def patchify(images_BHWC: Array, patch_size: tuple[int, int]) -> Array:
    """Cut images into patches, row-major; inside a patch the order is (row, column, channel).

    Returns (B, L, P) with L = (H / rows) * (W / columns) and P = rows * columns * C.

    TPUs pad a last axis to 128 numbers, so none of C = 3 is moved, and what reads the patches reads
    them as (B, L, P): 0.76 of 28.8 ms of L/16 on v5e:16x16 by the compiler's clock.
    """
    rows, cols = patch_size
    lines_BHX = rearrange(images_BHWC, "b h w ch -> b h (w ch)")
    width = cols * images_BHWC.shape[-1]
    patches_BLP = rearrange(lines_BHX, "b (h r) (w x) -> b (h w) (r x)", r=rows, x=width)
    return jax.lax.optimization_barrier(patches_BLP)


def to_patches(images_BHWC: Array, spec: ModelSpec) -> Array:
    """Cut normalised images into the patches that a network reads, (B, L, P)."""
    patches_BLP = patchify(images_BHWC, spec.patch_size)
    if spec.channel_groups:
        return channel_groups.split(patches_BLP, spec.channel_groups)
    return patches_BLP


def unpatchify(patches_BLP: Array, patch_size: tuple[int, int], grid: tuple[int, int]) -> Array:
    """Return images from patches, in a (rows, columns) grid: the exact inverse of `patchify`."""
    rows, cols = patch_size
    return rearrange(
        patches_BLP,
        "b (h w) (r c ch) -> b (h r) (w c) ch",
        h=grid[0],
        w=grid[1],
        r=rows,
        c=cols,
    )
