"""Make the mesh of config.mesh: its sizes, and which device stands where.

Axes: see sharding.py. One size may be -1: all remaining devices. With fsdp=0 the state is split
over up to 16 TPUs of a slice, or up to 8 GPUs, and the rest of the devices is data-parallel.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mae_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# The most devices over which fsdp=0 splits the state. Beyond 16 chips of a slice a shard has fewer
# rows than a tile, and the TPU compiler gathers by sums of zero-filled arrays (benchmarks/PLAN.md);
# 8 GPUs are a node. On CPUs the state stays whole.
MAX_FSDP = {"tpu": 16, "gpu": 8}


def make_mesh(
    data: int = -1, fsdp: int = 0, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh of all devices, or of those given.

    Raises:
      UserError: see `sizes_of` and `arrange`.
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = {"data": data, "fsdp": fsdp, "tensor": tensor}
    sizes = sizes_of(asked, len(devices), devices[0].platform, count_slices(devices))
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def sizes_of(
    asked: Mapping[str, int], devices: int, platform: str, slices: int = 1
) -> dict[str, int]:
    """Return the sizes of a mesh of `devices` devices, with -1 and fsdp=0 replaced.

    fsdp=0 is the largest power of two up to MAX_FSDP that divides the devices of a slice, or all
    devices that remain if no other size is -1.

    Raises:
      UserError: the sizes do not multiply out to the number of devices.
    """
    shape = ", ".join(f"{name}={size}" for name, size in asked.items())
    sizes = dict(asked)
    if sizes["fsdp"] == 0:
        data, tensor = (max(sizes[name], 1) for name in ("data", "tensor"))
        whole = math.gcd(devices // slices // tensor, devices // data)
        shared = math.gcd(whole, MAX_FSDP.get(platform, 1)) if whole else 1
        sizes["fsdp"] = shared if -1 in sizes.values() else -1
    free = [name for name, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
        raise UserError(
            f"mesh {shape}: sizes must be at least 1, or 0 for fsdp to choose it, and at most one"
            " of them -1"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if devices % known or (not free and known != devices):
        raise UserError(
            f"mesh {shape} needs {'a multiple of ' if free else ''}{known} devices, there are"
            f" {devices}: change config.mesh (one size may be -1: all that remain)"
        )
    return sizes | dict.fromkeys(free, devices // known)


def count_slices(devices: Sequence[Any]) -> int:
    """Return how many groups of devices only the slow data-center network joins."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Return the devices in the shape of a mesh, neighbours on the chips' network side by side.

    Several slices are joined by the slow data-center network only. As many of them as possible lie
    on the data axis, outermost, which exchanges one gradient a step, and the rest on fsdp.

    Raises:
      UserError: neither axis can be cut into the slices.
    """
    slices = count_slices(devices)
    outer = (math.gcd(sizes["data"], slices), slices // math.gcd(sizes["data"], slices), 1)
    if sizes["fsdp"] % outer[1]:
        shape = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {shape} cannot be cut into {slices} slices: choose a data axis that is a"
            f" multiple of {slices}"
        )
    inner = tuple(size // parts for size, parts in zip(sizes.values(), outer, strict=True))
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )
