"""The classifier: an encoder of all patches, pooled, with a linear head.

Shape suffixes as in models/vit.py.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mae_jax.models import modern
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.probe import first_blocks
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder, Stack, torch_conv_init

HEAD_STD = 2e-5  # of a fresh head on a pre-trained encoder; docs/REFERENCE.md section 3
SCRATCH_STD = 0.02  # of everything when training from scratch; facebookresearch/mae#28

FIRST_HALF = ("norm1", "attn", "scale1")  # parts of a block that 0.5 trained blocks leave frozen


class Output(NamedTuple):
    """A classifier's features and logits of images, float32."""

    features_BD: Array  # what the head reads
    logits_BY: Array


class Classifier(nn.Module):
    """Patches of the normalised image to features and logits.

    Pooling "avg": the mean of the patch tokens of the last block, without cls token and without the
    encoder's final norm, then a LayerNorm of its own, fc_norm. "cls": the cls token after the
    encoder's final norm.
    """

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        self.encoder = Encoder(self.spec, self.compute, self.spec.final_norm)
        if self.spec.pool == "avg":
            self.fc_norm = modern.norm("fc_norm", self.spec.encoder.block)
        head_init = nn.initializers.normal(HEAD_STD)
        self.head = nn.Dense(self.spec.classes, kernel_init=head_init)

    def __call__(self, patches_BLP: Array, deterministic: bool = True) -> Output:
        """Return features (B, D) and logits (B, Y) of all patches."""
        x_BND: Any = self.encoder(patches_BLP, deterministic=deterministic)
        features_BD = self.pooled(x_BND.astype(jnp.float32))
        return Output(features_BD, self.head(features_BD))

    def pooled(self, x_BND: Array) -> Array:
        """Return what the head reads of the encoder's tokens."""
        return self.fc_norm(x_BND[:, 1:].mean(1)) if self.spec.pool == "avg" else x_BND[:, 0]


def scratch_init(params: Any, rng: Array) -> Any:
    """Return fresh parameters as for supervised training from scratch.

    Normal with deviation 0.02 for all linear weights, the position table and the cls token; the
    patch embedding, a convolution in the official code, as PyTorch starts convolutions
    (docs/REFERENCE.md section 3).
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    index = {path: i for i, path in enumerate(paths)}

    def draw(path: tuple, leaf: Array) -> Array:
        names = [key.key for key in path]
        key = jax.random.fold_in(rng, index[path])
        if names[-2:] == ["patch_embed", "kernel"]:
            return torch_conv_init(len(leaf))(key, leaf.shape, leaf.dtype)
        if names[-1] not in ("kernel", "pos_embed", "cls_token"):
            return leaf
        return SCRATCH_STD * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def apply_partly_frozen(
    network: Classifier,
    params: Any,
    patches_BLP: Array,
    trained_blocks: float,
    deterministic: bool = True,
    rngs: Any = None,
) -> Output:
    """Apply `network` so that only its last blocks, the norm after them and the head are trained.

    Run the stack in two parts and let no backward pass into the first: that costs less, which
    masked gradients would not. The parameters are those of the whole network, still one
    stack. Frozen blocks drop no paths.

    Args:
      trained_blocks: 0, 0.5 (the MLP of the last block), or a whole number below the depth.
    """
    spec = network.spec
    vit, split = spec.encoder, spec.encoder.depth - math.ceil(trained_blocks)
    below, encoder = first_blocks(spec, params["encoder"], split)
    above = jax.tree.map(lambda x: x[split:], params["encoder"]["stack"]["blocks"])
    norm = encoder.pop("norm", None)
    bottom = Encoder(below, network.compute, final_norm=False)
    x: Any = bottom.apply({"params": jax.lax.stop_gradient(encoder)}, patches_BLP)
    if trained_blocks:
        if trained_blocks == 0.5:
            above = above | jax.lax.stop_gradient({k: above[k] for k in FIRST_HALF if k in above})
        first = vit.drop_path * split / max(vit.depth - 1, 1)
        top = Stack(replace(vit, depth=vit.depth - split), network.compute, first)
        extra = modern.extra(network, vit, spec.grid)
        x, _ = top.apply({"params": {"blocks": above}}, x, deterministic, extra=extra, rngs=rngs)
    x = x.astype(jnp.float32)
    if spec.pool == "avg":
        x, norm = x[:, 1:].mean(1), params["fc_norm"]
    else:
        x = x[:, 0]
    features_BD: Any = modern.norm("norm", vit.block).apply({"params": norm}, x)
    logits_BY: Any = nn.Dense(spec.classes).apply({"params": params["head"]}, features_BD)
    return Output(features_BD, logits_BY)


def trained_share(params: Any, trained_blocks: float) -> Any:
    """Return 1 where `apply_partly_frozen` trains and 0 where not; broadcasts against `params`."""
    depth = len(jax.tree.leaves(params["encoder"]["stack"]["blocks"])[0])
    split = depth - math.ceil(trained_blocks)

    def share(path: tuple, leaf: Any) -> np.ndarray:
        names = [key.key for key in path]
        if names[:2] == ["encoder", "stack"]:
            half = trained_blocks == 0.5 and names[3] in FIRST_HALF
            trained_layers = (np.arange(depth) >= split) & (not half)
            return trained_layers.astype(float).reshape(depth, *[1] * (leaf.ndim - 1))
        return np.array(float(names[0] != "encoder" or names[1] == "norm"))

    return jax.tree_util.tree_map_with_path(share, params)
