"""AdamW and LARS as MAE uses them: learning-rate rule, schedule, and who is decayed, by role."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.errors import UserError

# Every parameter has a role, found by the first pattern that its path ends in. A path that no
# pattern knows is an error: a new parameter must be thought about once, here.
ROLES = (
    (r"(qkv|kv|proj|fc1|fc2|patch_embed|embed|pred|head)/kernel", "matrix"),
    (r"/bias", "bias"),
    (r"/scale", "scale"),
    (r"(cls_token|mask_token|query_token)", "token"),
    (r"pos_embed", "position"),
)


def path_name(path: tuple) -> str:
    """A parameter's path as text: encoder/stack/blocks/attn/qkv/kernel."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def role(path: tuple) -> str:
    """matrix, bias, scale, token or position.

    Raises:
      UserError: no pattern of ROLES knows the path.
    """
    name = path_name(path)
    for pattern, found in ROLES:
        if re.search(pattern + "$", name):
            return found
    raise UserError(
        f"parameter {name!r} has no role: add a pattern for it to ROLES in mae_jax/optim.py,"
        " which decides whether it is decayed"
    )


def decay_mask(params: Any, decayed: tuple[str, ...] = ("matrix", "token")) -> Any:
    """True where weight decay applies.

    Pre-training decays the matrices and also the cls and mask tokens, which are 3-D tensors in the
    official code, whose rule goes by rank; fine-tuning decays matrices only.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: role(path) in decayed, params)


# Where a parameter of a classifier stands: at its entrance, in a block, at its exit.
PLACES = (
    (r"^encoder/(cls_token|pos_embed|patch_embed/\w+)$", "entrance"),
    (r"^encoder/stack/blocks/", "blocks"),
    (r"^(encoder/norm|fc_norm|head)/\w+$", "exit"),
)


def layer_ids(params: Any) -> Any:
    """For each parameter of a classifier its layer, for layer-wise decay of the learning rate.

    0 for cls token, positions and patch embedding, i + 1 for block i, depth + 1 for what follows
    the blocks. Stacked blocks get an array that broadcasts against them: the layer axis, then ones.

    Raises:
      UserError: no pattern of PLACES knows a path.
    """
    depth = len(jax.tree.leaves(params["encoder"]["stack"]["blocks"])[0])

    def layer_id(path: tuple, leaf: Any) -> np.ndarray:
        name = path_name(path)
        place = next((place for pattern, place in PLACES if re.search(pattern, name)), None)
        if place is None:
            raise UserError(
                f"parameter {name!r} has no layer: add a pattern for it to PLACES in"
                " mae_jax/optim.py, which decides its share of the learning rate"
            )
        if place == "blocks":
            return np.arange(1, depth + 1).reshape(depth, *[1] * (leaf.ndim - 1))
        return np.array(0 if place == "entrance" else depth + 1)

    return jax.tree_util.tree_map_with_path(layer_id, params)


def layer_scales(params: Any, layer_decay: float) -> Any:
    """What each parameter's learning rate is multiplied by: layer_decay ** (depth + 1 - layer).

    Shaped as `layer_ids`, float64. REFERENCE section 3; pinned by tests/data/vit_tiny_avg.npz.
    """
    ids = layer_ids(params)
    top = max(int(x.max()) for x in jax.tree.leaves(ids))
    return jax.tree.map(lambda x: layer_decay ** (top - x).astype(np.float64), ids)


def peak_lr(blr: float, batch_size: int) -> float:
    """The linear scaling rule: base rate x effective batch / 256."""
    return blr * batch_size / 256


def cosine_schedule(peak: float, total: int, warmup: int, min_lr: float = 0.0) -> optax.Schedule:
    """Linear warm-up from exactly 0, then half a cosine to `min_lr`; by the 0-based step.

    The rate of update `step` is schedule(step), so that the first update has rate 0, and `min_lr`
    would be reached one step after the last.
    """

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = peak * step / max(warmup, 1)
        progress = jnp.minimum((step - warmup) / max(total - warmup, 1), 1.0)
        falling = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    decayed: tuple[str, ...] = ("matrix", "token"),
    scales: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """AdamW: epsilon outside the root, decay decoupled and multiplied by the rate, by role.

    Args:
      scales: params -> what the rate of each is multiplied by, such as `layer_scales`; None = 1.
    """
    tx = optax.adamw(
        schedule, b1, b2, eps, weight_decay=weight_decay, mask=lambda p: decay_mask(p, decayed)
    )
    if scales is None:
        return tx

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, s: u * jnp.asarray(s, u.dtype), updates, scales(params))

    return optax.chain(tx, optax.stateless(scale))


def lars(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust: float = 0.001,
) -> optax.GradientTransformation:
    """LARS of the official linear probe (REFERENCE section 4); pinned by tests/data/lars.npz.

    Matrices: decayed, and their gradient scaled to `trust` times their own norm. All others: the
    raw gradient. The rate stands outside the momentum buffer, where `optax.lars` has it inside:
    the two differ as soon as the rate changes.
    """

    def scaled(path: tuple, grad: jax.Array, param: jax.Array) -> jax.Array:
        if role(path) != "matrix":
            return grad
        grad = grad + weight_decay * param
        norm, own = jnp.linalg.norm(grad), jnp.linalg.norm(param)
        known = (norm > 0) & (own > 0)
        return grad * jnp.where(known, trust * own / jnp.where(known, norm, 1.0), 1.0)

    return optax.chain(
        optax.stateless(lambda grads, params: jax.tree.map_with_path(scaled, grads, params)),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )


def side_by_side(
    make: Callable[[jax.Array], optax.GradientTransformation], scales: tuple[float, ...]
) -> optax.GradientTransformation:
    """An optimizer for parameters stacked on a leading axis: make(scales[i]) for the i-th."""
    factors = jnp.asarray(scales, jnp.float32)

    def init(params: Any) -> Any:
        return jax.vmap(lambda factor, p: make(factor).init(p))(factors, params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.vmap(lambda factor, *args: make(factor).update(*args))(
            factors, grads, state, params
        )

    return optax.GradientTransformation(init, update)
