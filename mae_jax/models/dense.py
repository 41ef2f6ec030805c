"""The linear layers of every network, and in which type their gradients are summed."""

import math
from collections.abc import Callable

import flax.linen as nn
from jax import Array

from mae_jax.models.compute import ComputeConfig
from mae_jax.models.kernels import summed_in_float32

# On the (in, out) matrix; q, k, v and heads are one `out`: the fused qkv matrix.
xavier = nn.initializers.xavier_uniform()


class Weights(nn.Module):
    """A kernel of shape (*inner, *outer) and a bias, initialised as the (in, out) matrix."""

    inner: tuple[int, ...]
    outer: tuple[int, ...]
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        flat = math.prod(self.inner), math.prod(self.outer)
        shape = (*self.inner, *self.outer)
        kernel = self.param("kernel", lambda rng: xavier(rng, flat).reshape(shape))
        return kernel, self.param("bias", self.bias_init, self.outer)


def multiply(x_BNI: Array, kernel_IO: Array, compute: ComputeConfig) -> Array:
    """Return x @ kernel in `compute.dtype`."""
    x_BNI = x_BNI.astype(compute.dtype)
    if compute.float32_sums:
        return summed_in_float32(x_BNI, kernel_IO)
    return x_BNI @ kernel_IO.astype(compute.dtype)


def linear(x_BNI: Array, kernel_IO: Array, bias_O: Array, compute: ComputeConfig) -> Array:
    """Return x @ kernel + bias in `compute.dtype`."""
    return multiply(x_BNI, kernel_IO, compute) + bias_O.astype(compute.dtype)


def dense(
    x_BNI: Array,
    features: int,
    compute: ComputeConfig,
    name: str,
    bias_init: Callable = nn.initializers.zeros,
) -> Array:
    """Return a linear layer of x with weights of its own: (B, N, features) in `compute.dtype`."""
    weights = Weights(x_BNI.shape[-1:], (features,), bias_init, name=name)()
    return linear(x_BNI, *weights, compute)
