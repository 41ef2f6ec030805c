"""Optimizers and schedules beside those of pre-training: by name, of probes, of segmentation."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mae_jax import optim
from mae_jax.errors import UserError, nearest

# The kernels of blocks, stacked on a leading layer axis, as matrices; q, k and v are three. Without
# this table optax would give Muon the kernels of two axes alone, and train all blocks with Adam.
MATRICES = (
    (r"stack/blocks/attn/qkv/kernel$", contrib.MuonDimensionNumbers(1, (3, 4))),  # layer D 3 S F
    (r"stack/blocks/attn/[qkv]/kernel$", contrib.MuonDimensionNumbers(1, (2, 3))),  # layer D S F
    (r"stack/blocks/attn/proj/kernel$", contrib.MuonDimensionNumbers((1, 2), 3)),  # layer S F D
    (r"stack/blocks/mlp/fc[12]/kernel$", contrib.MuonDimensionNumbers(1, 2)),  # layer in out
)


def dimension_numbers(params: Any) -> Any:
    """Return which axes of each parameter are a matrix for Muon; None = Adam's.

    Raises:
      UserError: a kernel of a block is not in MATRICES, or a parameter has no role.
    """

    def of(path: tuple, _: Any) -> contrib.MuonDimensionNumbers | None:
        name, role = optim.path_name(path), optim.role(path)
        for pattern, numbers in MATRICES:
            if re.search(pattern, name):
                return numbers
        if role == "matrix" and "stack/blocks/" in name:
            raise UserError(f"config.optim.name=muon: add {name!r} to MATRICES of optimizers.py")
        return None

    return jax.tree_util.tree_map_with_path(of, params)


def muon(o: Mapping[str, Any]) -> optax.GradientTransformation:
    """Return Muon's directions for the kernels of blocks, and Adam's for all others.

    Muon's are scaled to the root mean square of Adam's, so that rate and decay carry over (arXiv
    2502.16982).
    b1 and b2 are Adam's; the momentum of Muon is 0.95.
    """
    of_matrices = contrib.muon(
        1.0, muon_weight_dimension_numbers=dimension_numbers, consistent_rms=0.2
    )
    return optax.partition(
        {"muon": optax.chain(of_matrices, optax.scale(-1.0)), "adam": adam(o)},  # the rate is later
        lambda params: jax.tree.map(
            lambda numbers: "muon" if numbers else "adam",
            dimension_numbers(params),
            is_leaf=lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers),
        ),
    )


def lion(o: Mapping[str, Any]) -> optax.GradientTransformation:
    """Return Lion's directions (arXiv 2302.06675), which wants 3 to 10 times smaller rates."""
    if o.get("eps", 1e-8) != 1e-8:
        raise UserError(f"config.optim.eps={o['eps']} is not for Lion: leave it out")
    return optax.scale_by_lion(o["b1"], o["b2"])


def adam(o: Mapping[str, Any]) -> optax.GradientTransformation:
    """Return Adam's directions; with decay and rate this is `optim.adamw`."""
    return optax.scale_by_adam(o["b1"], o["b2"], o.get("eps", 1e-8))


DIRECTIONS = {"adamw": adam, "lion": lion, "muon": muon}


def by_name(
    o: Mapping[str, Any],
    schedule: optax.Schedule,
    *,
    decayed: tuple[str, ...] = optim.DECAYED,
    scales: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Return the optimizer of config.optim, of any name, with decoupled decay by role.

    Args:
      decayed, scales: see `optim.adamw`.

    Raises:
      UserError: there is no optimizer of that name.
    """
    name = o.get("name", "adamw")
    if name not in DIRECTIONS:
        raise UserError(f"config.optim.name={name!r}{nearest(name, DIRECTIONS)}")
    parts = [
        optax.clip_by_global_norm(o["clip_norm"]) if o.get("clip_norm") else optax.identity(),
        DIRECTIONS[name](o),
        optax.add_decayed_weights(o["weight_decay"], lambda p: optim.decay_mask(p, decayed)),
        optax.scale_by_learning_rate(schedule),
    ]
    if scales is not None:
        parts.append(optim.scaled_by(scales))
    return optax.chain(*parts)


def stable_decay(
    peak: float, total: int, warmup: int, min_lr: float = 0.0, cooldown: float = 0.2
) -> optax.Schedule:
    """Return warm-up, a constant rate, and a fall by 1 - sqrt (arXiv 2405.18392), by 0-based step.

    Runs of other lengths have the same rates until the first of them begins to fall.

    Args:
      cooldown: the share of the run that falls.
    """
    fall = max(round(cooldown * total), 1)

    def rate(step: Any) -> Any:
        rising = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
        gone = jnp.clip((step - (total - fall)) / fall, 0.0, 1.0)
        return (min_lr + (peak - min_lr) * (1 - jnp.sqrt(gone))) * rising

    return rate


def poly_schedule(
    peak: float, total: int, warmup: int, power: float, min_lr: float = 0.0
) -> optax.Schedule:
    """Return the learning rate by the 0-based step: linear warm-up from 0, then a polynomial.

    After the warm-up it is min_lr + (peak - min_lr) * (1 - t) ** power, where t goes from 0 to 1,
    which would be reached one step after the last (as in segmentation recipes since DeepLab).
    """
    decay = optax.polynomial_schedule(peak, min_lr, power, max(total - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def lars(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust: float = 0.001,
) -> optax.GradientTransformation:
    """Return LARS of the official linear probe (docs/REFERENCE.md section 4).

    Matrices are decayed, and their gradient is scaled to `trust` times their own norm; other
    parameters take the raw gradient. The rate stands outside the momentum buffer. `optax.lars` has
    it inside, and the two differ as soon as the rate changes. Pinned by tests/data/lars.npz.
    """

    def scaled(path: tuple, grad: jax.Array, param: jax.Array) -> jax.Array:
        if optim.role(path) != "matrix":
            return grad
        grad = grad + weight_decay * param
        grad_norm, param_norm = jnp.linalg.norm(grad), jnp.linalg.norm(param)
        defined = (grad_norm > 0) & (param_norm > 0)
        ratio = trust * param_norm / jnp.where(defined, grad_norm, 1.0)
        return grad * jnp.where(defined, ratio, 1.0)

    return optax.chain(
        optax.stateless(lambda grads, params: jax.tree.map_with_path(scaled, grads, params)),
        optax.trace(momentum),
        optax.scale_by_learning_rate(schedule),
    )


def side_by_side(
    make: Callable[[jax.Array], optax.GradientTransformation], scales: tuple[float, ...]
) -> optax.GradientTransformation:
    """Return an optimizer for parameters stacked on a leading axis: make(scales[i]) for row i."""
    factors = jnp.asarray(scales, jnp.float32)

    def init(params: Any) -> Any:
        return jax.vmap(lambda factor, p: make(factor).init(p))(factors, params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.vmap(lambda factor, *args: make(factor).update(*args))(
            factors, grads, state, params
        )

    return optax.GradientTransformation(init, update)
