"""The linear layers of every network, and in which type their gradients are summed."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mae_jax.models.compute import ComputeConfig
from mae_jax.models.kernels import FLOAT32_SUMS, add_bias, summed_in_float32

# On the (in, out) matrix; q, k, v and heads are one `out`: the fused qkv matrix.
xavier = nn.initializers.xavier_uniform()


def dense(
    features: int, compute: ComputeConfig, name: str, bias_init: Callable = nn.initializers.zeros
) -> nn.Dense:
    """Return a linear layer that multiplies in `compute.dtype`."""
    sums: dict[str, Any] = FLOAT32_SUMS if compute.float32_sums else {}
    return nn.Dense(
        features, dtype=compute.dtype, kernel_init=xavier, bias_init=bias_init, name=name, **sums
    )


def linear(x_BNI: Array, kernel_IO: Array, bias_O: Array, compute: ComputeConfig) -> Array:
    """Return x @ kernel + bias in the type of `x_BNI`; the gradient of the bias: `add_bias`."""
    y_BNO = summed_in_float32(x_BNI, kernel_IO) if compute.float32_sums else x_BNI @ kernel_IO
    return add_bias(y_BNO, bias_O, compute.plain_biases)


class Weights(nn.Module):
    """A kernel of shape (*inner, *outer) and a bias, initialised as the (in, out) matrix.

    Both come in `compute.dtype`, for `linear`; the kernel in float32 if its gradients are.
    """

    inner: tuple[int, ...]
    outer: tuple[int, ...]

    @nn.compact
    def __call__(self, compute: ComputeConfig) -> tuple[Array, Array]:
        flat = math.prod(self.inner), math.prod(self.outer)
        shape = (*self.inner, *self.outer)
        kernel = self.param("kernel", lambda rng: xavier(rng, flat).reshape(shape))
        bias = self.param("bias", nn.initializers.zeros, self.outer)
        kernel_dtype = jnp.float32 if compute.float32_sums else compute.dtype
        return kernel.astype(kernel_dtype), bias.astype(compute.dtype)
