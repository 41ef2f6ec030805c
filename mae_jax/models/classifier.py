"""The classifier: an encoder of all patches, pooled, with a linear head.

Shape suffixes as in models/vit.py.
"""

import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mae_jax.models.vit import Encoder, Execution, Stack, conv_default, layer_norm

HEAD_STD = 2e-5  # of a fresh head on a pre-trained encoder; REFERENCE section 3
SCRATCH_STD = 0.02  # of everything when training from scratch; facebookresearch/mae#28


class Output(NamedTuple):
    """What a classifier says of images; float32."""

    features_BD: Array  # what the head reads
    logits_BY: Array


class Classifier(nn.Module):
    """Patches of the normalised image to features and logits.

    Pooling "avg": the mean of the patch tokens of the last block, without cls token and without the
    encoder's final norm, then a LayerNorm of its own, fc_norm. "cls": the cls token after the
    encoder's final norm. The encoder must have a final norm for "cls", and none for "avg".
    """

    encoder: Encoder
    classes: int
    pool: Literal["avg", "cls"] = "avg"

    @nn.compact
    def __call__(self, patches_BLP: Array, deterministic: bool = True) -> Output:
        x_BND = self.encoder(patches_BLP, deterministic=deterministic).astype(jnp.float32)
        if self.pool == "avg":
            features_BD = layer_norm("fc_norm")(x_BND[:, 1:].mean(1))
        else:
            features_BD = x_BND[:, 0]
        head = nn.Dense(self.classes, kernel_init=nn.initializers.normal(HEAD_STD), name="head")
        return Output(features_BD, head(features_BD))


def build(
    grid: tuple[int, int],
    *,
    width: int,
    depth: int,
    heads: int,
    classes: int,
    mlp_ratio: float = 4.0,
    pool: Literal["avg", "cls"] = "avg",
    drop_path: float = 0.0,
    execution: Execution = Execution(),
) -> Classifier:
    """A classifier for a (rows, columns) grid of patches; its positions are trained.

    Args:
      drop_path: the rate of the last block; see `vit.Stack`.

    Raises:
      ValueError: a width that the heads do not divide, an unknown pooling, a rate outside 0..1.
    """
    if width % heads:
        raise ValueError(
            f"width={width} is not divisible by heads={heads}:"
            f" choose a multiple such as width={(width // heads + 1) * heads}"
        )
    if pool not in ("avg", "cls"):
        raise ValueError(f"pool={pool!r} is unknown: choose avg or cls")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path={drop_path} must be at least 0 and below 1")
    encoder = Encoder(
        grid,
        width,
        depth,
        heads,
        mlp_ratio,
        drop_path,
        trained_positions=True,
        final_norm=pool == "cls",
        execution=execution,
    )
    return Classifier(encoder, classes, pool)


def scratch_init(params: Any, rng: Array) -> Any:
    """Fresh parameters as for supervised training from scratch.

    Normal with deviation 0.02 for all linear weights, the position table and the cls token; the
    patch embedding, a convolution in the official code, as PyTorch starts convolutions. REFERENCE
    section 3.
    """

    def draw(path: tuple, leaf: Array) -> Array:
        names = [key.key for key in path]
        key = jax.random.fold_in(rng, place[path])
        if names[-2:] == ["patch_embed", "kernel"]:
            return conv_default(len(leaf))(key, leaf.shape, leaf.dtype)
        if names[-1] not in ("kernel", "pos_embed", "cls_token"):
            return leaf
        return SCRATCH_STD * jax.random.normal(key, leaf.shape, leaf.dtype)

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    place = {path: i for i, path in enumerate(paths)}
    return jax.tree_util.tree_map_with_path(draw, params)


def apply_partly_frozen(
    network: Classifier,
    params: Any,
    patches_BLP: Array,
    trained_blocks: float,
    deterministic: bool = True,
    rngs: Any = None,
) -> Output:
    """`network.apply` for training the last blocks, the norm after them and the head only.

    The stack is run in two parts, and no backward pass goes into the first: freezing costs less
    than masking gradients would save. The parameters are those of the whole, still one stack.
    Frozen blocks drop no paths.

    Args:
      trained_blocks: 0, 0.5 (the MLP of the last block), or a whole number below the depth.
    """
    e = network.encoder
    split = e.depth - math.ceil(trained_blocks)
    encoder = dict(params["encoder"])
    norm, blocks = encoder.pop("norm", None), encoder["stack"]["blocks"]
    below, above = (
        jax.tree.map(lambda x, part=part: x[part], blocks)
        for part in (slice(split), slice(split, None))
    )
    encoder["stack"] = {"blocks": below}
    bottom = e.clone(depth=split, final_norm=False, parent=None)
    x: Any = bottom.apply({"params": jax.lax.stop_gradient(encoder)}, patches_BLP)
    if trained_blocks:
        if trained_blocks == 0.5:
            above = above | jax.lax.stop_gradient({k: above[k] for k in ("norm1", "attn")})
        first = e.drop_path * split / max(e.depth - 1, 1)
        top = Stack(
            e.depth - split, e.heads, e.mlp_ratio, e.execution, e.drop_path, first, parent=None
        )
        x = top.apply({"params": {"blocks": above}}, x, deterministic, rngs=rngs)
    x = x.astype(jnp.float32)
    if network.pool == "avg":
        x, norm = x[:, 1:].mean(1), params["fc_norm"]
    else:
        x = x[:, 0]
    features_BD: Any = layer_norm("norm").apply({"params": norm}, x)
    logits_BY: Any = nn.Dense(network.classes).apply({"params": params["head"]}, features_BD)
    return Output(features_BD, logits_BY)


def trained_share(params: Any, trained_blocks: float) -> Any:
    """1 where `apply_partly_frozen` trains, 0 where not; broadcasts against the parameters."""
    depth = len(jax.tree.leaves(params["encoder"]["stack"]["blocks"])[0])
    split = depth - math.ceil(trained_blocks)

    def share(path: tuple, leaf: Any) -> np.ndarray:
        names = [key.key for key in path]
        if names[:2] == ["encoder", "stack"]:
            half = trained_blocks == 0.5 and names[3] in ("norm1", "attn")
            trained_layers = (np.arange(depth) >= split) & (not half)
            return trained_layers.astype(float).reshape(depth, *[1] * (leaf.ndim - 1))
        return np.array(float(names[0] != "encoder" or names[1] == "norm"))

    return jax.tree_util.tree_map_with_path(share, params)


def soft_cross_entropy(logits_BY: Array, target_BY: Array) -> Array:
    """Cross-entropy with targets that are distributions; the mean over the batch."""
    return -(target_BY * jax.nn.log_softmax(logits_BY)).sum(-1).mean()
