"""The pre-norm Transformer block of MAE and its parts. Shape suffixes as in models/vit.py."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.models.attention import attend, attend_cudnn
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.dense import Weights, dense, linear
from mae_jax.models.kernels import gelu, normalise


class LayerNorm(nn.Module):
    """Layer normalisation in float32 over the last axis, with a scale and a bias."""

    epsilon: float = 1e-6
    one_pass: bool = False  # the variance is E[x^2] - E[x]^2

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        shape = x_BND.shape[-1:]
        scale_D = self.param("scale", nn.initializers.ones, shape)
        bias_D = self.param("bias", nn.initializers.zeros, shape)
        return normalise(x_BND, scale_D, bias_D, self.epsilon, self.one_pass)


class Attention(nn.Module):
    """Multi-head self-attention with one fused, biased q-k-v projection.

    Kernels are stored with an axis of heads and used as flat matrices, which TPUs multiply faster.
    """

    heads: int
    compute: ComputeConfig
    tokens: int | None = None  # of N, the real ones; None = all
    transform_qk: Callable = lambda q, k: (q, k)  # before they are multiplied

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        width, compute = x_BND.shape[-1], self.compute
        heads = (self.heads, width // self.heads)
        kernel_D3SF, bias_3SF = Weights((width,), (3, *heads), name="qkv")()
        kernel_SFD, bias_D = Weights(heads, (width,), name="proj")()
        x_BND = x_BND.astype(compute.dtype)  # once: gradients of q, k and v are added in this type
        # One product is faster, but in its matrix no axis can be split by heads.
        if compute.split_heads:
            pairs = ((kernel_D3SF[:, i], bias_3SF[i]) for i in range(3))
            qkv = [linear(x_BND, *pair, compute, float32_bias=True) for pair in pairs]
        else:
            y = linear(x_BND, kernel_D3SF, bias_3SF, compute, float32_bias=True)
            qkv = jnp.split(y, 3, axis=-1)
        q_BNSF, k_BNSF, v_BNSF = (y.reshape(*y.shape[:2], *heads) for y in qkv)
        q_BNSF, k_BNSF = self.transform_qk(q_BNSF, k_BNSF)
        if compute.attention == "cudnn":
            y_BNSF = attend_cudnn(q_BNSF, k_BNSF, v_BNSF, self.tokens or x_BND.shape[1])
        else:
            y_BNSF = attend(q_BNSF, k_BNSF, v_BNSF)
        y_BND = y_BNSF.reshape(x_BND.shape)
        return linear(y_BND, kernel_SFD, bias_D, compute, float32_bias=True)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between.

    The backward pass computes the GELU again, so that of the `mlp_width` wide arrays only the
    output of the first layer is kept.
    """

    mlp_width: int
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        h_BNH = dense(x_BND, self.mlp_width, self.compute, "fc1")
        weights = Weights(h_BNH.shape[-1:], x_BND.shape[-1:], name="fc2")()
        fc2 = jax.checkpoint(lambda h, k, b: linear(gelu(h), k, b, self.compute), prevent_cse=False)
        return fc2(h_BNH, *weights)


def drop_branch(module: nn.Module, branch_BND: Array, rate: Array, deterministic: bool) -> Array:
    """Return a branch of a block; in training, 0 for a share of samples (arXiv 1603.09382)."""
    if deterministic:
        return branch_BND
    shape = (branch_BND.shape[0], 1, 1)
    kept_B11 = jax.random.bernoulli(module.make_rng("drop_path"), 1 - rate, shape)
    return jnp.where(kept_B11, branch_BND / (1 - rate), 0).astype(branch_BND.dtype)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)); drop path drops a branch for whole samples.

    Returns (tokens, tokens or None): the carry of the scan, and its output if `return_blocks`.
    """

    heads: int
    mlp_width: int
    compute: ComputeConfig
    tokens: int | None = None  # of N, the real ones; None = all

    @nn.compact
    def __call__(
        self, x_BND: Array, drop_path: Array, deterministic: bool, return_blocks: bool = False
    ) -> tuple[Array, Array | None]:
        def drop(branch_BND: Array) -> Array:
            return drop_branch(self, branch_BND.astype(x_BND.dtype), drop_path, deterministic)

        compute = self.compute
        norm = partial(LayerNorm, one_pass=compute.one_pass_norms)
        x_BND = compute.constrain(x_BND)
        attention = Attention(self.heads, compute, self.tokens, name="attn")
        x_BND = x_BND + drop(attention(norm(name="norm1")(x_BND)))
        mlp = Mlp(self.mlp_width, compute, name="mlp")
        x_BND = x_BND + drop(mlp(norm(name="norm2")(x_BND)))
        x_BND = compute.constrain(x_BND)
        return x_BND, x_BND if return_blocks else None
