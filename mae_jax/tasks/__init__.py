"""Objectives: each module has a class `Task`, which the loop trains."""

import sys

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import limits, train
from mae_jax.config import resolve
from mae_jax.errors import refuse


def build(config: ConfigDict, mesh: Mesh | None = None) -> train.Task:
    """Return the task that `config.task` names: a module here, or a dotted path to a fork's own.

    Args:
      mesh: the devices that the task is for; None = JAX's first, alone.

    Raises:
      UserError: there is no such task, or a value of the config cannot work.
    """
    limits.check(config)
    task = resolve(config.task, sys.modules[__name__], member="Task").from_config(config, mesh)
    if config.get("online_probe", False):
        from mae_jax.models import probe
        from mae_jax.tasks import online, pretrain

        if not isinstance(task, pretrain.Task):
            refuse("online_probe", True, f"task {config.task!r} is no pre-training: give False")
        task = online.OnlineProbe(task, probe.LinearHead(task.examples.classes))
    return task
