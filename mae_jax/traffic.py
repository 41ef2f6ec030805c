"""Count what a compiled program moves: between devices, and to and from a device's memory."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mae_jax.hlo import Array, Call, Computation, Op, Program, executed

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no data, or whose data is counted where the operation ends.
FREE = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|iota|"
    r"partition-id|replica-id|opt-barrier|send|recv|.*-done|async-.*)$"
)
SLICES = ("slice", "dynamic-slice", "gather")  # they read as much as they return
PAIRS = ("copy-start", "all-gather-start", "collective-permute-start")  # return operands, results


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # of the mesh; ("slices",) over the network between slices
    members: int  # devices that exchange with each other
    times: int  # in one step
    size: int  # bytes of the whole arrays: what a gather returns, what a reduction takes
    dtype: str  # such as bf16
    beside: bool  # whether the program does other work while it is under way

    @property
    def payload(self) -> int:
        """Bytes in one step."""
        return self.times * self.size

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one step, when the members form a ring."""
        part = (self.members - 1) / self.members
        factor = {"all-reduce": 2 * part, "collective-permute": 1.0}.get(self.kind, part)
        return factor * self.payload


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Return what the program's devices exchange in one run.

    A collective that is spread over several fusions, to run beside other work, counts once.
    """
    exchanges, seen = [], set()
    for call in executed(program, into_fusions=True):
        if (what := kind(call)) is None:
            continue
        # The parts of one collective in several fusions share a channel; so do copies of a whole
        # collective in a row, but those stand outside of fusions, or each is a fusion of its own.
        fused = call.computation != call.around
        parts = fused and what != "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", call.op.rest) if parts else None
        key = (call.around, channel[1] if channel else (call.computation, call.op.name))
        if key in seen:
            continue
        seen.add(key)
        axes, members = _members(call.op, what, mesh)
        if axes and members > 1:
            size = sum(array.bytes for array in _whole_arrays(program, call, what))
            beside = parts or call.op.opcode.endswith("-start")
            dtype = re.findall(r"([a-z]\w*)\[", call.op.shape)[0]
            exchanges.append(Collective(what, axes, members, call.times, size, dtype, beside))
    return exchanges


def kind(call: Call) -> str | None:
    """Return which of KINDS an instruction is, or None if it exchanges nothing."""
    # Between slices, a collective is written as a transfer to the hosts.
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', call.op.rest)
    if call.op.opcode == "send" and between:
        return between[1].lower().replace("_", "-")
    kind = call.op.opcode.removesuffix("-start")
    # On TPU a reduce-scatter is a fusion of an all-reduce and the slice that is kept.
    if kind == "all-reduce" and call.computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in KINDS else None


def _whole_arrays(program: Program, call: Call, kind: str) -> list[Array]:
    """Return the whole arrays of a collective: what a gather returns, what a reduction takes."""
    op, computation = call.op, program.computations[call.computation]
    if op.opcode == "send":
        return op.arrays()[:1]  # before a context and a token
    if op.opcode in PAIRS:
        return op.arrays()[len(op.operands) : 2 * len(op.operands)]  # after the operands
    if kind != "reduce-scatter":
        return op.arrays()
    # Inside a fusion the operand may be padded: what the fusion takes is not.
    fused = op.opcode.startswith("all-reduce")
    inputs = computation.parameters().values() if fused else computation.operands(op)
    return [array for op in inputs for array in op.arrays()]


def _members(op: Op, kind: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes over which devices exchange, and how many of them do together."""
    if op.opcode == "send":
        slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', op.rest)
        return ("slices",), len(slices[1].split(",")) if slices else 2
    group_member = groups(op.rest, math.prod(mesh.values()))
    if kind == "collective-permute":
        moving = group_member[np.argmax(group_member[:, 0] != group_member[:, 1])]
        axes = axes_of(moving, mesh)
        return axes, math.prod(mesh[axis] for axis in axes)
    return axes_of(group_member[0], mesh), group_member.shape[1]


def groups(rest: str, devices: int) -> np.ndarray:
    """Return which of `devices` devices exchange with each other, as [group, member]."""
    if pairs := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[^=]*?\})\}", rest):
        listed = re.findall(r"\{([\d,]+)\}", pairs[1])
        return np.array([[int(device) for device in group.split(",")] for group in listed])
    if named := re.search(r"replica_groups=@?mesh\S*?\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
        ids = _iota(named[2], devices).reshape(*sizes.values())
        inner = [i for i, name in enumerate(sizes) if name in re.findall(r"\w+", named[3])]
        members = math.prod(ids.shape[i] for i in inner)
        return np.moveaxis(ids, inner, range(-len(inner), 0)).reshape(-1, members)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+)", rest):
        return _iota(iota[2], devices).reshape([int(size) for size in iota[1].split(",")])
    return np.arange(devices)[None]


def _iota(text: str, devices: int) -> np.ndarray:
    """Return the devices in the order of `[32,4]T(1,0)`: counted in that shape, then transposed."""
    if (order := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)) is None:
        return np.arange(devices)
    dims = [int(size) for size in order[1].split(",")]
    axes = [int(axis) for axis in order[2].split(",")] if order[2] else None
    return np.arange(devices).reshape(dims).transpose(axes)


def axes_of(members: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which devices differ; `members` are row-major positions."""
    positions = np.unravel_index(members, tuple(mesh.values()))
    return tuple(axis for axis, at in zip(mesh, positions, strict=True) if len(np.unique(at)) > 1)


def by_axes(exchanges: Iterable[Collective]) -> list[dict[str, Any]]:
    """Return the bytes of a step by kind of collective, mesh axes and type, the largest first."""
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for exchange in exchanges:
        key = (exchange.kind, "+".join(exchange.axes), exchange.dtype)
        names = dict(zip(("kind", "axes", "dtype"), key, strict=True))
        row = table.setdefault(key, names | {"bytes": 0, "sent": 0})
        row["bytes"] += exchange.payload
        row["sent"] += round(exchange.sent)
    return sorted(table.values(), key=lambda row: -row["bytes"])


def memory_bytes(program: Program) -> int:
    """Return the bytes that one run reads from and writes to main memory.

    Where an instruction reads or replaces only a slice of an array, the slice counts.
    """
    calls = executed(program, into_fusions=False)
    return sum(call.times * moved(program, call) for call in calls)


def moved(program: Program, call: Call) -> int:
    """Return the bytes that one instruction reads from and writes to main memory, run once."""
    op, computation = call.op, program.computations[call.computation]
    if FREE.match(op.opcode) or 'custom_call_target="AllocateBuffer"' in op.rest:
        return 0
    given = [operand.main_memory() for operand in computation.operands(op)]
    if op.opcode.removesuffix("-start") in SLICES:
        # A slice that is only started returns the operand, the slice, and a context.
        part = op.arrays()[-2 if op.opcode.endswith("-start") else 0]
        return part.bytes * (bool(given[0]) + (part.space == 0))
    if op.opcode in PAIRS:
        return op.main_memory()
    if op.opcode == "dynamic-update-slice":
        return 2 * given[1]
    if op.opcode == "fusion" and (called := program.called(op)):
        return _moved_by_fusion(program, program.computations[called[0]], op, given)
    return op.main_memory() + sum(given)


def _moved_by_fusion(program: Program, inner: Computation, op: Op, given: list[int]) -> int:
    """Return the bytes that a fusion reads of its operands (`given` bytes each), and writes."""
    # Some outputs are an operand's own memory, such as the buffers of a running collective.
    shared = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.rest)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", shared[1]) if shared else []
    outputs = {int(output or 0) for output, _ in pairs}
    operands = {int(operand) for _, operand in pairs}
    moved = sum(
        _read(program, inner, number, whole)
        for number, whole in enumerate(given)
        if number not in operands
    )
    root = inner.ops[inner.root]
    results = inner.operands(root) if root.opcode == "tuple" else [root]
    for number, (array, result) in enumerate(zip(op.arrays(), results, strict=False)):
        while result.opcode == "bitcast":
            result = inner.ops[result.operands[0]]
        if number not in outputs and array.space == 0:
            update = result.opcode == "dynamic-update-slice"
            written = inner.ops[result.operands[1]].arrays() if update else [array]
            moved += sum(part.bytes for part in written)
    return moved


def _read(program: Program, inner: Computation, number: int, whole: int) -> int:
    """Return how many of an operand's `whole` bytes a fusion reads, fusions in it included."""
    parameter = inner.parameters().get(number)
    if parameter is None or not whole:
        return 0
    read = 0
    for user in inner.users(parameter.name):
        called = program.called(user)
        positions = [i for i, name in enumerate(user.operands) if name == parameter.name]
        if user.opcode in SLICES:
            read += sum(array.bytes for array in user.arrays())
        elif user.opcode == "fusion" and positions and called:
            nested = program.computations[called[0]]
            read += sum(_read(program, nested, position, whole) for position in positions)
        elif user.opcode != "dynamic-update-slice":
            return whole
    return min(read, whole)
