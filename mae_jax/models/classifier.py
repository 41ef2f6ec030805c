"""The classifier: an encoder of all patches, pooled, with a linear head.

Shape suffixes as in models/vit.py.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.models.vit import Encoder, Execution, layer_norm

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
    patch embedding, a convolution in the official code, stays as it is. REFERENCE section 3.
    """

    def draw(path: tuple, leaf: Array) -> Array:
        names = [key.key for key in path]
        linear = names[-1] == "kernel" and names[-2] != "patch_embed"
        if not linear and names[-1] not in ("pos_embed", "cls_token"):
            return leaf
        key = jax.random.fold_in(rng, place[path])
        return SCRATCH_STD * jax.random.normal(key, leaf.shape, leaf.dtype)

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    place = {path: i for i, path in enumerate(paths)}
    return jax.tree_util.tree_map_with_path(draw, params)


def soft_cross_entropy(logits_BY: Array, target_BY: Array) -> Array:
    """Cross-entropy with targets that are distributions; the mean over the batch."""
    return -(target_BY * jax.nn.log_softmax(logits_BY)).sum(-1).mean()
