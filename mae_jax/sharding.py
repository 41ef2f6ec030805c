"""Place every array on a mesh: one table of rules for parameters, and the rows of each host.

Mesh axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits
heads and hidden units.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax.errors import UserError
from mae_jax.optim import path_name

BATCH = ("data", "fsdp")

# The first pattern that is found in a path, and whose split divides the array, decides. The path of
# an optimizer moment contains that of its parameter, and so gets the same rule. The layer axis of
# blocks, the first, is never split. A fork appends rules for its own parameters.
RULES = [
    (r"stack/blocks/attn/qkv/kernel$", P(None, "fsdp", None, "tensor", None)),  # layer D 3 S F
    (r"stack/blocks/attn/qkv/bias$", P(None, None, "tensor", None)),
    (r"stack/blocks/attn/[qkv]/kernel$", P(None, "fsdp", "tensor", None)),  # layer D S F
    (r"stack/blocks/attn/[qkv]/bias$", P(None, "tensor", None)),
    # Heads that divide are split: of D / fsdp = 64 numbers a TPU stores half a tile of 128 empty.
    (r"stack/blocks/attn/proj/kernel$", P(None, ("tensor", "fsdp"))),  # layer S F D
    (r"stack/blocks/attn/proj/kernel$", P(None, "tensor", None, "fsdp")),
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


def _rule(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    name = path_name(path)
    specs = [spec for pattern, spec in RULES if re.search(pattern, name)]
    for spec in specs:
        if not _undivided(shape, spec, mesh):
            return spec
    if specs:
        return specs[-1]
    raise UserError(f"no sharding rule for {name!r}: add one to RULES in mae_jax/sharding.py")


def _ways(axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Return in how many parts one entry of a rule splits a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def _undivided(shape: tuple[int, ...], spec: P, mesh: Mesh) -> list[tuple[int, Any]]:
    """Return the dimensions, with their axes, that a rule cannot split evenly."""
    pairs = enumerate(zip(shape, spec, strict=False))
    return [(dim, axes) for dim, (size, axes) in pairs if size % _ways(axes, mesh)]


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return the sharding of every array of a state (or of its shapes), by RULES.

    Raises:
      UserError: a path without a rule; an axis that does not divide; or a large array that stays
        whole on every device of a mesh that is meant to split parameters.
    """

    large = max(LARGE, sum(x.size for x in jax.tree.leaves(state)) // 1000)

    def sharding(path, leaf):
        spec = _rule(path, leaf.shape, mesh)
        name = path_name(path)
        for dim, axis in _undivided(leaf.shape, spec, mesh):
            raise UserError(
                f"{name} has shape {leaf.shape}: dimension {dim} ({leaf.shape[dim]}) is not"
                f" divisible by mesh axis {axis}={_ways(axis, mesh)}; change config.mesh.{axis}"
            )
        ways = math.prod(_ways(axes, mesh) for axes in spec)
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
