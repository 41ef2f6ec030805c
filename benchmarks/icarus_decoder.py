"""The decoder of IcarusWizard's MAE in our terms: no projection, no norm at the end.

Its learned positions start from normal(0.02) (they truncate at two units). For
`config.model.decoder`, where decoder and encoder have the same width.
"""

import flax.linen as nn
import jax.numpy as jnp

from mae_jax.models.compute import ComputeConfig
from mae_jax.models.dense import dense
from mae_jax.models.mae import unshuffle
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Stack


class Decoder(nn.Module):
    """Takes the arguments of `mae_jax.models.mae.Decoder` and returns what that does."""

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, latent_BND, restore_BL):
        vit, normal = self.spec.decoder, nn.initializers.normal(0.02)
        token_11E = self.param("mask_token", normal, (1, 1, vit.width))
        x_BNE = unshuffle(latent_BND.astype(jnp.float32), token_11E, restore_BL)
        x_BNE += self.param("pos_embed", normal, (1, 1 + self.spec.num_patches, vit.width))
        x_BNE, _ = Stack(vit, self.compute, name="stack")(x_BNE)
        pred_BLT = dense(x_BNE[:, 1:], self.spec.target_dim, self.compute, "pred")
        return pred_BLT.astype(jnp.float32)
