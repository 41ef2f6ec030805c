"""CrossMAE: hidden patches look at the visible ones, and not at each other (Fu et al., 2024).

Source: arXiv 2401.14391v2. Without self-attention in the decoder a prediction does not depend on
the others, so that training need predict only a share of the hidden patches. Each decoder block
reads a weighted sum of the tokens after all encoder blocks, with weights of its own.

Attention is our own on every device: cuDNN's saves an array of (B, S, N, N), which is small here.

Shape suffixes as in models/vit.py, and Q predicted patches, G decoder blocks.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from mae_jax.errors import UserError
from mae_jax.models import mae
from mae_jax.models.attention import attend
from mae_jax.models.block import LayerNorm, Mlp
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.dense import Weights, dense, linear
from mae_jax.models.masking import Mask
from mae_jax.models.spec import ModelSpec, ViTSpec
from mae_jax.models.vit import Encoder, positions


class CrossAttention(nn.Module):
    """Multi-head attention of the predicted patches to the encoder's tokens."""

    heads: int
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BQE: Array, tokens_BND: Array) -> Array:
        heads = (self.heads, x_BQE.shape[-1] // self.heads)

        def project(y_BND: Array, name: str) -> Array:
            weights = Weights(y_BND.shape[-1:], heads, name=name)()
            y_BNE = linear(y_BND, *weights, self.compute, float32_bias=True)
            return y_BNE.reshape(*y_BND.shape[:2], *heads)

        y_BQSF = attend(project(x_BQE, "q"), project(tokens_BND, "k"), project(tokens_BND, "v"))
        weights = Weights(heads, x_BQE.shape[-1:], name="proj")()
        return linear(y_BQSF.reshape(x_BQE.shape), *weights, self.compute, float32_bias=True)


class Block(nn.Module):
    """x + CrossAttention(LN(x), LN(tokens)), then x + MLP(LN(x)); returns (x, None), for a scan."""

    heads: int
    mlp_width: int
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BQE: Array, tokens_BND: Array) -> tuple[Array, None]:
        constrain = self.compute.constrain
        norm = partial(LayerNorm, one_pass=self.compute.one_pass_norms)
        x_BQE, tokens_BND = constrain(x_BQE), norm(name="norm_tokens")(constrain(tokens_BND))
        attention = CrossAttention(self.heads, self.compute, name="attn")
        x_BQE = x_BQE + attention(norm(name="norm1")(x_BQE), tokens_BND).astype(x_BQE.dtype)
        mlp = Mlp(self.mlp_width, self.compute, name="mlp")
        x_BQE = x_BQE + mlp(norm(name="norm2")(x_BQE)).astype(x_BQE.dtype)
        return constrain(x_BQE), None


class Stack(nn.Module):
    """`spec.depth` blocks as one scan, each with tokens of its own; see `vit.Stack`."""

    spec: ViTSpec
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BQE: Array, tokens_GBND: Array) -> Array:
        spec, compute = self.spec, self.compute
        unroll = 1 if self.is_initializing() else compute.scan_unroll
        block = nn.remat(Block, prevent_cse=unroll >= spec.depth) if compute.remat else Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=spec.depth,
            unroll=unroll,
        )(spec.heads, spec.mlp_width, compute, name="blocks")
        return blocks(x_BQE.astype(compute.residual_dtype), tokens_GBND)[0]


class Decoder(nn.Module):
    """A decoder that predicts some patches from the tokens of encoder blocks."""

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, tokens_MBND: Array, query_BQ: Array) -> Array:
        """Return predictions (B, Q, T), float32.

        Args:
          tokens_MBND: from the encoder, before and after its blocks, or after some of them.
          query_BQ: the row-major index of each patch to predict.
        """
        vit = self.spec.decoder
        assert vit is not None
        maps = len(tokens_MBND)
        deviation = nn.initializers.normal(maps**-0.5)
        weights_GM = self.param("map_weights", deviation, (vit.depth, maps))
        tokens_GBND = jnp.einsum("gm,mbnd->gbnd", weights_GM, tokens_MBND.astype(jnp.float32))

        token_11E = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, vit.width))
        x_BQE = token_11E + positions(self, vit, self.spec)[1:][query_BQ]
        tokens_GBND = tokens_GBND.astype(self.compute.residual_dtype)
        x_BQE = Stack(vit, self.compute, name="stack")(x_BQE, tokens_GBND)
        x_BQE = LayerNorm(name="norm")(x_BQE)
        return dense(x_BQE, self.spec.target_dim, self.compute, "pred").astype(jnp.float32)


class CrossMAE(mae.MAE):
    """Encoder and decoder: patches, their mask and a choice of patches in, their predictions out.

    The decoder reads tokens without the encoder's final norm. The norm stays as it starts, without
    effect on training; uses of the encoder alone have it.

    Args:
      maps: how many of the depth + 1 tokens before and after blocks the decoder reads; 0 = all.
    """

    maps: int = 0

    def setup(self) -> None:
        self.encoder = Encoder(self.spec, self.compute)
        self.decoder = Decoder(self.spec, self.compute)

    def predict(self, patches_BLP: Array, mask: Mask, query_BQ: Array) -> tuple[Array, Array]:
        """Return the latent (B, 1 + K, D), and predictions (B, Q, T) of the patches in query_BQ."""
        visible_BKP = jnp.take_along_axis(patches_BLP, mask.keep_BK[..., None], axis=1)
        latent_BND, blocks_MBND = self.encoder(visible_BKP, mask.keep_BK, return_blocks=True)
        chosen = choose_maps(self.spec.encoder.depth, self.maps)
        return latent_BND, self.decoder(blocks_MBND[chosen], query_BQ)

    def __call__(self, patches_BLP: Array, mask: Mask) -> Array:
        """Return a prediction for every patch, in row-major order: (B, L, T), float32."""
        all_BL = jnp.broadcast_to(jnp.arange(patches_BLP.shape[1]), patches_BLP.shape[:2])
        return self.predict(patches_BLP, mask, all_BL)[1]


def choose_maps(depth: int, maps: int) -> np.ndarray:
    """Return which tokens are read of the depth + 1 before and after blocks: evenly, to the last.

    Raises:
      UserError: `maps` is more than depth + 1.
    """
    if maps > depth + 1:
        raise UserError(
            f"config.model.decoder_maps={maps}: an encoder of {depth} blocks has {depth + 1},"
            " before and after each: give at most that, or 0 for all"
        )
    count = maps or depth + 1
    return np.linspace(depth, 0, count, endpoint=count > depth).round().astype(int)[::-1]


def draw_queries(mask_BL: Array, noise_BL: Array, count: int) -> Array:
    """Return the row-major indices (B, Q) of the hidden patches with the lowest noise."""
    order_BL = jnp.argsort(jnp.where(mask_BL > 0, noise_BL, jnp.inf), axis=1)
    return order_BL[:, :count]
