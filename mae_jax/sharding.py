"""Place every array: the mesh, one table of rules for parameters, and the rows of each host.

Mesh axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits
heads and hidden units. One size may be -1: all remaining devices. With fsdp=0 the state is split
over up to 16 TPUs of a slice, or up to 8 GPUs, and the rest of the devices is data-parallel.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax.errors import UserError
from mae_jax.optim import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
# The most devices over which fsdp=0 splits the state. Beyond 16 chips of a slice a shard has fewer
# rows than a tile, and the TPU compiler gathers by sums of zero-filled arrays (benchmarks/PLAN.md);
# 8 GPUs are a node. On CPUs the state stays whole.
WIDEST = {"tpu": 16, "gpu": 8}

# The first pattern that is found in a path decides. The path of an optimizer moment contains that
# of its parameter, and so gets the same rule. The layer axis of blocks, the first, is never split.
# A fork appends rules for its own parameters.
RULES = [
    (r"stack/blocks/attn/qkv/kernel$", P(None, "fsdp", None, "tensor", None)),  # layer D 3 S F
    (r"stack/blocks/attn/qkv/bias$", P(None, None, "tensor", None)),
    (r"stack/blocks/attn/[qkv]/kernel$", P(None, "fsdp", "tensor", None)),  # layer D S F
    (r"stack/blocks/attn/[qkv]/bias$", P(None, "tensor", None)),
    (r"stack/blocks/attn/proj/kernel$", P(None, "tensor", None, "fsdp")),  # layer S F D
    (r"stack/blocks/mlp/fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"stack/blocks/mlp/fc1/bias$", P(None, "tensor")),
    (r"stack/blocks/mlp/fc2/kernel$", P(None, "tensor", "fsdp")),
    (r"(params|mu|nu|ema)/(online/)?head/kernel$", P("fsdp")),  # D Y: Y may be any number
    (r"pred/kernel$", P("fsdp")),  # E T: T may be odd (588 for 14 x 14 pixels)
    (r"(patch_embed|embed|head|kv)/kernel$", P(None, "fsdp")),
    (r"pos_embed$", P(None, None, "fsdp")),
    (r"(scale|bias|token|map_weights|count|step|mean|var|ns_coeffs)$", P()),
]
# An array that nothing splits, with more elements than this and more than a thousandth of the whole
# state, is a mistake in the rules.
LARGE = 2**17


def make_mesh(
    data: int = -1, fsdp: int = 0, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh of all devices, or of those given.

    Raises:
      UserError: see `resolve` and `arrange`.
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = {"data": data, "fsdp": fsdp, "tensor": tensor}
    sizes = resolve(asked, len(devices), devices[0].platform, count_slices(devices))
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def resolve(
    asked: Mapping[str, int], devices: int, platform: str, slices: int = 1
) -> dict[str, int]:
    """Return the sizes of a mesh of so many devices, with -1 and fsdp=0 replaced.

    fsdp=0 is the largest power of two up to WIDEST that divides the devices of a slice, or all
    devices that remain if no other size is -1.

    Raises:
      UserError: the sizes do not multiply out to the number of devices.
    """
    shape = ", ".join(f"{name}={size}" for name, size in asked.items())
    sizes = dict(asked)
    if sizes["fsdp"] == 0:
        whole = devices // slices // max(sizes["tensor"], 1)
        shared = math.gcd(whole, WIDEST.get(platform, 1)) if whole else 1
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


def _rule(path: tuple) -> P:
    name = path_name(path)
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return spec
    raise UserError(f"no sharding rule for {name!r}: add one to RULES in mae_jax/sharding.py")


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return the sharding of every array of a state (or of its shapes), by RULES.

    Raises:
      UserError: a path without a rule; an axis that does not divide; or a large array that stays
        whole on every device of a mesh that is meant to split parameters.
    """

    large = max(LARGE, sum(x.size for x in jax.tree.leaves(state)) // 1000)

    def sharding(path, leaf):
        spec = _rule(path)
        name = path_name(path)
        for dim, axis in enumerate(spec):
            if axis and leaf.shape[dim] % mesh.shape[axis]:
                raise UserError(
                    f"{name} has shape {leaf.shape}: dimension {dim} ({leaf.shape[dim]}) is not"
                    f" divisible by mesh axis {axis}={mesh.shape[axis]}; change config.mesh.{axis}"
                )
        ways = math.prod(mesh.shape[axis] for axis in spec if axis)
        if ways == 1 and leaf.size > large and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            raise UserError(
                f"{name} with {leaf.size:,} elements is copied whole to every device although"
                f" fsdp={mesh.shape['fsdp']} and tensor={mesh.shape['tensor']}: the rule {spec}"
                " in mae_jax/sharding.py splits it over neither"
            )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose leading axis is the batch."""
    return NamedSharding(mesh, P(BATCH))


def constrain_batch(mesh: Mesh) -> Callable[[Array], Array]:
    """Return a function that keeps activations split by batch, and by nothing else.

    Without it XLA may turn FSDP into splitting features, and hold the whole batch on every device.
    A batch that the mesh does not divide, such as the one example of an init, passes unchanged.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH)

    def constrain(x: Array) -> Array:
        if len(x) % ways:
            return x
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    return constrain


def check_batch(mesh: Mesh, batch_size: int, grad_accum: int = 1) -> None:
    """Check that every device gets the same number of images in every pass.

    Raises:
      UserError: the batch is not divisible by data x fsdp x grad_accum.
    """
    if batch_size < 1 or grad_accum < 1:
        raise UserError(
            f"batch_size={batch_size} and grad_accum={grad_accum} must both be at least 1"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * grad_accum
    if batch_size % ways:
        nearest = max(ways, round(batch_size / ways) * ways)
        raise UserError(
            f"batch_size={batch_size} is not divisible by data x fsdp x grad_accum = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} x {grad_accum} = {ways}:"
            f" choose a multiple such as {nearest}"
        )


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the rows of a global batch that this host's devices hold, sorted."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, Array]:
    """Return this host's rows (in the order of `host_rows`) as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))
        for name, x in batch.items()
    }
