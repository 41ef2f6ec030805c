"""The masked autoencoder: encode what is visible, predict what is hidden."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mae_jax.models.masking import Mask
from mae_jax.models.posemb import sincos_2d
from mae_jax.models.vit import Encoder, Execution, Stack, layer_norm, xavier


class Decoder(nn.Module):
    """Encoded patches plus a shared mask token for each hidden one, to values of every patch.

    Without `restore_BL` all patches were encoded, in their order, and none needs a token. Positions
    as in `vit.Encoder`.
    """

    grid: tuple[int, int]
    values: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    execution: Execution = Execution()
    trained_positions: bool = False

    @nn.compact
    def __call__(self, latent_BND: Array, restore_BL: Array | None = None) -> Array:
        dtype = self.execution.dtype
        x_BNE = nn.Dense(self.width, dtype=dtype, kernel_init=xavier, name="embed")(latent_BND)
        x_BNE = x_BNE.astype(self.execution.residual_dtype)
        if restore_BL is not None:
            token_11E = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
            batch, num_patches = restore_BL.shape
            hidden = num_patches - (x_BNE.shape[1] - 1)
            token_BHE = jnp.broadcast_to(token_11E.astype(x_BNE.dtype), (batch, hidden, self.width))
            shuffled_BLE = jnp.concatenate([x_BNE[:, 1:], token_BHE], axis=1)
            x_BLE = jnp.take_along_axis(shuffled_BLE, restore_BL[..., None], axis=1)
            x_BNE = jnp.concatenate([x_BNE[:, :1], x_BLE], axis=1)
        table = jnp.asarray(sincos_2d(self.width, self.grid))
        if self.trained_positions:
            table = self.param("pos_embed", lambda rng: table[None])[0]
        x_BNE = x_BNE + table
        x_BNE = Stack(self.depth, self.heads, self.mlp_ratio, self.execution, name="stack")(x_BNE)
        x_BNE = layer_norm("norm")(x_BNE)
        pred_BNP = nn.Dense(self.values, dtype=dtype, kernel_init=xavier, name="pred")(x_BNE)
        return pred_BNP[:, 1:].astype(jnp.float32)


class MAE(nn.Module):
    """Encoder and decoder; patches and their mask in, a prediction for every patch out.

    With `tokens_in_encoder` the encoder sees every patch, hidden ones as a mask token of its own:
    what the paper's Table 1c compares with, three times the work and worse features.
    """

    encoder: Encoder
    decoder: Decoder
    tokens_in_encoder: bool = False

    def encode(self, patches_BLP: Array, mask: Mask) -> Array:
        """(B, 1 + K, D): the cls token, then the kept patches in the order of `mask.keep_BK`.

        With `tokens_in_encoder` (B, 1 + L, D): every patch, row-major.
        """
        if self.tokens_in_encoder:
            return self.encoder(patches_BLP, hidden_BL=mask.mask_BL)
        visible_BKP = jnp.take_along_axis(patches_BLP, mask.keep_BK[..., None], axis=1)
        return self.encoder(visible_BKP, mask.keep_BK)

    def decode(self, latent_BND: Array, mask: Mask) -> Array:
        """(B, L, P): what `encode` gave, to a prediction for every patch, row-major, float32."""
        return self.decoder(latent_BND, None if self.tokens_in_encoder else mask.restore_BL)

    def __call__(self, patches_BLP: Array, mask: Mask) -> Array:
        """(B, L, P): a prediction for every patch, in row-major order, float32."""
        return self.decode(self.encode(patches_BLP, mask), mask)


def build(
    grid: tuple[int, int],
    values: int,
    *,
    width: int,
    depth: int,
    heads: int,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    mlp_ratio: float = 4.0,
    tokens_in_encoder: bool = False,
    execution: Execution = Execution(),
) -> MAE:
    """A masked autoencoder for a (rows, columns) grid of patches of `values` numbers each.

    Raises:
      ValueError: a width that its heads do not divide.
    """
    for name, wide, split in (("", width, heads), ("decoder_", decoder_width, decoder_heads)):
        if wide % split:
            raise ValueError(
                f"{name}width={wide} is not divisible by {name}heads={split}:"
                f" choose a multiple such as {name}width={(wide // split + 1) * split}"
            )
    return MAE(
        Encoder(grid, width, depth, heads, mlp_ratio, execution=execution),
        Decoder(grid, values, decoder_width, decoder_depth, decoder_heads, mlp_ratio, execution),
        tokens_in_encoder,
    )


def masked_mse(pred_BLP: Array, target_BLP: Array, mask_BL: Array) -> Array:
    """Mean squared error over hidden patches only (mask 1); a scalar."""
    error_BL = jnp.square(pred_BLP - target_BLP).mean(-1)
    return (error_BL * mask_BL).sum() / mask_BL.sum()
