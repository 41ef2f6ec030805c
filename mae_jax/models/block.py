"""The pre-norm Transformer block of MAE and its parts. Shape suffixes as in models/vit.py."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.models.attention import Attention
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.dense import dense


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x_BND: Array, scale_D: Array, bias_D: Array, epsilon: float = 1e-6) -> Array:
    """Return the layer normalisation in float32, with a two-pass variance.

    The backward pass keeps the input and two numbers for each token. Derived by JAX, it would write
    and read again one more float32 array as large as the input.
    """
    return _normalise_forward(x_BND, scale_D, bias_D, epsilon)[0]


def _normalise_forward(
    x_BND: Array, scale_D: Array, bias_D: Array, epsilon: float
) -> tuple[Array, tuple]:
    x_float_BND = x_BND.astype(jnp.float32)
    mean_BN1 = x_float_BND.mean(-1, keepdims=True)
    variance_BN1 = jnp.square(x_float_BND - mean_BN1).mean(-1, keepdims=True)
    inverse_BN1 = jax.lax.rsqrt(variance_BN1 + epsilon)
    y_BND = (x_float_BND - mean_BN1) * (inverse_BN1 * scale_D) + bias_D
    return y_BND, (x_BND, mean_BN1, inverse_BN1, scale_D)


def _normalise_backward(_: float, residuals: tuple, grad_BND: Array) -> tuple[Array, Array, Array]:
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

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        shape = x_BND.shape[-1:]
        scale_D = self.param("scale", nn.initializers.ones, shape)
        bias_D = self.param("bias", nn.initializers.zeros, shape)
        return normalise(x_BND, scale_D, bias_D, self.epsilon)


def layer_norm(name: str, epsilon: float = 1e-6) -> nn.Module:
    """Return the LayerNorm of every network here."""
    return LayerNorm(epsilon, name=name)


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
    hidden: int
    compute: ComputeConfig
    tokens: int | None = None  # of N, the real ones; None = all

    @nn.compact
    def __call__(
        self, x_BND: Array, drop_path: Array, deterministic: bool, return_blocks: bool = False
    ) -> tuple[Array, Array | None]:
        def drop(branch_BND: Array) -> Array:
            return drop_branch(self, branch_BND.astype(x_BND.dtype), drop_path, deterministic)

        compute = self.compute
        x_BND = compute.constrain(x_BND)
        attention = Attention(self.heads, compute, self.tokens, name="attn")
        x_BND = x_BND + drop(attention(layer_norm("norm1")(x_BND)))
        mlp = Mlp(self.hidden, compute, name="mlp")
        x_BND = x_BND + drop(mlp(layer_norm("norm2")(x_BND)))
        x_BND = compute.constrain(x_BND)
        return x_BND, x_BND if return_blocks else None
