"""Histograms of oriented gradients as the target (Wei et al., 2022, arXiv 2112.09133)."""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce


def hog(images_BHWC, patch_size, *, bins=9, cell=8):
    """Return the orientations of each cell of `cell` x `cell` pixels, of each channel: (B, L, T).

    A patch of 16 x 16 pixels and 3 channels has T = 3 * 9 * 2 * 2 = 108 values.
    """
    height, width = images_BHWC.shape[1:3]
    x = jnp.pad(images_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    across, down = x[:, :, :-2] - x[:, :, 2:], x[:, :-2] - x[:, 2:]
    across = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]  # Sobel's two filters
    down = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]

    # Opposite directions are one orientation. A pixel votes with the size of its gradient, and
    # pixels in the middle of 16 x 16 count more.
    orientation = jnp.floor(jnp.arctan2(across, down) / jnp.pi * bins).astype(int) % bins
    bell = jnp.exp(-0.5 * ((jnp.arange(16) - 7.5) / 8) ** 2)
    window = jnp.tile(jnp.outer(bell, bell), (height // 16 + 1, width // 16 + 1))[:height, :width]
    votes = jnp.hypot(across, down) * window[..., None]
    votes = votes[..., None] * jax.nn.one_hot(orientation, bins)
    cells = reduce(votes, "b (h p) (w q) c k -> b h w c k", "sum", p=cell, q=cell)
    cells /= jnp.maximum(jnp.linalg.norm(cells, axis=-1, keepdims=True), 1e-6)
    rows, cols = patch_size[0] // cell, patch_size[1] // cell
    return rearrange(cells, "b (h r) (w s) c k -> b (h w) (c k r s)", r=rows, s=cols)
