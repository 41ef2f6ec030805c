"""Blocks with options that MAE does not have: `spec.encoder.block` and `spec.decoder.block`.

Registers, normalised queries and keys, a scale of each branch, RMSNorm, and 2-D rotary positions.
Nothing of this runs, and no parameter of it exists, where `block` is None. Shape suffixes as in
models/vit.py, and R registers, G = F / 2 angles of a head.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mae_jax.models.block import Attention, LayerNorm, Mlp, drop_branch
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.spec import Size, ViTSpec


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) times a scale, over the last axis, in float32; no bias."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * scale


def norm(name: str, options: BlockOptions | None, one_pass: bool = False) -> nn.Module:
    """Return a norm of a stack, or of what reads it: a LayerNorm, or what the options say."""
    if options is None:
        return LayerNorm(one_pass=one_pass, name=name)
    if options.norm == "rms":
        return RMSNorm(options.eps, name=name)
    return LayerNorm(options.eps, one_pass, name=name)


class LayerScale(nn.Module):
    """A learned factor for each feature of a branch, which starts as `initial`."""

    initial: float

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        start = nn.initializers.constant(self.initial)
        return x_BND * self.param("scale", start, x_BND.shape[-1:])


class Extra(NamedTuple):
    """Arrays that a stack is given beside its tokens, by its options; None = none."""

    register_1RD: Array | None
    angle_BNG: Array | None  # of the tokens without registers; B is 1 if they do not differ


def extra(
    module: nn.Module,
    vit: ViTSpec,
    grid: Size,
    keep_BK: Array | None = None,
    cls_tokens: int = 1,
) -> Extra | None:
    """Return what `vit.block` adds to a stack; registers are parameters of `module`.

    Args:
      keep_BK: the row-major index of each patch of the stack; None = all of them, in order.
    """
    if vit.block is None:
        return None
    registers, angle_BNG = None, None
    if vit.block.registers:
        shape = (1, vit.block.registers, vit.width)
        registers = module.param("register_token", nn.initializers.normal(0.02), shape)
    if vit.block.rope:
        table_LG = jnp.asarray(rotary_angles(vit.width // vit.heads, grid, vit.block.rope))
        angle_BNG = table_LG[None] if keep_BK is None else table_LG[keep_BK]
        angle_BNG = jnp.pad(angle_BNG, ((0, 0), (cls_tokens, 0), (0, 0)))  # no cls token is turned
    return Extra(registers, angle_BNG)


def append_registers(x_BND: Array, extra: Extra | None) -> Array:
    """Return tokens with registers, if there are any, after them."""
    if extra is None or extra.register_1RD is None:
        return x_BND
    shape = (len(x_BND), *extra.register_1RD.shape[1:])
    register_BRD = jnp.broadcast_to(extra.register_1RD, shape).astype(x_BND.dtype)
    return jnp.concatenate([x_BND, register_BRD], axis=1)


def rotary_angles(head_width: int, grid: Size, base: float) -> np.ndarray:
    """Return the angles (L, F / 2) of patches, row-major: of their rows, then of their columns.

    As DINOv3 has them (arXiv 2508.10104): coordinates are the centres of patches, from -1 to 1
    along each side whatever its number of patches, and the F / 4 frequencies of an axis are
    2 pi base^(-4k / F).
    """
    frequency = 2 * np.pi * base ** -(np.arange(head_width // 4) / (head_width / 4))
    places = [(2 * np.arange(side) + 1) / side - 1 for side in grid]
    rows, cols = (x.ravel() for x in np.meshgrid(*places, indexing="ij"))
    angles = np.concatenate([np.outer(rows, frequency), np.outer(cols, frequency)], axis=1)
    return angles.astype(np.float32)


def rotate(x_BNSF: Array, angle_BNG: Array) -> Array:
    """Return queries or keys with each pair of numbers (i, i + F / 2) turned by its angle, float32.

    Tokens beyond those that have angles stay as they are: registers, and what pads the stream.
    """
    more = x_BNSF.shape[1] - angle_BNG.shape[1]
    angle_BN1G = jnp.pad(angle_BNG, ((0, 0), (0, more), (0, 0)))[:, :, None]
    cos, sin = jnp.cos(angle_BN1G), jnp.sin(angle_BN1G)
    first, second = jnp.split(x_BNSF.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class ModernBlock(nn.Module):
    """A `block.Block` with options; it returns the same."""

    heads: int
    mlp_width: int
    compute: ComputeConfig
    tokens: int | None
    options: BlockOptions
    extra: Extra

    @nn.compact
    def __call__(
        self, x_BND: Array, drop_path: Array, deterministic: bool, return_blocks: bool = False
    ) -> tuple[Array, Array | None]:
        def add(x_BND: Array, branch_BND: Array, name: str) -> Array:
            if options.layer_scale:
                branch_BND = LayerScale(options.layer_scale, name=name)(branch_BND)
            branch_BND = branch_BND.astype(x_BND.dtype)
            return x_BND + drop_branch(self, branch_BND, drop_path, deterministic)

        def transform_qk(q_BNSF: Array, k_BNSF: Array) -> tuple[Array, Array]:
            dtype = q_BNSF.dtype
            if options.qk_norm:
                q_BNSF, k_BNSF = RMSNorm(name="q_norm")(q_BNSF), RMSNorm(name="k_norm")(k_BNSF)
            if angle_BNG is not None:
                q_BNSF, k_BNSF = rotate(q_BNSF, angle_BNG), rotate(k_BNSF, angle_BNG)
            return q_BNSF.astype(dtype), k_BNSF.astype(dtype)

        options, compute, angle_BNG = self.options, self.compute, self.extra.angle_BNG
        x_BND = compute.constrain(x_BND)
        attention = Attention(self.heads, compute, self.tokens, transform_qk, name="attn")
        norm1, norm2 = (norm(name, options, compute.one_pass_norms) for name in ("norm1", "norm2"))
        x_BND = add(x_BND, attention(norm1(x_BND)), "scale1")
        mlp = Mlp(self.mlp_width, compute, name="mlp")
        x_BND = add(x_BND, mlp(norm2(x_BND)), "scale2")
        x_BND = compute.constrain(x_BND)
        return x_BND, x_BND if return_blocks else None
