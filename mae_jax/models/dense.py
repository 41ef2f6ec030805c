"""The linear layers of every network, and in which type their gradients are summed."""

import math
from collections.abc import Callable

import flax.linen as nn
from jax import Array

from mae_jax.models.compute import ComputeConfig
from mae_jax.models.kernels import add_bias, summed_in_float32

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


def linear(
    x_BNI: Array, kernel: Array, bias: Array, compute: ComputeConfig, float32_bias: bool = False
) -> Array:
    """Return x @ kernel + bias in `compute.dtype`, (B, N, O); several axes are flattened to I, O.

    `float32_bias` sums the gradient of the bias in float32, see `kernels.add_bias`.
    """
    kernel_IO, bias_O = kernel.reshape(x_BNI.shape[-1], -1), bias.reshape(-1)
    x_BNI = x_BNI.astype(compute.dtype)
    if compute.float32_sums:
        y_BNO = summed_in_float32(x_BNI, kernel_IO)
    else:
        y_BNO = x_BNI @ kernel_IO.astype(compute.dtype)
    if float32_bias:
        return add_bias(y_BNO, bias_O, compute.plain_biases)
    return y_BNO + bias_O.astype(compute.dtype)


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
