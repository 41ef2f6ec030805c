"""Say what a training step needs on given chips, before anybody pays for them.

The real step is compiled for a topology, on any machine, and the program is read: memory by kind,
what the devices exchange, and the least time that the chips' peaks allow. Nothing is measured.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import distributed, flops, hlo, sharding, traffic, train
from mae_jax.config import steps
from mae_jax.data.pipeline import steps_per_epoch
from mae_jax.topologies import Topology


def roofline(
    chip: flops.Chip, work: float, moved: float, sent: float, sent_slowly: float
) -> dict[str, Any]:
    """Return the least time of a step if all parts of a device are busy at once, and the limit.

    Args:
      work: FLOPs of one device in one step.
      moved: bytes to and from its memory.
      sent: bytes to its neighbours.
      sent_slowly: bytes between slices.
    """
    seconds = {
        "compute": work / (chip.tflops * 1e12),
        "memory": moved / (chip.hbm_rate * 1e9) if chip.hbm_rate else None,
        "links": sent / (chip.link_rate * 1e9) if chip.link_rate else None,
        "slices": sent_slowly / (chip.slow_rate * 1e9) if sent_slowly and chip.slow_rate else None,
    }
    step, bound = max((time, part) for part, time in seconds.items() if time is not None)
    return {"seconds": seconds, "step": step, "bound": bound}


def plan(
    config: ConfigDict,
    topology: Topology,
    mesh: Mesh,
    make_task: Callable[[ConfigDict, Callable], train.Task],
    compiled: bool = True,
) -> dict[str, Any]:
    """Compile the step of a config for a mesh and return what it takes, as JSON would hold it.

    Args:
      make_task: (config, constrain) -> task, such as `tasks.build`.
      compiled: False = without a program: no temporary memory, and nothing of what is exchanged.

    Raises:
      UserError: the config cannot work on this mesh.
    """
    began = time.monotonic()
    sharding.check_batch(mesh, config.batch_size, config.grad_accum)
    task = make_task(config, sharding.constrain_batch(mesh))
    per_epoch = steps_per_epoch(len(task.examples), config.batch_size)
    total = steps(config.train_for, config.batch_size, per_epoch)
    tx, _ = task.optimizer(total, per_epoch)
    state, _ = train.lay_out(task, tx, config.seed, mesh)
    device_kind = topology.device_kind or mesh.devices.flat[0].device_kind
    result: dict[str, Any] = {
        "topology": topology.name,
        "cloud": topology.cloud,
        "num_slices": topology.slices,
        "devices": mesh.size,
        "device_kind": device_kind,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "gflops": count_gflops(task, config, mesh.size),
        "steps": total,
        "memory": state_memory(state) | {"chip": topology.memory},
        "compiled": compiled,
        "fits": None,
        "versions": versions(),
    }
    if not compiled:
        return result
    sizes = {"batch_size": config.batch_size, "grad_accum": config.grad_accum}
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
        result["memory"] |= step_memory(program, result["memory"], topology.is_tpu)
        result["memory"]["moved"] = traffic.memory_bytes(parsed)
        result["collectives"] = traffic.by_axes(traffic.collectives(parsed, mesh.shape))
        if chip := flops.chip(device_kind):
            result["roofline"] = recipe_roofline(chip, result)
    return result | {"compile_seconds": round(time.monotonic() - began, 1)}


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


def step_memory(program: Any, state: dict[str, Any], is_tpu: bool) -> dict[str, int]:
    """Return the bytes of the batch, of temporary arrays, and of all that a step holds."""
    memory = program.memory_analysis()
    arguments = memory.argument_size_in_bytes
    total = arguments + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if is_tpu:  # the sum counts reused memory twice: it can exceed what the chip has
        total = memory.peak_memory_in_bytes
    held = sum(state[kind] for kind in ("parameters", "optimizer", "other"))
    return {"batch": max(arguments - held, 0), "temporary": total - arguments, "total": total}


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


def recipe_roofline(chip: flops.Chip, result: dict[str, Any]) -> dict[str, Any]:
    """Return the roofline of a plan's step, with the hours of the recipe and the MFU it means."""
    slow = sum(row["sent"] for row in result["collectives"] if row["axes"] == "slices")
    quick = sum(row["sent"] for row in result["collectives"]) - slow
    gflops = result["gflops"]
    line = roofline(chip, gflops["step_per_device"] * 1e9, result["memory"]["moved"], quick, slow)
    useful = gflops["step_per_image"] * 1e9 * result["batch_size"] / result["devices"]
    mfu = useful / (chip.tflops * 1e12) / line["step"]
    return line | {"hours": line["step"] * result["steps"] / 3600, "mfu": mfu}


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


def versions() -> dict[str, str]:
    """Return what a plan depends on beside the config: code, JAX and compiler."""
    compiler = {}
    if importlib.util.find_spec("libtpu"):
        compiler["libtpu"] = importlib.metadata.version("libtpu")
    return {"code": distributed.source_digest(), "jax": jax.__version__} | compiler


def cache_file(folder: Path, config: ConfigDict, topology: Topology, mesh: Mesh) -> Path:
    """Return the file that holds a plan once it is made, named by all that the plan depends on."""
    facts = [json.loads(config.to_json()), topology, dict(mesh.shape), versions()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return folder / f"{key}.json"
