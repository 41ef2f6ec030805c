"""The Vision Transformer of MAE: pre-norm blocks, stacked on a leading layer axis.

Shapes, here and in the whole package: B batch, H W image, C channels, L patches, K kept patches,
N tokens, D width, E decoder width, P values of a patch, S heads, F head width, Y classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.models.posemb import sincos_2d


class Execution(NamedTuple):
    """How a network is run: speed, memory and rounding. No parameter depends on it."""

    dtype: Any = jnp.float32  # of matrix products; parameters, LayerNorm and softmax stay float32
    residual_dtype: Any = jnp.float32  # of the residual stream
    scan_unroll: int = 1  # blocks per iteration of the loop over blocks; `depth` or more: no loop
    remat: bool = False  # recompute each block in the backward pass instead of keeping its inside
    attention: Literal["xla", "cudnn"] | None = None  # of jax.nn.dot_product_attention
    constrain: Callable[[Array], Array] = lambda x: x  # applied to the stream around every block


# On the (in, out) matrix; Flax flattens q, k, v and heads into one `out`: the fused qkv matrix.
xavier = nn.initializers.xavier_uniform()


def conv_default(fan_in: int) -> Callable:
    """PyTorch's start of a convolution, U(+-1/sqrt(fan_in)): of its bias, which MAE keeps."""
    bound = fan_in**-0.5

    def init(rng, shape, dtype=jnp.float32):
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


def layer_norm(name: str) -> nn.Module:
    """LayerNorm in float32, epsilon 1e-6, the variance as the mean of squared differences.

    The backward pass computes it again: of the float32 arrays inside, only its input is kept.
    """
    norm = nn.remat(nn.LayerNorm, prevent_cse=False)
    return norm(epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, name=name)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, in float32.

    Not `jax.nn.gelu`: that takes erfc, dearer and exact in tails that no float32 sum can see, and
    computes in the type of `x`.
    """
    x_float = x.astype(jnp.float32)
    return (0.5 * x_float * (1 + jax.lax.erf(x_float * 0.5**0.5))).astype(x.dtype)


product = partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def attend(q_BNSF: Array, k_BNSF: Array, v_BNSF: Array) -> Array:
    """softmax(q k^T / sqrt(F)) v of every head, the softmax in float32.

    As `jax.nn.dot_product_attention`, with heads before tokens in all products, which CPUs like,
    and a backward pass of its own: of the (B, S, N, N) arrays only the exponentials are kept, in
    the type of `v`. They are never divided: what their sums divide, and what the softmax's gradient
    subtracts, is as small as the result.
    """
    return _attend_forward(q_BNSF, k_BNSF, v_BNSF)[0]


def _attend_forward(q_BNSF: Array, k_BNSF: Array, v_BNSF: Array) -> tuple[Array, tuple]:
    q_BSNF, k_BSNF, v_BSNF = (jnp.swapaxes(x, 1, 2) for x in (q_BNSF, k_BNSF, v_BNSF))
    logit_BSNN = product("bsnf,bsmf->bsnm", q_BSNF, k_BSNF) * q_BSNF.shape[-1] ** -0.5
    exp_BSNN = jnp.exp(logit_BSNN - logit_BSNN.max(-1, keepdims=True)).astype(v_BSNF.dtype)
    sum_BSN1 = exp_BSNN.sum(-1, keepdims=True, dtype=jnp.float32)
    y_BSNF = product("bsnm,bsmf->bsnf", exp_BSNN, v_BSNF) / sum_BSN1
    kept = q_BSNF, k_BSNF, v_BSNF, exp_BSNN, sum_BSN1
    return jnp.swapaxes(y_BSNF, 1, 2).astype(v_BSNF.dtype), kept


def _attend_backward(kept: tuple, grad_BNSF: Array) -> tuple[Array, ...]:
    q_BSNF, k_BSNF, v_BSNF, exp_BSNN, sum_BSN1 = kept
    dtype = v_BSNF.dtype
    grad_BSNF = jnp.swapaxes(grad_BNSF, 1, 2)
    dv_BSNF = product("bsnm,bsnf->bsmf", exp_BSNN, (grad_BSNF / sum_BSN1).astype(dtype))
    dweight_BSNN = product("bsnf,bsmf->bsnm", grad_BSNF, v_BSNF)
    mean_BSN1 = (exp_BSNN * dweight_BSNN).sum(-1, keepdims=True) / sum_BSN1
    scale_BSN1 = q_BSNF.shape[-1] ** -0.5 / sum_BSN1
    dlogit_BSNN = (exp_BSNN * (dweight_BSNN - mean_BSN1) * scale_BSN1).astype(dtype)
    dq_BSNF = product("bsnm,bsmf->bsnf", dlogit_BSNN, k_BSNF)
    dk_BSNF = product("bsnm,bsnf->bsmf", dlogit_BSNN, q_BSNF)
    return tuple(jnp.swapaxes(x, 1, 2).astype(dtype) for x in (dq_BSNF, dk_BSNF, dv_BSNF))


attend.defvjp(_attend_forward, _attend_backward)


class Attention(nn.Module):
    """Multi-head self-attention with one fused, biased q-k-v projection."""

    heads: int
    execution: Execution

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        width = x_BND.shape[-1]
        dtype = self.execution.dtype
        qkv_BN3SF = nn.DenseGeneral(
            (3, self.heads, width // self.heads), dtype=dtype, kernel_init=xavier, name="qkv"
        )(x_BND)
        q, k, v = (qkv_BN3SF[:, :, i] for i in range(3))
        if self.execution.attention == "cudnn":
            y_BNSF = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            y_BNSF = attend(q, k, v)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=dtype, kernel_init=xavier, name="proj")(
            y_BNSF
        )


class Mlp(nn.Module):
    """Two layers with an exact (erf) GELU between, which the backward pass computes again.

    Of what is `hidden` wide only the output of the first layer is kept.
    """

    hidden: int
    execution: Execution

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        dtype = self.execution.dtype
        h = nn.Dense(self.hidden, dtype=dtype, kernel_init=xavier, name="fc1")(x_BND)
        fc2 = nn.Dense(x_BND.shape[-1], dtype=dtype, kernel_init=xavier, name="fc2")
        return nn.remat(lambda fc2, h: fc2(gelu(h)), prevent_cse=False)(fc2, h)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)); whole samples of a branch may be dropped."""

    heads: int
    mlp_ratio: float
    execution: Execution

    @nn.compact
    def __call__(self, x_BND: Array, drop_path: Array, deterministic: bool):
        def keep(branch_BND: Array) -> Array:
            branch_BND = branch_BND.astype(x_BND.dtype)
            if deterministic:
                return branch_BND
            shape = (branch_BND.shape[0], 1, 1)
            kept_B11 = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_path, shape)
            return jnp.where(kept_B11, branch_BND / (1 - drop_path), 0).astype(x_BND.dtype)

        ex = self.execution
        x_BND = ex.constrain(x_BND)
        x_BND = x_BND + keep(Attention(self.heads, ex, name="attn")(layer_norm("norm1")(x_BND)))
        hidden = int(x_BND.shape[-1] * self.mlp_ratio)
        x_BND = x_BND + keep(Mlp(hidden, ex, name="mlp")(layer_norm("norm2")(x_BND)))
        return ex.constrain(x_BND), None


class Stack(nn.Module):
    """`depth` blocks, one scan: each parameter has a leading layer axis.

    `drop_path` is the rate of the last block; rates grow linearly from that of the first.
    """

    depth: int
    heads: int
    mlp_ratio: float
    execution: Execution
    drop_path: float = 0.0
    first_drop_path: float = 0.0

    @nn.compact
    def __call__(self, x_BND: Array, deterministic: bool = True) -> Array:
        ex = self.execution
        # Without a loop between them, XLA would merge what is computed again with the first time.
        unrolled = ex.scan_unroll >= self.depth
        block = nn.remat(Block, prevent_cse=unrolled, static_argnums=(3,)) if ex.remat else Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=ex.scan_unroll,
        )(self.heads, self.mlp_ratio, ex, name="blocks")
        rates = jnp.linspace(self.first_drop_path, self.drop_path, self.depth)
        x_BND = x_BND.astype(ex.residual_dtype)
        return blocks(x_BND, rates, deterministic or self.drop_path == 0)[0]


class Encoder(nn.Module):
    """Patches to tokens: linear embedding, positions, cls token, blocks, final norm.

    Embeds only the patches that it is given. The positions are the fixed sine-cosine table, or,
    with `trained_positions`, a parameter that starts as that table.
    """

    grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    trained_positions: bool = False
    final_norm: bool = True
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        patches_BKP: Array,
        keep_BK: Array | None = None,
        deterministic: bool = True,
        hidden_BL: Array | None = None,
    ) -> Array:
        """Encode patches.

        Args:
          patches_BKP: patches of the normalised image, as `patchify` lays them out.
          keep_BK: the place of each in the image, row-major; None = all of them, in order.
          deterministic: no drop path.
          hidden_BL: 1 where a mask token takes the place of a patch; None = nowhere.
        Returns:
          (B, 1 + K, D) in the residual dtype, the cls token first.
        """
        values = patches_BKP.shape[-1]
        x_BKD = nn.Dense(
            self.width,
            dtype=self.execution.dtype,
            kernel_init=xavier,
            bias_init=conv_default(values),
            name="patch_embed",
        )(patches_BKP)
        if hidden_BL is not None:
            token_11D = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
            x_BKD = jnp.where(hidden_BL[..., None] > 0, token_11D.astype(x_BKD.dtype), x_BKD)
        table = jnp.asarray(sincos_2d(self.width, self.grid))
        if self.trained_positions:
            table = self.param("pos_embed", lambda rng: table[None])[0]
        positions = table[1:] if keep_BK is None else table[1:][keep_BK]
        x_BKD = x_BKD.astype(self.execution.residual_dtype) + positions

        cls_11D = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls_B1D = jnp.broadcast_to(cls_11D + table[0], (len(x_BKD), 1, self.width))
        x_BND = jnp.concatenate([cls_B1D.astype(x_BKD.dtype), x_BKD], axis=1)
        x_BND = Stack(
            self.depth, self.heads, self.mlp_ratio, self.execution, self.drop_path, name="stack"
        )(x_BND, deterministic)
        return layer_norm("norm")(x_BND) if self.final_norm else x_BND


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
      ValueError: the image is not a whole number of patches.
    """
    if len(image_size) != 2 or len(patch_size) != 2:
        raise ValueError(
            f"image_size={tuple(image_size)} and patch_size={tuple(patch_size)} are written as"
            " (height, width), such as (224, 224) and (16, 16)"
        )
    for side, image, patch in zip(("high", "wide"), image_size, patch_size, strict=True):
        if patch < 1 or image < patch or image % patch:
            below = max(image // max(patch, 1), 1) * patch
            raise ValueError(
                f"an image {image} pixels {side} is not a whole number of patches of {patch}:"
                f" choose an image size such as {below} or {below + patch}, or another patch size"
            )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]
