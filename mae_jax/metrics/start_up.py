"""Lines that say before the first batch how large a run is."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

MAX_RATES = 100_000  # that are computed to tell the highest


def facts(
    task: Any,
    mesh: Mesh,
    schedule: Any,
    step: Any,
    params: Any,
    batch_size: int,
    grad_accum: int,
    learning_rate: Callable[[Any], Any],
) -> list[str]:
    """Return the size of a run: its model, mesh, memory, batch and rate.

    Args:
      task, schedule: a train.Task and its Schedule.
      step: the compiled step.
      params: the parameters, or their shapes.
      learning_rate: by 0-based step.
    """
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kept = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not getattr(jax.config, "jax_enable_compilation_cache", True) or not kept:
        kept = "no folder"
    lines = [
        f"parameters: {sum(math.prod(x.shape) for x in jax.tree.leaves(params)):,}",
        f"forward pass: {task.flops_per_example / 1e9:.2f} GFLOPs per image"
        f" ({task.flops_per_example / 2e9:.2f} GMACs)",
        f"mesh: {shape} on {mesh.size} x {mesh.devices.flat[0].device_kind},"
        f" {jax.process_count()} host(s)",
        f"compiled programs are kept in {kept} (--nocompilation_cache: none are)",
    ]
    if (memory := step.memory_analysis()) is not None:
        state, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        lines.append(
            f"memory of the step per device: {(state + temporary) / 2**20:,.0f} MiB"
            f" ({state / 2**20:,.0f} state and batch, {temporary / 2**20:,.0f} temporary)"
        )
    lines.append(
        f"batch: {batch_size} in {grad_accum} pass(es); {schedule.steps_per_epoch} steps"
        f" per epoch of {len(task.examples):,} examples; {schedule.total:,} steps"
    )
    # Of very many steps, some: a peak between two of them is hardly higher.
    some = range(0, schedule.total, schedule.total // MAX_RATES + 1)
    steps = np.array([*some, schedule.total - 1, schedule.total])
    rates = np.asarray(jax.vmap(learning_rate)(steps))
    rising = ", still rising at the end: config.optim.warmup is not over when the run ends"
    peak = f"learning rate: peak {rates[:-1].max():.3g}"
    return [*lines, peak + rising * bool(rates[-1] > rates[-2])]
