"""Describe the chips that a run can be planned for: their topologies and their devices."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from mae_jax import flops
from mae_jax.errors import UserError, nearest

# Chips of the cloud's shapes (docs.cloud.google.com/tpu/docs); the compiler knows more shapes.
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
V3 = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")
SHAPES = {"v3": V3, "v4": DEEP, "v5e": FLAT, "v5p": DEEP, "v6e": FLAT}
GPUS = ("v100", "a100", "h100", "h200")
COUNTED = ("cpu", "gpu", *GPUS)
# What JAX 0.10.2 asks for. JAX 0.12 also reads what this version compiles; JAX 0.10 does not read
# everything that newer versions compile.
LIBTPU = "0.0.42"


class Clock(NamedTuple):
    """The rating of a chip by the TPU compiler, in the cycles that it estimates for operations."""

    ghz: float  # by which cycles become seconds
    product: float  # rate of a product of two 8192 x 8192 bf16 matrices, of the chip's peak
    addition: float  # rate of an addition of two arrays of 256 MiB, of the memory's peak

    @property
    def is_rough(self) -> bool:
        """True if the memory is rated so slow that the estimate is an upper bound only."""
        return self.addition < 0.8


# By libtpu 0.0.52; 0.0.42 agrees for whole steps. The frequency of v6e is a guess.
CLOCKS = {
    "v3": Clock(0.94, 0.97, 0.89),
    "v4": Clock(1.05, 0.93, 0.70),
    "v5e": Clock(1.5, 0.88, 0.57),
    "v5p": Clock(1.75, 0.90, 0.45),
    "v6e": Clock(1.75, 0.70, 0.44),
}


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
    def devices(self) -> int:
        """How many devices JAX sees: a v3 chip is two of them."""
        return self.chips * self.slices * (2 if self.kind == "v3" else 1)

    @property
    def platform(self) -> str:
        """JAX's name of the backend: tpu, gpu or cpu."""
        return "tpu" if self.is_tpu else "cpu" if self.kind == "cpu" else "gpu"

    @property
    def clock(self) -> Clock | None:
        """The rating of the chip by the compiler, or None if there is none."""
        return CLOCKS.get(self.kind)

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


def parse(name: str, slices: int = 1) -> Topology:
    """Return the topology of a name: 'v5e:4x4' (chips), 'cpu:8' or 'h100:8' (devices)."""
    kind, _, shape = name.partition(":")
    dimensions = SHAPES[kind][0].count("x") + 1 if kind in SHAPES else int(kind in COUNTED)
    sides = re.findall(r"\d+", shape)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or len(sides) != dimensions:
        shapes = [f"{kind}:{shape}" for kind in SHAPES for shape in SHAPES[kind]]
        clouds = {parse(shape).cloud: shape for shape in shapes}
        if name in clouds:
            raise UserError(f"{name!r} is the cloud's name; its chips are {clouds[name]}")
        raise UserError(
            f"there is no topology {name!r}: TPUs are shapes of chips ({', '.join(SHAPES)}), other"
            f" devices are counted{nearest(name, [*shapes, *(f'{kind}:8' for kind in COUNTED)])}"
        )
    if slices < 1 or (slices > 1 and kind not in SHAPES):
        raise UserError(f"num_slices={slices}: at least 1, and more than one of TPUs only")
    return Topology(name, kind, math.prod(map(int, sides)), slices)


def simulate(topologies: list[Topology]) -> None:
    """Let JAX make enough CPU devices for all of the topologies; call it before JAX starts."""
    counts = [topology.chips for topology in topologies if not topology.is_tpu]
    if counts and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(counts))


def devices(topology: Topology) -> list[Any]:
    """Return the devices of a topology: descriptions to compile for, or this machine's own."""
    if topology.is_tpu:
        return _tpu_devices(topology)
    own = jax.devices("cpu")
    if topology.kind == "gpu" and jax.default_backend() == "gpu":
        gpus = jax.devices("gpu")
        own = gpus if len(gpus) >= topology.chips else own
    if len(own) < topology.chips:
        raise UserError(
            f"{topology.name}: this process has {len(own)} CPU devices; start it with"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={topology.chips}"
        )
    return own[: topology.chips]


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
