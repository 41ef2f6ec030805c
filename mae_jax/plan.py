"""Say what a training step needs on given chips, before anybody pays for them.

The real step is compiled for a topology, on any machine, and the program is read: memory by kind,
what the devices exchange, and the least time that the chips' peaks allow. Nothing is measured.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import distributed, flops, hlo, sharding, traffic, train
from mae_jax.config import steps
from mae_jax.data.pipeline import steps_per_epoch
from mae_jax.errors import UserError, nearest

# Chips of the cloud's shapes (docs.cloud.google.com/tpu/docs); the compiler knows more shapes.
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SHAPES = {
    "v3": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
    "v4": DEEP,
    "v5e": FLAT,
    "v5p": DEEP,
    "v6e": FLAT,
}
GPUS = ("v100", "a100", "h100", "h200")
# What JAX 0.10.2 asks for. JAX 0.12 also reads what this version compiles; JAX 0.10 does not read
# everything that newer versions compile.
LIBTPU = "0.0.42"


class Topology(NamedTuple):
    """Chips and how they are joined."""

    name: str  # as the user gave it: v5e:4x4, cpu:8, h100:8
    kind: str  # v3, v4, ..., cpu, gpu, v100, ...
    chips: int  # of one slice; or GPUs, or simulated devices
    slices: int = 1  # joined by the data-center network only

    @property
    def is_tpu(self) -> bool:
        return self.kind in SHAPES

    @property
    def cloud(self) -> str:
        """The cloud's name of one slice: it counts cores for v3, v4 and v5p, else chips."""
        prefix = {"v5e": "v5litepod"}.get(self.kind, self.kind)
        cores = self.chips * (1 if self.kind in ("v5e", "v6e") else 2)
        return f"{prefix}-{cores}" if self.is_tpu else ""

    @property
    def device_kind(self) -> str:
        """JAX's name of the device, or '' if it is one of this machine's own."""
        if self.is_tpu:
            return flops.ALIASES.get(f"TPU {self.kind}", f"TPU {self.kind}")
        return f"NVIDIA {self.kind.upper()}" if self.kind in GPUS else ""

    @property
    def memory(self) -> float | None:
        """Bytes of memory of one device, or None for an unknown device."""
        chip = flops.chip(self.device_kind)
        return chip.hbm * 2**30 if chip and chip.hbm else None


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Return the topology of a name: 'v5e:4x4' (chips), 'cpu:8' or 'h100:8' (devices)."""
    kind, _, shape = name.partition(":")
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    counted = ("cpu", "gpu", *GPUS)
    dimensions = SHAPES[kind][0].count("x") + 1 if kind in SHAPES else int(kind in counted)
    if not dimensions or len(sides) != dimensions or 0 in sides:
        shapes = [f"{kind}:{shape}" for kind in SHAPES for shape in SHAPES[kind]]
        clouds = {parse_topology(shape).cloud: shape for shape in shapes}
        if name in clouds:
            raise UserError(f"{name!r} is the cloud's name; its chips are {clouds[name]}")
        choices = [*shapes, *clouds, *(f"{device}:8" for device in counted)]
        raise UserError(
            f"there is no topology {name!r}: TPUs are shapes of chips ({', '.join(SHAPES)}), other"
            f" devices are counted{nearest(name, choices)}"
        )
    if slices < 1 or (slices > 1 and kind not in SHAPES):
        raise UserError(f"num_slices={slices}: at least 1, and more than one of TPUs only")
    return Topology(name, kind, math.prod(sides), slices)


def devices(topology: Topology) -> list[Any]:
    """Return the devices of a topology: descriptions to compile for, or this machine's own."""
    if topology.is_tpu:
        return _tpu_devices(topology)
    if topology.kind not in ("cpu", *GPUS) and jax.default_backend() == "gpu":
        gpus = jax.devices("gpu")
        if len(gpus) >= topology.chips:
            return gpus[: topology.chips]
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started; it may have enough
            jax.config.update("jax_num_cpu_devices", topology.chips)
    cpus = jax.devices("cpu")
    if len(cpus) < topology.chips:
        raise UserError(
            f"{topology.name}: this process has {len(cpus)} CPU devices; start it with"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={topology.chips}, or name the"
            " topology with the most devices first"
        )
    return cpus[: topology.chips]


def _tpu_devices(topology: Topology) -> list[Any]:
    """Return descriptions of the devices of a TPU topology, from the TPUs' compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{topology.name}: the compiler for TPUs is not installed; it runs on any Linux"
            f" machine: pip install libtpu=={LIBTPU}"
        )
    from jax.experimental import topologies

    # Without a TPU the compiler must not ask the cloud's metadata server, wait for other workers,
    # or take the lock that only one process may hold.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LIBRARY_PATH": importlib.import_module("libtpu").get_library_path(),
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on Cloud TPU VMs
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
    except Exception as error:  # of many types, and none of ours
        raise UserError(
            f"{topology.name}: the compiler does not know this shape"
            f" ({str(error).splitlines()[0][:200]}); the cloud has"
            f" {', '.join(SHAPES[topology.kind])}"
        ) from None


def meshes(topology: Topology, state_bytes: float) -> Iterator[dict[str, int]]:
    """Yield the meshes to try when none was asked for, those that exchange least first.

    The first is data-parallel; the others split the state over more and more chips of a slice.
    Meshes on which the state and its gradients alone do not fit are left out.
    """
    count = topology.chips * (2 if topology.kind == "v3" else 1)
    sizes = [size for size in (1, 4, 16, 64, 256) if count % size == 0 and size < count]
    for fsdp in [*sizes, count]:
        if topology.memory is None or state_bytes / fsdp < topology.memory:
            yield {"data": -1, "fsdp": fsdp, "tensor": 1}


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
    config: ConfigDict, topology: Topology, mesh: Mesh, make_task: Callable, compiled: bool = True
) -> dict[str, Any]:
    """Compile the step of a config for a mesh and return what it takes, as JSON would hold it.

    Args:
      make_task: (config, constrain) -> task.
      compiled: False = without a program: no temporary memory, and nothing of what is exchanged.

    Raises:
      UserError: the config cannot work on this mesh.
    """
    began = time.monotonic()
    sharding.check_batch(mesh, config.batch_size, config.grad_accum)
    task: train.Task = make_task(config, sharding.constrain_batch(mesh))
    per_epoch = steps_per_epoch(task.num_examples, config.batch_size)
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
        "gflops": work(task, config, mesh.size),
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
        result["memory"] |= {key: size for key, size in shortage.items() if size}
    else:
        result["fits"] = True if topology.is_tpu else None
        text = hlo.parse(program.as_text())
        result["memory"] |= step_memory(program, result["memory"], topology.is_tpu)
        result["memory"]["moved"] = traffic.memory_bytes(text)
        result["collectives"] = traffic.by_axes(traffic.collectives(text, mesh.shape))
        if chip := flops.chip(device_kind):
            result["roofline"] = recipe_roofline(chip, result)
    return result | {"compile_seconds": round(time.monotonic() - began, 1)}


def work(task: train.Task, config: ConfigDict, devices: int) -> dict[str, float]:
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
