"""Say what a training step needs on given chips, before anybody pays for them.

The real step is compiled for a topology, on any machine, and the program is read: memory by kind,
what the devices exchange, the least time that the chips' peaks allow, and the time by the TPU
compiler's own count of cycles. Nothing is measured.
"""

import importlib.metadata
import importlib.util
import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import clock, distributed, flops, gpu_estimate, hlo, sharding, tasks, traffic, train
from mae_jax.config import steps
from mae_jax.data.pipeline import steps_per_epoch
from mae_jax.models import mae
from mae_jax.models.spec import ModelSpec
from mae_jax.tasks import pretrain
from mae_jax.topologies import Clock, Topology


def plan(
    config: ConfigDict, topology: Topology, mesh: Mesh, compiled: bool = True
) -> dict[str, Any]:
    """Compile the step of a config for a mesh and return what it takes, as JSON would hold it.

    Args:
      compiled: False = without a program: no temporary memory, and nothing of what is exchanged.

    Raises:
      UserError: the config cannot work on this mesh.
    """
    began = time.monotonic()
    sizes = {"batch_size": config.batch_size, "grad_accum": config.grad_accum}
    sharding.check_batch(mesh, **sizes)
    task = tasks.build(config, mesh)
    per_epoch = steps_per_epoch(len(task.examples), config.batch_size)
    total = steps(config.train_for, config.batch_size, per_epoch)
    tx, _ = task.optimizer(total, per_epoch)
    state, _ = train.lay_out(task, tx, config.seed, mesh)
    memory = state_memory(state)
    # A large program compiles for minutes, so one whose state alone does not fit is not compiled.
    hopeless = topology.memory is not None and sum(memory.values()) > topology.memory
    device_kind = topology.device_kind or mesh.devices.flat[0].device_kind
    result: dict[str, Any] = {
        "topology": topology.name,
        "cloud": topology.cloud,
        "num_slices": topology.slices,
        "devices": mesh.size,
        "hosts": len({device.process_index for device in mesh.devices.flat}),
        "device_kind": device_kind,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "gflops": count_gflops(task, config, mesh.size),
        "steps": total,
        "memory": memory | {"chip": topology.memory},
        "compiled": compiled and not hopeless,
        "fits": False if hopeless else None,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "libtpu")
            if importlib.util.find_spec(name)
        }
        | {"code": distributed.source_digest()},
    }
    if estimate := gpu_estimate.of_plan(config, spec_of_mae(task), result):
        result["gpu"] = estimate
    if not result["compiled"]:
        return result
    try:
        program = train.compile_step(task, tx, mesh, state, seed=config.seed, **sizes)
    except Exception as error:
        if (shortage := memory_shortage(error)) is None:
            raise
        result["fits"] = False
        result["memory"] |= shortage
    else:
        result["fits"] = True if topology.is_tpu else None
        parsed = hlo.parse(program.as_text())
        result["memory"] |= step_memory(program, sum(memory.values()), topology.is_tpu)
        result["memory"]["moved"] = traffic.memory_bytes(parsed)
        exchanges = traffic.collectives(parsed, mesh.shape)
        result["collectives"] = traffic.by_axes(exchanges)
        if chip := flops.chip(device_kind):
            result["roofline"] = roofline(chip, result)
            if topology.clock:
                links = clock.waiting(exchanges, chip)
                result["clock"] = by_clock(topology.clock, parsed, result) | {"links": links}
    return result | {"compile_seconds": round(time.monotonic() - began, 1)}


def spec_of_mae(task: train.Task) -> ModelSpec | None:
    """Return the network of a task that trains the paper's; None of any other, or other decoder."""
    if not isinstance(task, pretrain.Task) or type(task.network) is not mae.MAE:
        return None
    return task.spec if task.network.make_decoder is mae.Decoder else None


def count_gflops(task: train.Task, config: ConfigDict, devices: int) -> dict[str, float]:
    """Return the GFLOPs of a forward pass and of a step, counted from the network's sizes."""
    forward = task.flops_per_example / 1e9
    # With remat the forward pass of the blocks runs twice.
    passes = task.flops_multiplier + bool(config.model.get("remat", False))
    return {
        "forward_per_image": forward,
        "step_per_image": task.flops_multiplier * forward,
        "step_per_device": passes * forward * config.batch_size / devices,
    }


def state_memory(state: train.TrainState) -> dict[str, int]:
    """Return the bytes of the state on one device, by kind."""

    def size(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    kinds = {"parameters": state.params, "optimizer": state.opt_state, "other": state.extra}
    return {kind: size(tree) for kind, tree in kinds.items()}


def step_memory(program: Any, state_bytes: int, is_tpu: bool) -> dict[str, int]:
    """Return the bytes of the batch, of temporary arrays, and of all that a step holds."""
    memory = program.memory_analysis()
    arguments = memory.argument_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + memory.temp_size_in_bytes + outputs
    if is_tpu:  # the sum counts reused memory twice: it can exceed what the chip has
        total = memory.peak_memory_in_bytes
    batch = max(arguments - state_bytes, 0)
    return {"batch": batch, "temporary": total - arguments, "total": total}


def memory_shortage(error: BaseException) -> dict[str, float | None] | None:
    """Return the bytes that a step needs and has, or None if it fails for another reason."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    size = r"([\d.]+)([KMGT])"
    sizes = re.search(rf"Used {size} of {size} hbm", text) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", text
    )
    if not sizes:
        return {"total": None}
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    total, chip = (float(sizes[i]) * unit[sizes[i + 1]] for i in (1, 3))
    return {"total": total, "chip": chip}


def roofline(chip: flops.Chip, result: dict[str, Any]) -> dict[str, Any]:
    """Return the least time of a plan's step if all parts of a device are busy at once.

    Also what limits it, the hours of the recipe, and the model FLOPs utilisation that it means.
    """
    slow = sum(row["sent"] for row in result["collectives"] if row["axes"] == "slices")
    quick = sum(row["sent"] for row in result["collectives"]) - slow
    gflops = result["gflops"]
    seconds = {
        "compute": gflops["step_per_device"] / (chip.tflops * 1e3),
        "memory": result["memory"]["moved"] / (chip.hbm_rate * 1e9) if chip.hbm_rate else None,
        "links": quick / (chip.link_rate * 1e9) if chip.link_rate else None,
        "slices": slow / (chip.slow_rate * 1e9) if slow and chip.slow_rate else None,
    }
    step, bound = max((time, part) for part, time in seconds.items() if time is not None)
    useful = gflops["step_per_image"] * result["batch_size"] / result["devices"]
    return {
        "seconds": seconds,
        "step": step,
        "bound": bound,
        "hours": step * result["steps"] / 3600,
        "mfu": useful / (chip.tflops * 1e3) / step,
    }


def by_clock(rating: Clock, program: hlo.Program, result: dict[str, Any]) -> dict[str, Any]:
    """Return the time of a plan's step by the compiler's cycles, and what has no estimate.

    `steps` and `hours` are a range from the roofline up where the compiler rates a chip too slow.
    """
    step = clock.cycles(program) / (rating.ghz * 1e9)
    least = min(step, result["roofline"]["step"]) if rating.is_rough else step
    unrated = [row for row in clock.unrated(program) if row["bytes"] >= 2**20]
    return {
        **{"ghz": rating.ghz, "step": step, "unrated": unrated},
        "steps": [least, step],
        "hours": [seconds * result["steps"] / 3600 for seconds in (least, step)],
    }


def hours(result: dict[str, Any], mfu: float) -> float | None:
    """Return the hours of the whole recipe if the chips reach this fraction of their peak."""
    chip = flops.chip(result["device_kind"])
    if chip is None:
        return None
    work = result["gflops"]["step_per_image"] * 1e9 * result["batch_size"] * result["steps"]
    return work / (mfu * chip.tflops * 1e12 * result["devices"]) / 3600


def advice(result: dict[str, Any], config: ConfigDict) -> str:
    """Return what may make a step fit that does not."""
    memory, mesh = result["memory"], result["mesh"]
    state = (memory["parameters"] + memory["optimizer"]) / 2**30
    ideas = []
    if not config.model.get("remat", False):
        ideas.append("--config.model.remat=True (blocks are computed again in the backward pass)")
    share = result["batch_size"] // (mesh["data"] * mesh["fsdp"])
    if share > 1:
        ideas.append(
            f"fewer than {share} images per chip: more chips, a smaller --config.batch_size, or"
            f" --config.grad_accum={config.grad_accum * 2} (--search_batch finds the largest)"
        )
    widest = result["devices"] // result["num_slices"]
    if mesh["fsdp"] < widest:
        ideas.append(
            f"--config.mesh.fsdp={widest} (state per chip {state * mesh['fsdp'] / widest:.2f} GiB"
            f" instead of {state:.2f})"
        )
    return "; or ".join(ideas) or "a topology with more chips, or with more memory in each"
