"""Layer-wise decay of the learning rate, for fine-tuning: lower rates for earlier layers."""

import re
from typing import Any

import jax
import numpy as np

from mae_jax.errors import UserError
from mae_jax.optim import path_name

# The part of a classifier that a parameter is in.
PARTS = (
    (r"^encoder/(cls_token|register_token|pos_embed|patch_embed/\w+)$", "stem"),
    (r"^encoder/stack/blocks/", "blocks"),
    (r"^(encoder/norm|fc_norm|head)/\w+$", "head"),
)


def layer_ids(params: Any) -> Any:
    """Return the layer of each parameter of a classifier.

    0 for cls token, positions and patch embedding, i + 1 for block i, depth + 1 for what follows
    the blocks. Stacked blocks get an array that broadcasts against them: the layer axis, then ones.

    Raises:
      UserError: no pattern of PARTS matches a path.
    """
    depth = len(jax.tree.leaves(params["encoder"]["stack"]["blocks"])[0])

    def layer_id(path: tuple, leaf: Any) -> np.ndarray:
        name = path_name(path)
        part = next((part for pattern, part in PARTS if re.search(pattern, name)), None)
        if part is None:
            raise UserError(
                f"parameter {name!r} has no layer: add a pattern for it to PARTS in"
                " mae_jax/layer_decay.py, which decides its share of the learning rate"
            )
        if part == "blocks":
            return np.arange(1, depth + 1).reshape(depth, *[1] * (leaf.ndim - 1))
        return np.array(0 if part == "stem" else depth + 1)

    return jax.tree_util.tree_map_with_path(layer_id, params)


def layer_scales(params: Any, layer_decay: float) -> Any:
    """Return learning-rate multipliers, layer_decay ** (depth + 1 - layer), shaped as `layer_ids`.

    Source: docs/REFERENCE.md section 3; pinned by tests/data/vit_tiny_avg.npz.
    """
    ids = layer_ids(params)
    last = max(int(x.max()) for x in jax.tree.leaves(ids))
    return jax.tree.map(lambda x: layer_decay ** (last - x).astype(np.float64), ids)
