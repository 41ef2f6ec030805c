"""Heads on frozen features: a linear one behind a bare batch norm, and an attentive one.

Shape suffixes as in models/vit.py, and R heads that are trained side by side.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from mae_jax.models.block import LayerNorm
from mae_jax.models.dense import xavier
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder

EPSILON = 1e-6  # of batch and layer norm; docs/REFERENCE.md section 4
MOMENTUM = 0.9  # share of the old running statistics that stays; PyTorch calls it 0.1


class BatchStats(NamedTuple):
    """Running statistics of a batch norm."""

    mean: Array  # (D,)
    var: Array  # (D,)


def initial_stats(width: int) -> BatchStats:
    """Return the running statistics before training: mean 0, variance 1."""
    return BatchStats(jnp.zeros(width), jnp.ones(width))


def batch_norm(x_BD: Array, stats: BatchStats, group: int, train: bool) -> tuple[Array, BatchStats]:
    """Normalise each feature, without scale and bias, as the official linear probe does.

    Training takes the statistics of each group of `group` consecutive images, which stands for the
    batch of one GPU. The running statistics follow the first group, as the official code hands
    those of the first GPU to all others; their variance divides by n - 1. Evaluation takes the
    running statistics.

    Args:
      group: divides the batch; used in training only.
    """
    x_BD = x_BD.astype(jnp.float32)
    if not train:
        return (x_BD - stats.mean) / jnp.sqrt(stats.var + EPSILON), stats
    x_GND = rearrange(x_BD, "(g n) d -> g n d", n=group)
    mean_G1D = x_GND.mean(1, keepdims=True)
    var_G1D = jnp.square(x_GND - mean_G1D).mean(1, keepdims=True)
    y_BD = rearrange((x_GND - mean_G1D) / jnp.sqrt(var_G1D + EPSILON), "g n d -> (g n) d")
    unbiased_D = var_G1D[0, 0] * group / (group - 1)
    return y_BD, BatchStats(
        MOMENTUM * stats.mean + (1 - MOMENTUM) * mean_G1D[0, 0],
        MOMENTUM * stats.var + (1 - MOMENTUM) * unbiased_D,
    )


def pool(tokens_BND: Array) -> dict[str, Array]:
    """Return (B, D) float32 features: the cls token, and the mean of the patch tokens."""
    tokens_BND = tokens_BND.astype(jnp.float32)
    return {"cls": tokens_BND[:, 0], "mean": tokens_BND[:, 1:].mean(1)}


def pool_blocks(last_BND: Array, blocks_MBND: Array) -> dict[str, Array]:
    """Return the features of `pool` after each block, (depth, B, D), from what an encoder returns.

    The last block's are those after the final norm; the norm was not trained for the others, which
    stay without one.
    """
    pooled = jax.vmap(pool)(blocks_MBND[1:])
    return jax.tree.map(lambda x, last: x.at[-1].set(last), pooled, pool(last_BND))


def first_blocks(spec: ModelSpec, encoder: Mapping, number: int) -> tuple[ModelSpec, dict]:
    """Return the network of the first blocks of an encoder, and its parameters."""
    blocks = jax.tree.map(lambda x: x[:number], encoder["stack"]["blocks"])
    spec = replace(spec, encoder=replace(spec.encoder, depth=number))
    return spec, {**encoder, "stack": {"blocks": blocks}}


def patch_tokens(encoder: Encoder, params: dict, patches_BLP: Array, block: int) -> Array:
    """Return the patch tokens (B, L, D) after a block, counted from 1, in float32.

    Those of the last block come after the final norm, as in `pool_blocks`. No later block is run.
    """
    spec = encoder.spec
    if block < spec.encoder.depth:
        spec, params = first_blocks(spec, params, block)
        encoder = Encoder(spec, encoder.compute, final_norm=False)
    tokens_BND: Any = encoder.apply({"params": params}, patches_BLP)
    return tokens_BND[:, 1:].astype(jnp.float32)


def bare_norm(x_BD: Array) -> Array:
    """Apply a LayerNorm without scale and bias, as an untrained fc_norm does."""
    x_BD = x_BD - x_BD.mean(-1, keepdims=True)
    return x_BD / jnp.sqrt(jnp.square(x_BD).mean(-1, keepdims=True) + EPSILON)


class LinearHead(nn.Module):
    """Features to logits; starts from normal(0.01) and bias 0 (docs/REFERENCE.md section 4)."""

    classes: int

    @nn.compact
    def __call__(self, x_BD: Array) -> Array:
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="head")(x_BD)


class AttentiveHead(nn.Module):
    """Tokens to logits: a trained query attends to all of them, then a norm and a linear layer."""

    classes: int
    heads: int

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        width = x_BLD.shape[-1]
        split = (self.heads, width // self.heads)
        x_BLD = x_BLD.astype(jnp.float32)
        query_1SF = self.param("query_token", nn.initializers.normal(0.02), (1, *split))
        kv_BL2SF = nn.DenseGeneral((2, *split), kernel_init=xavier, name="kv")(x_BLD)
        query_B1SF = jnp.broadcast_to(query_1SF[None], (len(x_BLD), 1, *split))
        y_B1SF = jax.nn.dot_product_attention(query_B1SF, kv_BL2SF[:, :, 0], kv_BL2SF[:, :, 1])
        y_BD = rearrange(y_B1SF, "b 1 s f -> b (s f)")
        return LinearHead(self.classes, name="linear")(LayerNorm(name="norm")(y_BD))


def init_heads(head: nn.Module, rng: Array, example: Array, count: int) -> dict:
    """Return parameters of `count` heads, stacked on a leading axis, all with the same start."""
    params = head.init(rng, example)["params"]
    return jax.tree.map(lambda x: jnp.repeat(x[None], count, 0), params)


def apply_heads(head: nn.Module, params: dict, x: Array) -> Array:
    """Return the logits (B, R, Y) of each head for the same features."""

    def one(p: dict) -> Any:
        return head.apply({"params": p}, x)

    return jax.vmap(one, out_axes=1)(params)
