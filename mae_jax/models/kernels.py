"""Functions that networks are made of, with backward passes that move less memory than JAX's.

What they compute is in their names: a reader of the networks need not open this file, and a fork
may put plain JAX in place of any. A `custom_vjp` has no forward-mode derivative, so that `jax.jvp`
of the networks raises. Attention is in attention.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

product = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x_BND: Array, scale_D: Array, bias_D: Array, epsilon: float = 1e-6, one_pass: bool = False
) -> Array:
    """Return the layer normalisation in float32, with a variance of one pass or of two.

    One pass, E[x^2] - E[x]^2, takes 0.9 ms less of 27.4 of L/16 on v5e:16x16 by the compiler's
    clock. The backward pass keeps the input and two numbers for each token. Derived by JAX, it
    would write and read again one more float32 array as large as the input.
    """
    return _normalise_forward(x_BND, scale_D, bias_D, epsilon, one_pass)[0]


def _normalise_forward(
    x_BND: Array, scale_D: Array, bias_D: Array, epsilon: float, one_pass: bool
) -> tuple[Array, tuple]:
    x_float_BND = x_BND.astype(jnp.float32)
    mean_BN1 = x_float_BND.mean(-1, keepdims=True)
    if one_pass:
        square_BN1 = jnp.square(x_float_BND).mean(-1, keepdims=True)
        variance_BN1 = jnp.maximum(square_BN1 - jnp.square(mean_BN1), 0)
    else:
        variance_BN1 = jnp.square(x_float_BND - mean_BN1).mean(-1, keepdims=True)
    inverse_BN1 = jax.lax.rsqrt(variance_BN1 + epsilon)
    y_BND = (x_float_BND - mean_BN1) * (inverse_BN1 * scale_D) + bias_D
    return y_BND, (x_BND, mean_BN1, inverse_BN1, scale_D)


def _normalise_backward(
    _: float, __: bool, residuals: tuple, grad_BND: Array
) -> tuple[Array, Array, Array]:
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


def gelu(x: Array) -> Array:
    """Return the exact (erf) GELU, computed in float32.

    `jax.nn.gelu` takes erfc, which costs more and is exact in tails that no float32 sum can see,
    and it computes in the type of `x`.
    """
    x_float = x.astype(jnp.float32)
    return (0.5 * x_float * (1 + jax.lax.erf(x_float * 0.5**0.5))).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y_BND: Array, bias_D: Array, plain: bool) -> Array:
    """Return y + bias, whose gradient is summed in float32: by a product with ones, or plainly.

    Sums over tokens took 1.6 of 32 ms of L/16 on v5e:16x16 by the compiler's clock; a product is
    done beside those that the matrix unit does anyway. On GPUs the product would turn arrays around
    first. The sum that JAX derives would there have the type of `y_BND`.
    """
    return y_BND + bias_D.astype(y_BND.dtype)


def _add_bias_forward(y_BND: Array, bias_D: Array, plain: bool) -> tuple[Array, Array]:
    return add_bias(y_BND, bias_D, plain), bias_D


def _add_bias_backward(plain: bool, bias_D: Array, grad_BND: Array) -> tuple[Array, Array]:
    if plain:
        return grad_BND, grad_BND.sum((0, 1), dtype=jnp.float32).astype(bias_D.dtype)
    # A row of ones for each image: one product over all images would have its eight equal rows
    # summed over the devices. Eight rows are a tile; one would be no product.
    ones_8N = jnp.ones((8, grad_BND.shape[1]), grad_BND.dtype)
    dbias_B8D = product("xn,bnd->bxd", ones_8N, grad_BND, precision="highest")
    return grad_BND, dbias_B8D[:, 0].sum(0).astype(bias_D.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def summed_in_float32(x_NI: Array, kernel_IO: Array) -> Array:
    """Return x @ kernel in the type of x, for a float32 kernel with a float32 gradient.

    The gradient of a kernel is a product too, and each device has its share of the sum over the
    batch. Derived by JAX, that product has the type of x, and so have the sums over devices.
    """
    return x_NI @ kernel_IO.astype(x_NI.dtype)


def _summed_forward(x_NI: Array, kernel_IO: Array) -> tuple[Array, tuple]:
    return summed_in_float32(x_NI, kernel_IO), (x_NI, kernel_IO)


def _summed_backward(residuals: tuple, grad_NO: Array) -> tuple[Array, Array]:
    x_NI, kernel_IO = residuals
    rows = tuple(range(x_NI.ndim - 1))
    dkernel_IO = jnp.tensordot(x_NI, grad_NO, (rows, rows), preferred_element_type=jnp.float32)
    return grad_NO @ kernel_IO.astype(grad_NO.dtype).T, dkernel_IO


summed_in_float32.defvjp(_summed_forward, _summed_backward)
