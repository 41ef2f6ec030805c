"""Optimizers and schedules beside the published ones, by the names that a config may give."""

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

    Scaled to the root mean square of Adam's, so that rate and decay carry over (arXiv 2502.16982).
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
      decayed, scales: as of `optim.adamw`.

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
