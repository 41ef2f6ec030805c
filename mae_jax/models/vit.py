"""The Vision Transformer of MAE: pre-norm blocks, stacked on a leading layer axis.

Shape suffixes, here and in the whole package: B batch, H W image, C channels, L patches, K kept
patches, N tokens, D width, E decoder width, P patch dim, T target dim, S heads, F head width,
Y classes, M = depth + 1: the tokens before the first block and after each.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.models.attention import Attention
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.dense import dense
from mae_jax.models.posemb import sincos_2d
from mae_jax.models.spec import ModelSpec, ViTSpec


def torch_conv_init(fan_in: int) -> Callable:
    """Return PyTorch's initialiser of a convolution, U(+-1/sqrt(fan_in)); MAE keeps its bias so."""
    bound = fan_in**-0.5

    def init(rng, shape, dtype=jnp.float32):
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


@jax.custom_vjp
def normalise(x_BND: Array, scale_D: Array, bias_D: Array) -> Array:
    """Return the layer normalisation in float32, with epsilon 1e-6 and a two-pass variance.

    The backward pass keeps the input and two numbers for each token. Derived by JAX, it would write
    and read again one more float32 array as large as the input.
    """
    return _normalise_forward(x_BND, scale_D, bias_D)[0]


def _normalise_forward(x_BND: Array, scale_D: Array, bias_D: Array) -> tuple[Array, tuple]:
    x_float_BND = x_BND.astype(jnp.float32)
    mean_BN1 = x_float_BND.mean(-1, keepdims=True)
    variance_BN1 = jnp.square(x_float_BND - mean_BN1).mean(-1, keepdims=True)
    inverse_BN1 = jax.lax.rsqrt(variance_BN1 + 1e-6)
    y_BND = (x_float_BND - mean_BN1) * (inverse_BN1 * scale_D) + bias_D
    return y_BND, (x_BND, mean_BN1, inverse_BN1, scale_D)


def _normalise_backward(residuals: tuple, grad_BND: Array) -> tuple[Array, Array, Array]:
    x_BND, mean_BN1, inverse_BN1, scale_D = residuals
    mean_BN1, inverse_BN1 = jax.lax.optimization_barrier((mean_BN1, inverse_BN1))
    unit_BND = (x_BND.astype(jnp.float32) - mean_BN1) * inverse_BN1
    scaled_BND = grad_BND * scale_D
    mean_scaled_BN1 = scaled_BND.mean(-1, keepdims=True)
    mean_product_BN1 = (scaled_BND * unit_BND).mean(-1, keepdims=True)
    dx_BND = inverse_BN1 * (scaled_BND - mean_scaled_BN1 - unit_BND * mean_product_BN1)
    rows = tuple(range(x_BND.ndim - 1))
    return dx_BND.astype(x_BND.dtype), (grad_BND * unit_BND).sum(rows), grad_BND.sum(rows)


normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nn.Module):
    """`normalise` with a scale and a bias, over the last axis."""

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        shape = x_BND.shape[-1:]
        scale_D = self.param("scale", nn.initializers.ones, shape)
        return normalise(x_BND, scale_D, self.param("bias", nn.initializers.zeros, shape))


def layer_norm(name: str) -> nn.Module:
    """Return the LayerNorm of every network here."""
    return LayerNorm(name=name)


def gelu(x: Array) -> Array:
    """Return the exact (erf) GELU, computed in float32.

    `jax.nn.gelu` takes erfc, which costs more and is exact in tails that no float32 sum can see,
    and it computes in the type of `x`.
    """
    x_float = x.astype(jnp.float32)
    return (0.5 * x_float * (1 + jax.lax.erf(x_float * 0.5**0.5))).astype(x.dtype)


class Mlp(nn.Module):
    """Two layers with an exact GELU between, which the backward pass computes again.

    Of the arrays that are `hidden` wide only the output of the first layer is kept.
    """

    hidden: int
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        h = dense(self.hidden, self.compute, "fc1")(x_BND)
        fc2 = dense(x_BND.shape[-1], self.compute, "fc2")
        return nn.remat(lambda fc2, h: fc2(gelu(h)), prevent_cse=False)(fc2, h)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)); drop path drops a branch for whole samples.

    Returns (tokens, tokens or None): the carry of the scan, and its output if `return_blocks`.
    """

    heads: int
    hidden: int
    compute: ComputeConfig
    tokens: int | None = None  # of N, the real ones; None = all

    @nn.compact
    def __call__(
        self, x_BND: Array, drop_path: Array, deterministic: bool, return_blocks: bool = False
    ) -> tuple[Array, Array | None]:
        def drop(branch_BND: Array) -> Array:
            branch_BND = branch_BND.astype(x_BND.dtype)
            if deterministic:
                return branch_BND
            shape = (branch_BND.shape[0], 1, 1)
            kept_B11 = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_path, shape)
            return jnp.where(kept_B11, branch_BND / (1 - drop_path), 0).astype(x_BND.dtype)

        compute = self.compute
        x_BND = compute.constrain(x_BND)
        attention = Attention(self.heads, compute, self.tokens, name="attn")
        x_BND = x_BND + drop(attention(layer_norm("norm1")(x_BND)))
        mlp = Mlp(self.hidden, compute, name="mlp")
        x_BND = x_BND + drop(mlp(layer_norm("norm2")(x_BND)))
        x_BND = compute.constrain(x_BND)
        return x_BND, x_BND if return_blocks else None


class Stack(nn.Module):
    """`spec.depth` blocks as one scan: each parameter has a leading layer axis.

    Args:
      first_drop_path: the rate of the first block; rates grow linearly to `spec.drop_path`.
    """

    spec: ViTSpec
    compute: ComputeConfig
    first_drop_path: float = 0.0

    @nn.compact
    def __call__(
        self, x_BND: Array, deterministic: bool = True, return_blocks: bool = False
    ) -> tuple[Array, Array | None]:
        """Return the tokens after the last block and, if asked, after each: (depth, B, N, D).

        Initialising always loops, whatever `scan_unroll` says: the parameters are the same, and
        unrolled it took 36 s for L/16.
        """
        spec, compute, tokens = self.spec, self.compute, x_BND.shape[1]
        unroll = 1 if self.is_initializing() else compute.scan_unroll
        # Without a loop between them, XLA would merge the recomputation with the forward pass.
        block = Block
        if compute.remat:
            block = nn.remat(Block, prevent_cse=unroll >= spec.depth, static_argnums=(3, 4))
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=spec.depth,
            unroll=unroll,
        )(spec.heads, spec.hidden, compute, tokens, name="blocks")
        rates = jnp.linspace(self.first_drop_path, spec.drop_path, spec.depth)
        x_BND = x_BND.astype(compute.residual_dtype)
        uneven = compute.attention == "cudnn" and tokens % 2
        if uneven:
            x_BND = jnp.pad(x_BND, ((0, 0), (0, 1), (0, 0)))
        y_BND, blocks_MBND = blocks(
            x_BND, rates, deterministic or spec.drop_path == 0, return_blocks
        )
        if uneven:
            y_BND = y_BND[:, :tokens]
            blocks_MBND = None if blocks_MBND is None else blocks_MBND[:, :, :tokens]
        return y_BND, blocks_MBND


class Encoder(nn.Module):
    """Patches to tokens: linear embedding, positions, cls token, blocks, final norm.

    Embeds only the patches that it is given. The positions are the fixed sine-cosine table, or,
    with `spec.encoder.trained_positions`, a parameter that starts as that table.
    """

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        patches_BKP: Array,
        keep_BK: Array | None = None,
        deterministic: bool = True,
        hidden_BL: Array | None = None,
        return_blocks: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Encode patches.

        Args:
          patches_BKP: patches of the normalised image, as `patchify` lays them out.
          keep_BK: the row-major index of each patch; None = all of them, in order.
          deterministic: no drop path.
          hidden_BL: 1 where a mask token takes the place of a patch; None = nowhere.
          return_blocks: also return the tokens that enter the first block and leave each.

        Returns:
          (B, 1 + K, D), the cls token first, float32 after the final norm. With `return_blocks` a
          pair: the same, and (1 + depth, B, 1 + K, D) before the final norm.
        """
        spec, width = self.spec, self.spec.encoder.width
        bias_init = torch_conv_init(patches_BKP.shape[-1])
        x_BKD = dense(width, self.compute, "patch_embed", bias_init=bias_init)(patches_BKP)
        if hidden_BL is not None:
            token_11D = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, width))
            x_BKD = jnp.where(hidden_BL[..., None] > 0, token_11D.astype(x_BKD.dtype), x_BKD)
        table_ND = positions(self, spec.encoder, spec.grid)
        patches_KD = table_ND[1:] if keep_BK is None else table_ND[1:][keep_BK]
        x_BKD = x_BKD.astype(self.compute.residual_dtype) + patches_KD

        cls_11D = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, width))
        cls_B1D = jnp.broadcast_to(cls_11D + table_ND[0], (len(x_BKD), 1, width))
        x_BND = jnp.concatenate([cls_B1D.astype(x_BKD.dtype), x_BKD], axis=1)
        stack = Stack(spec.encoder, self.compute, name="stack")
        y_BND, blocks_MBND = stack(x_BND, deterministic, return_blocks)
        if self.final_norm:
            y_BND = layer_norm("norm")(y_BND)
        if blocks_MBND is None:
            return y_BND
        first_1BND = x_BND.astype(blocks_MBND.dtype)[None]
        return y_BND, jnp.concatenate([first_1BND, blocks_MBND])


def positions(module: nn.Module, spec: ViTSpec, grid: tuple[int, int]) -> Array:
    """Return the position table (1 + L, D) of an encoder or decoder, cls token first."""
    table_ND = jnp.asarray(sincos_2d(spec.width, grid))
    if spec.trained_positions:
        return module.param("pos_embed", lambda rng: table_ND[None])[0]
    return table_ND
