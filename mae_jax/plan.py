"""What a training step needs on given chips, before they are paid for.

The real step is compiled for the topology, on any machine, and the program is read: memory by kind,
what the chips exchange, and the least time that the chips' peaks allow. Nothing here is measured.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import flops, hlo, sharding, train
from mae_jax.config import steps
from mae_jax.data.pipeline import steps_per_epoch
from mae_jax.errors import UserError
from mae_jax.optim import path_name

# Shapes that the cloud offers, of chips (docs.cloud.google.com/tpu/docs); the compiler knows more.
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SHAPES = {
    "v3": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
    "v4": DEEP,
    "v5e": FLAT,
    "v5p": DEEP,
    "v6e": FLAT,
}
GPUS = {"v100": "NVIDIA V100", "a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200"}
# What JAX 0.10.2 asks for; 0.12 reads what it compiles too, 0.10 not all that newer ones compile.
LIBTPU = "0.0.42"
# What a plan depends on, beside the config: the step, how it is laid out, and what is read from it.
CODE = ("models", "tasks", "train.py", "optim.py", "sharding.py", "flops.py", "hlo.py", "plan.py")


class Topology(NamedTuple):
    """Chips and how they are joined."""

    name: str  # as it was asked for: v5e:4x4, cpu:8, h100:8
    kind: str  # v3, v4, ..., cpu, gpu, v100, ...
    chips: int  # or GPUs or simulated devices, of one slice
    slices: int = 1  # joined by the data-center network only

    @property
    def is_tpu(self) -> bool:
        return self.kind in SHAPES

    @property
    def cloud(self) -> str:
        """The cloud's name of one slice: cores for v3, v4 and v5p, chips for v5e and v6e."""
        if not self.is_tpu:
            return ""
        prefix = {"v5e": "v5litepod"}.get(self.kind, self.kind)
        return f"{prefix}-{self.chips * (1 if self.kind in ('v5e', 'v6e') else 2)}"


def topology(name: str, slices: int = 1) -> Topology:
    """'v5e:4x4' (chips), 'cpu:8' or 'h100:8' (devices), and how many of them.

    Raises:
      UserError: there is no such topology; the nearest names are given.
    """
    kind, _, shape = name.partition(":")
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    whole = kind in SHAPES and len(sides) == SHAPES[kind][0].count("x") + 1
    counted = kind in ("cpu", "gpu", *GPUS) and len(sides) == 1
    if not (whole or counted) or 0 in sides:
        known = [f"{kind}:{shape}" for kind, shapes in SHAPES.items() for shape in shapes]
        clouds = {topology(shape).cloud: shape for shape in known}
        if name in clouds:
            raise UserError(f"{name!r} is the cloud's name; its chips are {clouds[name]}")
        near = difflib.get_close_matches(name, [*known, *clouds], 3, 0.4)
        near += [f"{gpu}:8" for gpu in difflib.get_close_matches(kind, ["cpu", "gpu", *GPUS], 1)]
        raise UserError(
            f"there is no topology {name!r}; nearest: {', '.join(near) or 'v5e:4x4, cpu:8, gpu:8'}."
            f" TPUs are shapes of chips ({', '.join(SHAPES)}), others are counted"
        )
    if slices < 1 or (slices > 1 and kind not in SHAPES):
        raise UserError(f"num_slices={slices}: at least 1, and more than one of TPUs only")
    return Topology(name, kind, math.prod(sides), slices)


def devices(where: Topology) -> list[Any]:
    """The devices of a topology: descriptions to compile for, or this machine's own.

    Raises:
      UserError: no compiler for TPUs is installed, it does not know the shape, or this process
        cannot simulate so many CPU devices any more.
    """
    if where.is_tpu:
        return _tpu_devices(where)
    if where.kind not in ("cpu", *GPUS) and jax.default_backend() == "gpu":
        found = jax.devices("gpu")
        if len(found) >= where.chips:
            return found[: where.chips]
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started; it may have enough
            jax.config.update("jax_num_cpu_devices", where.chips)
    found = jax.devices("cpu")
    if len(found) < where.chips:
        raise UserError(
            f"{where.name}: this process has {len(found)} CPU devices; start it with"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={where.chips}, or name the topology"
            " with the most devices first"
        )
    return found[: where.chips]


def _tpu_devices(where: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{where.name}: the compiler for TPUs is not installed; it runs on any Linux machine:"
            f" pip install libtpu=={LIBTPU}"
        )
    from jax.experimental import topologies

    # For a compiler without a TPU: no question to the cloud's metadata server, one worker, and no
    # lock that only one process may hold.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LIBRARY_PATH": importlib.import_module("libtpu").get_library_path(),
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": where.slices} if where.slices > 1 else {}
    if where.kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on Cloud TPU VMs
    try:
        return list(topologies.get_topology_desc(where.name, platform="tpu", **options).devices)
    except Exception as error:  # of many types, and none of ours
        raise UserError(
            f"{where.name}: the compiler does not know this shape"
            f" ({str(error).splitlines()[0][:200]}); the cloud has {', '.join(SHAPES[where.kind])}"
        ) from None


def meshes(where: Topology, state_bytes: float) -> Iterator[dict[str, int]]:
    """Meshes to try when none was asked for: those that exchange least come first.

    Data-parallel, then parameters split over ever more chips of a slice; without those on which
    the state and its gradients alone would not fit.
    """
    cores = where.chips * (2 if where.kind == "v3" else 1)
    limit = memory_limit(where)
    sizes = [size for size in (1, 4, 16, 64, 256) if cores % size == 0 and size < cores]
    for fsdp in [*sizes, cores] if cores > 1 else [1]:
        if limit is None or state_bytes / fsdp < limit:
            yield {"data": -1, "fsdp": fsdp, "tensor": 1}


KINDS = {
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    **GPUS,
}


def memory_limit(where: Topology) -> float | None:
    """Bytes of memory of one device, or None where we do not know it."""
    chip = flops.chip(KINDS.get(where.kind, ""))
    return chip.hbm * 2**30 if chip and chip.hbm else None


class Model(NamedTuple):
    """What the arrays of a program are told apart by."""

    sizes: frozenset[
        int
    ]  # numbers of elements of parameters, of one layer of them, of their shards
    vectors: int  # elements of all biases, scales and tokens of a layer together


def model_arrays(params: Any, devices: int) -> Model:
    """The sizes that parameters and gradients can have in a program for so many devices."""
    sizes, vectors = set(), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stacked = "blocks" in path_name(path)
        one = leaf.size // leaf.shape[0] if stacked else leaf.size
        vectors += one if one < sharding.LARGE else 0
        for whole in {leaf.size, one}:
            # Rings hand on one device's shard, both ways around half of it.
            sizes |= {whole // n for n in range(1, 2 * devices + 1) if whole % n == 0}
    return Model(frozenset(sizes), vectors)


def role(collective: hlo.Collective, array: hlo.Array, model: Model) -> str:
    """weight, gradient, scalar or activation: what an array is that devices exchange.

    Told by its number of elements, for programs reshape and transpose what they send. Biases and
    scales travel packed into tiles of 128. What is none of these counts as an activation.
    """
    packed = array.dims[-1:] == (128,) and array.size <= 2 * model.vectors + 1024
    if array.size == 1 or array.dims == (1, 1, 128):
        return "scalar"
    if array.size not in model.sizes and not packed:
        return "activation"
    summed = collective.kind in ("all-reduce", "reduce-scatter") or collective.computed
    return "gradient" if summed and collective.kind != "all-gather" else "weight"


def traffic(found: Iterable[hlo.Collective], model: Model) -> list[dict[str, Any]]:
    """Bytes of a step by kind of collective, mesh axes, and what is sent; the largest first."""
    table: dict[tuple, dict[str, Any]] = {}
    for collective in found:
        whole = sum(array.bytes for array in collective.arrays) or 1
        for array in collective.arrays:
            what = role(collective, array, model)
            key = (collective.kind, "+".join(collective.axes), what)
            row = table.setdefault(
                key, dict(zip(("kind", "axes", "what"), key, strict=True)) | {"bytes": 0, "sent": 0}
            )
            row["bytes"] += array.bytes * collective.times
            row["sent"] += round(collective.sent * array.bytes / whole)
    return sorted(table.values(), key=lambda row: -row["bytes"])


def roofline(
    chip: flops.Chip, work: float, moved: float, sent: float, sent_slowly: float
) -> dict[str, Any]:
    """The least time of a step, were all of a device's parts busy at once, and which one decides.

    Args:
      work: FLOPs of one device; moved: bytes to and from its memory; sent: bytes to neighbours;
      sent_slowly: bytes between slices. All of one step.
    """
    seconds = {
        "compute": work / (chip.tflops * 1e12),
        "memory": moved / (chip.hbm_rate * 1e9) if chip.hbm_rate else None,
        "links": sent / (chip.link_rate * 1e9) if chip.link_rate else None,
        "slices": sent_slowly / (chip.slow_rate * 1e9) if sent_slowly and chip.slow_rate else None,
    }
    known = {part: time for part, time in seconds.items() if time is not None}
    bound = max(known, key=lambda part: known[part])
    return {"seconds": seconds, "step": known[bound], "bound": bound}


def sizes_of(state: train.TrainState) -> dict[str, int]:
    """Bytes of the state on one device, by kind."""

    def held(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    return {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "other": held(state.extra),
    }


def needed(error: BaseException) -> tuple[float | None, float | None] | None:
    """(bytes needed at least, bytes there) if the compiler's error says that it does not fit."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {size} of {size} hbm", text) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", text
    )
    if not found:
        return None, None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]


def plan(
    config: ConfigDict, where: Topology, mesh: Mesh, make_task: Callable, compiled: bool = True
) -> dict[str, Any]:
    """Compiles the step of a config for a mesh and says what it takes, as JSON would hold it.

    Args:
      make_task: of the config's task.
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
    state, _ = train.lay_out(task, tx, config, mesh)
    chip = flops.chip(KINDS.get(where.kind, mesh.devices.flat[0].device_kind))
    forward = task.flops_per_example
    # With remat, the blocks' forward pass runs twice.
    hardware = task.passes + bool(config.model.get("remat", False))
    share = config.batch_size / mesh.size
    result: dict[str, Any] = {
        "topology": where.name,
        "cloud": where.cloud,
        "num_slices": where.slices,
        "devices": mesh.size,
        "device_kind": KINDS.get(where.kind, mesh.devices.flat[0].device_kind),
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "gflops": {
            "forward_per_image": forward / 1e9,
            "step_per_image": task.passes * forward / 1e9,
            "step_per_device": hardware * forward * share / 1e9,
        },
        "steps": total,
        "memory": sizes_of(state) | {"chip": memory_limit(where)},
        "compiled": compiled,
        "fits": None,
        "versions": versions(),
    }
    if not compiled:
        return result

    try:
        program = train.compile_step(task, tx, config, mesh)
    except Exception as error:
        if (short := needed(error)) is None:
            raise
        result["fits"] = False
        result["memory"] |= {"total": short[0], "chip": short[1] or result["memory"]["chip"]}
        return result | {"compile_seconds": round(time.monotonic() - began, 1)}
    memory = program.step.memory_analysis()
    text = hlo.parse(program.step.as_text())
    found = hlo.collectives(text, mesh.shape)
    rows = traffic(found, model_arrays(state.params, mesh.size))
    state_bytes = sum(result["memory"][kind] for kind in ("parameters", "optimizer", "other"))
    given = memory.argument_size_in_bytes
    held = given + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if where.is_tpu:  # the sum counts memory twice that is used again: it can exceed the chip's
        held = memory.peak_memory_in_bytes
    result["memory"] |= {
        "batch": max(given - state_bytes, 0),
        "temporary": held - given,
        "total": held,
        "moved": hlo.traffic(text),
    }
    result["collectives"] = rows
    result["fits"] = True if where.is_tpu else None
    if chip:
        slow = sum(row["sent"] for row in rows if row["axes"] == "slices")
        quick = sum(row["sent"] for row in rows) - slow
        work = result["gflops"]["step_per_device"] * 1e9
        line = roofline(chip, work, result["memory"]["moved"], quick, slow)
        line["hours"] = line["step"] * total / 3600
        line["mfu"] = task.passes * forward * share / (chip.tflops * 1e12) / line["step"]
        result["roofline"] = line
    return result | {"compile_seconds": round(time.monotonic() - began, 1)}


def hours(result: dict[str, Any], mfu: float) -> float | None:
    """Hours of the whole recipe if the chips reached so much of their peak: an assumption."""
    chip = flops.chip(result["device_kind"])
    if chip is None:
        return None
    work = result["gflops"]["step_per_image"] * 1e9 * result["batch_size"] * result["steps"]
    return work / (mfu * chip.tflops * 1e12 * result["devices"]) / 3600


def advice(result: dict[str, Any], config: ConfigDict) -> str:
    """What would make a plan fit that does not."""
    memory, mesh = result["memory"], result["mesh"]
    gib = 2**30
    state = memory["parameters"] + memory["optimizer"]
    ideas = []
    if not config.model.get("remat", False):
        ideas.append("--config.model.remat=True (blocks are computed again in the backward pass)")
    share = result["batch_size"] // (mesh["data"] * mesh["fsdp"])
    if share > 1:
        ideas.append(
            f"fewer than {share} images per chip: more chips, a smaller --config.batch_size, or"
            f" --config.grad_accum={config.grad_accum * 2} (--search_batch finds the largest)"
        )
    wider = result["devices"] // result["num_slices"]
    if mesh["fsdp"] < wider:
        ideas.append(
            f"--config.mesh.fsdp={wider} (state per chip {state * mesh['fsdp'] / wider / gib:.2f}"
            f" GiB instead of {state / gib:.2f})"
        )
    return "; or ".join(ideas) or "a topology with more chips, or with more memory in each"


def versions() -> dict[str, str]:
    """What a plan came from: code, JAX and compiler."""
    root = Path(__file__).parent
    files = [file for part in CODE for file in sorted([root / part, *(root / part).glob("*.py")])]
    text = b"".join(file.read_bytes() for file in files if file.is_file())
    found = {"code": hashlib.sha256(text).hexdigest()[:12], "jax": jax.__version__}
    if importlib.util.find_spec("libtpu"):
        found["libtpu"] = importlib.metadata.version("libtpu")
    return found


def remembered(
    folder: Path, config: ConfigDict, where: Topology, mesh: Any, make: Callable[[], dict]
) -> dict[str, Any]:
    """A plan from the cache, under a hash of all that it depends on, or a new one."""
    facts = [json.loads(config.to_json()), where, mesh, versions()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    file = folder / f"{key}.json"
    if file.exists():
        return json.loads(file.read_text()) | {"cached": True}
    result = make()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(file)
    return result
