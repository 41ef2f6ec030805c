"""The masked autoencoder: encode what is visible, predict what is hidden.

Shape suffixes as in models/vit.py.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mae_jax.models import modern
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.dense import dense
from mae_jax.models.masking import Mask
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder, Stack, merge_cls, positions


class Decoder(nn.Module):
    """A decoder that predicts every patch; one mask token stands for each hidden patch.

    Without `restore_BL` every patch was encoded (`tokens_in_encoder`), and none needs the token.
    """

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, latent_BND: Array, restore_BL: Array | None = None) -> Array:
        vit, n_cls = self.spec.decoder, self.spec.cls_tokens
        assert vit is not None
        x_BNE = dense(latent_BND, vit.width, self.compute, "embed")
        x_BNE = x_BNE.astype(self.compute.residual_dtype)
        if restore_BL is not None:
            token_11E = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, vit.width))
            x_BNE = unshuffle(x_BNE, token_11E, restore_BL, n_cls)
        x_BNE = x_BNE + positions(self, vit, self.spec)
        extra = modern.extra(self, vit, self.spec.grid, None, n_cls)
        x_BNE, _ = Stack(vit, self.compute, name="stack")(x_BNE, extra=extra)
        x_BLE = modern.norm("norm", vit.block)(x_BNE[:, n_cls:])
        return dense(x_BLE, self.spec.target_dim, self.compute, "pred").astype(jnp.float32)


def unshuffle(x_BNE: Array, token_11E: Array, restore_BL: Array, cls_tokens: int = 1) -> Array:
    """Put encoded patches back in their places, and the mask token in those of hidden patches.

    Args:
      x_BNE: the class tokens, then the kept patches in the order of `Mask.keep_BK`.
      restore_BL: `Mask.restore_BL`.

    Returns:
      (B, cls_tokens + L, E), the class tokens first, then all patches row-major.
    """
    batch, num_patches = restore_BL.shape
    num_hidden = num_patches - (x_BNE.shape[1] - cls_tokens)
    shape = (batch, num_hidden, x_BNE.shape[-1])
    mask_tokens = jnp.broadcast_to(token_11E.astype(x_BNE.dtype), shape)
    shuffled_BLE = jnp.concatenate([x_BNE[:, cls_tokens:], mask_tokens], axis=1)
    x_BLE = jnp.take_along_axis(shuffled_BLE, restore_BL[..., None], axis=1)
    return jnp.concatenate([x_BNE[:, :cls_tokens], x_BLE], axis=1)


class MAE(nn.Module):
    """Encoder and decoder: patches and their mask in, a prediction for every patch out.

    Args:
      make_decoder: `Decoder`, or a module of the same arguments that config.model.decoder names.
    """

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()
    make_decoder: Callable[..., nn.Module] = Decoder

    def setup(self) -> None:
        self.encoder = Encoder(self.spec, self.compute, merge=False)
        self.decoder = self.make_decoder(self.spec, self.compute)

    def encode(self, patches_BLP: Array, mask: Mask | None = None) -> Any:
        """Return the latent: (B, 1 + K, D), the cls token and the patches of `mask.keep_BK`.

        With `spec.tokens_in_encoder` (hidden patches are mask tokens) encode all patches in
        row-major order, (B, 1 + L, D), as without a mask. The latent has every class token if
        there are several; without a mask it has their mean.
        """
        if mask is None:
            tokens_BND: Any = self.encoder(patches_BLP)
            return merge_cls(tokens_BND, self.spec.cls_tokens)
        if self.spec.tokens_in_encoder:
            return self.encoder(patches_BLP, hidden_BL=mask.mask_BL)
        visible_BKP = jnp.take_along_axis(patches_BLP, mask.keep_BK[..., None], axis=1)
        return self.encoder(visible_BKP, mask.keep_BK)

    def decode(self, latent_BND: Array, mask: Mask) -> Array:
        """Return a prediction for every patch from what `encode` gave: (B, L, T), float32."""
        return self.decoder(latent_BND, None if self.spec.tokens_in_encoder else mask.restore_BL)

    def __call__(self, patches_BLP: Array, mask: Mask) -> Array:
        """Return a prediction for every patch, in row-major order: (B, L, T), float32."""
        return self.decode(self.encode(patches_BLP, mask), mask)


def masked_mse(pred_BLT: Array, target_BLT: Array, mask_BL: Array) -> Array:
    """Return the mean squared error over hidden patches only (mask 1), a scalar."""
    return masked_mean(jnp.square(pred_BLT - target_BLT).mean(-1), mask_BL)


def masked_mean(error_BL: Array, mask_BL: Array) -> Array:
    """Return the mean of an error over hidden patches only (mask 1), a scalar."""
    return (error_BL * mask_BL).sum() / mask_BL.sum()
