"""The Vision Transformer of MAE: blocks, stacked on a leading layer axis, and the encoder.

Shape suffixes, here and in the whole package: B batch, H W image, C channels, L patches, K kept
patches, N tokens, D width, E decoder width, P patch dim, T target dim, S heads, F head width,
Y classes, M = depth + 1: the tokens before the first block and after each.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.models import modern
from mae_jax.models.block import Block
from mae_jax.models.channel_groups import sincos_table
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.dense import dense
from mae_jax.models.spec import ModelSpec, ViTSpec


def torch_conv_init(fan_in: int) -> Callable:
    """Return PyTorch's initialiser of a convolution, U(+-1/sqrt(fan_in)); MAE keeps its bias so."""
    bound = fan_in**-0.5

    def init(rng, shape, dtype=jnp.float32):
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


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
        self,
        x_BND: Array,
        deterministic: bool = True,
        return_blocks: bool = False,
        extra: modern.Extra | None = None,
    ) -> tuple[Array, Array | None]:
        """Return the tokens after the last block and, if asked, after each: (depth, B, N, D).

        `extra` is what `modern.extra` gives for stacks with `spec.block`.

        Initialising always loops: the parameters are the same, and an unrolled init of L/16 took
        36 s.
        """
        spec, compute, given = self.spec, self.compute, x_BND.shape[1]
        x_BND = modern.append_registers(x_BND, extra)
        tokens = x_BND.shape[1]
        unroll = 1 if self.is_initializing() else compute.scan_unroll
        block, options = (modern.ModernBlock, (spec.block, extra)) if spec.block else (Block, ())
        if compute.remat:
            # Without a loop between them, XLA would merge the recomputation with the forward pass.
            block = nn.remat(block, prevent_cse=unroll >= spec.depth, static_argnums=(3, 4))
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=spec.depth,
            unroll=unroll,
        )(spec.heads, spec.mlp_width, compute, tokens, *options, name="blocks")
        rates = jnp.linspace(self.first_drop_path, spec.drop_path, spec.depth)
        x_BND = x_BND.astype(compute.residual_dtype)
        uneven = compute.attention == "cudnn" and tokens % 2
        if uneven:
            x_BND = jnp.pad(x_BND, ((0, 0), (0, 1), (0, 0)))
        y_BND, blocks_MBND = blocks(
            x_BND, rates, deterministic or spec.drop_path == 0, return_blocks
        )
        if y_BND.shape[1] > given:
            y_BND = y_BND[:, :given]
            blocks_MBND = None if blocks_MBND is None else blocks_MBND[:, :, :given]
        return y_BND, blocks_MBND


class Encoder(nn.Module):
    """Patches to tokens: linear embedding, positions, cls token, blocks, final norm.

    Embeds only the patches that it is given. The positions are the fixed sine-cosine table, or,
    with `spec.encoder.trained_positions`, a parameter that starts as that table.
    """

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()
    final_norm: bool = True
    merge: bool = True  # several class tokens become one, their mean

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
        spec, width, n_cls = self.spec, self.spec.encoder.width, self.spec.cls_tokens
        bias_init = torch_conv_init(patches_BKP.shape[-1])
        x_BKD = dense(patches_BKP, width, self.compute, "patch_embed", bias_init)
        if hidden_BL is not None:
            token_11D = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, width))
            x_BKD = jnp.where(hidden_BL[..., None] > 0, token_11D.astype(x_BKD.dtype), x_BKD)
        table_ND = positions(self, spec.encoder, spec)
        places = table_ND[n_cls:] if keep_BK is None else table_ND[n_cls:][keep_BK]
        x_BKD = x_BKD.astype(self.compute.residual_dtype) + places

        cls_1ND = self.param("cls_token", nn.initializers.normal(0.02), (1, n_cls, width))
        cls_BND = jnp.broadcast_to(cls_1ND + table_ND[:n_cls], (len(x_BKD), n_cls, width))
        x_BND = jnp.concatenate([cls_BND.astype(x_BKD.dtype), x_BKD], axis=1)
        stack = Stack(spec.encoder, self.compute, name="stack")
        extra = modern.extra(self, spec.encoder, spec.grid, keep_BK, n_cls)
        y_BND, blocks_MBND = stack(x_BND, deterministic, return_blocks, extra)
        if self.final_norm:
            y_BND = modern.norm("norm", spec.encoder.block)(y_BND)
        if self.merge:
            y_BND = merge_cls(y_BND, n_cls)
        if blocks_MBND is None:
            return y_BND
        first_1BND = x_BND.astype(blocks_MBND.dtype)[None]
        blocks_MBND = jnp.concatenate([first_1BND, blocks_MBND])
        return y_BND, merge_cls(blocks_MBND, n_cls) if self.merge else blocks_MBND


def merge_cls(x_BND: Array, cls_tokens: int) -> Array:
    """Return tokens with the mean of the class tokens in place of them; B may be several axes."""
    if cls_tokens == 1:
        return x_BND
    mean_B1D = x_BND[..., :cls_tokens, :].mean(-2, keepdims=True)
    return jnp.concatenate([mean_B1D, x_BND[..., cls_tokens:, :]], axis=-2)


def positions(module: nn.Module, vit: ViTSpec, spec: ModelSpec) -> Array:
    """Return the position table (N, D) of an encoder or decoder, class tokens first."""
    table_ND = jnp.asarray(sincos_table(vit.width, spec.grid, spec.cls_tokens, spec.num_groups))
    if vit.trained_positions:
        return module.param("pos_embed", lambda rng: table_ND[None])[0]
    return table_ND
