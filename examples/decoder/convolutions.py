"""A decoder of 3 x 3 convolutions on the grid of patches, as cheap as data2vec 2.0's."""

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mae_jax import optim, sharding
from mae_jax.models.block import LayerNorm
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.kernels import gelu
from mae_jax.models.mae import unshuffle
from mae_jax.models.spec import ModelSpec

# Parameters with names of their own: what they are for the optimizer, and how a mesh splits them.
optim.ROLES.append((r"/conv\d+/kernel", "matrix"))
sharding.RULES.append((r"/conv\d+/kernel$", P(None, None, None, "fsdp")))


class Decoder(nn.Module):
    """`decoder_depth` residual convolutions, `decoder_width` wide, in `decoder_heads` groups."""

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, latent_BND, restore_BL):
        """Return a prediction for every patch, (B, L, T), from class tokens and kept patches."""
        vit, dtype, (rows, cols) = self.spec.decoder, self.compute.dtype, self.spec.grid
        x_BNE = nn.Dense(vit.width, dtype=dtype, name="embed")(latent_BND)
        token_11E = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, vit.width))
        n_cls = self.spec.cls_tokens
        x_BLE = unshuffle(x_BNE, token_11E, restore_BL, n_cls)[:, n_cls:]
        x_BHWE = x_BLE.reshape(-1, rows, cols, vit.width).astype(jnp.float32)
        for i in range(vit.depth):
            conv = nn.Conv(
                vit.width, (3, 3), feature_group_count=vit.heads, dtype=dtype, name=f"conv{i}"
            )
            x_BHWE += gelu(conv(LayerNorm(name=f"norm{i}")(x_BHWE)))
        x_BLE = LayerNorm(name="norm")(x_BHWE).reshape(x_BLE.shape)
        return nn.Dense(self.spec.target_dim, dtype=dtype, name="pred")(x_BLE).astype(jnp.float32)
