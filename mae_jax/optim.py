"""AdamW as MAE uses it: learning-rate rule, schedule, and weight decay by role."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mae_jax.errors import UserError

# Every parameter has a role, found by the first pattern that matches the end of its path. A path
# without a pattern is an error, so that a new parameter is thought about once: here, or in a fork,
# which appends its own.
ROLES = [
    (r"(qkv|kv|/q|/k|/v|proj|fc1|fc2|patch_embed|embed|pred|head)/kernel", "matrix"),
    (r"map_weights", "matrix"),
    (r"/bias", "bias"),
    (r"/scale", "scale"),
    (r"(cls_token|mask_token|query_token|register_token)", "token"),
    (r"pos_embed", "position"),
]
# Pre-training decays the cls and mask tokens too: they are 3-D in the official code, whose rule
# goes by rank. Fine-tuning decays matrices only (docs/REFERENCE.md section 3).
DECAYED = ("matrix", "token")


def path_name(path: tuple) -> str:
    """Return a parameter's path as text: encoder/stack/blocks/attn/qkv/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def role(path: tuple) -> str:
    """Return matrix, bias, scale, token or position.

    Raises:
      UserError: no pattern of ROLES matches the path.
    """
    name = path_name(path)
    for pattern, role in ROLES:
        if re.search(pattern + "$", name):
            return role
    raise UserError(
        f"parameter {name!r} has no role: add a pattern for it to ROLES in mae_jax/optim.py,"
        " which decides whether it is decayed"
    )


def decay_mask(params: Any, decayed: tuple[str, ...] = DECAYED) -> Any:
    """Return True for each parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: role(path) in decayed, params)


def peak_lr(blr: float, batch_size: int) -> float:
    """Return the peak learning rate by the linear scaling rule: base rate x batch size / 256."""
    return blr * batch_size / 256


def cosine_schedule(peak: float, total: int, warmup: int, min_lr: float = 0.0) -> optax.Schedule:
    """Return the learning rate by the 0-based step: linear warm-up from 0, then half a cosine.

    The first update has rate 0; `min_lr` would be reached one step after the last. A warm-up that
    is longer than the run is cut off where the run ends.
    """
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(total, warmup + 1), min_lr)


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    decayed: tuple[str, ...] = DECAYED,
    scales: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Return AdamW: epsilon outside the root, decoupled decay times the rate, decay by role.

    Args:
      decayed: the roles that weight decay applies to.
      scales: params -> learning-rate multipliers, such as `layer_decay.layer_scales`; None = 1.
    """
    tx = optax.adamw(
        schedule, b1, b2, eps, weight_decay=weight_decay, mask=lambda p: decay_mask(p, decayed)
    )
    return tx if scales is None else optax.chain(tx, scaled_by(scales))


def scaled_by(scales: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Return the multiplication of updates by learning-rate multipliers, a function of params."""

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, s: u * jnp.asarray(s, u.dtype), updates, scales(params))

    return optax.stateless(scale)
