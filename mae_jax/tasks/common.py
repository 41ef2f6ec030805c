"""Pieces that several tasks share: how networks run, AdamW with its schedule, refusals."""

from collections.abc import Mapping
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import optim, optimizers, sharding
from mae_jax.config import steps
from mae_jax.errors import UserError
from mae_jax.models.compute import ComputeConfig


def compute(model: ConfigDict, mesh: Mesh | None) -> ComputeConfig:
    """Return how config.model says that a network is run on a mesh; None = on JAX's first device.

    Raises:
      UserError: a value of config.model cannot work there.
    """
    if mesh is None:
        return ComputeConfig.from_config(model)
    constrain = sharding.constrain_batch(mesh)
    split_heads = mesh.shape["tensor"] > 1
    return ComputeConfig.from_config(model, constrain, mesh.devices.flat[0], split_heads)


def learning_rate(
    o: Mapping[str, Any], batch_size: int, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Return the schedule of config.optim: linear warm-up, then half a cosine, or `schedule`.

    Raises:
      UserError: there is no schedule of that name.
    """
    name = o.get("schedule", "cosine")
    if name not in ("cosine", "wsd"):
        raise UserError(f"config.optim.schedule={name!r}: give cosine or wsd")
    warmup = steps(o["warmup"], batch_size, steps_per_epoch)
    arguments = optim.peak_lr(o["blr"], batch_size), total_steps, warmup, o["min_lr"]
    if name == "cosine":
        if o.get("cooldown", 0.2) != 0.2:
            raise UserError(
                f"config.optim.cooldown={o['cooldown']} is for schedule=wsd: leave it out"
            )
        return optim.cosine_schedule(*arguments)
    return optimizers.stable_decay(*arguments, o.get("cooldown", 0.2))


def adamw(
    o: Mapping[str, Any],
    schedule: optax.Schedule,
    **rules: Any,
) -> optax.GradientTransformation:
    """Return the AdamW of config.optim; `rules` are `decayed` and `scales` of `optim.adamw`."""
    return optim.adamw(
        schedule,
        b1=o["b1"],
        b2=o["b2"],
        eps=o.get("eps", 1e-8),
        weight_decay=o["weight_decay"],
        **rules,
    )


def optimizer(
    o: Mapping[str, Any], schedule: optax.Schedule, **rules: Any
) -> optax.GradientTransformation:
    """Return the optimizer of config.optim: AdamW, or what `name` and `clip_norm` ask for.

    Args:
      rules: see `adamw`.

    Raises:
      UserError: there is no optimizer of that name.
    """
    if o.get("name", "adamw") == "adamw" and not o.get("clip_norm"):
        return adamw(o, schedule, **rules)
    return optimizers.by_name(o, schedule, **rules)
