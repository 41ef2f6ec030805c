"""Reads the text of a compiled program: what runs how often, its collectives, its memory traffic.

The text is XLA's HLO after all passes, of one device of an SPMD program, for CPU, GPU and TPU.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CALLS = re.compile(r"\b(?:calls|body|to_apply|called_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(
    r"\b(?:branch_computations=\{|(?:true|false)_computation=)([^},]+(?:,[^}]+)?)"
)
# What moves no data, or is counted where it ends.
FREE = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|iota|"
    r"partition-id|replica-id|opt-barrier|send|recv|.*-done|async-.*)$"
)
SLICES = ("slice", "dynamic-slice", "gather")  # what reads as much as it gives
# What gives back, beside its result, what it reads.
PAIRS = ("copy-start", "all-gather-start", "collective-permute-start")


class Array(NamedTuple):
    """One array of a shape; `space` is 0 for the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.size * (int(bits[0]) if bits else 8 * (self.dtype == "pred")) / 8)


class Op(NamedTuple):
    """One instruction."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; the number of a parameter, the value of a constant

    def arrays(self) -> list[Array]:
        """What it gives, a tuple flattened."""
        found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", self.shape)
        return [
            Array(
                dtype,
                tuple(int(dim) for dim in dims.split(",") if dim),
                int((re.search(r"S\((\d+)\)", layout) or [0, 0])[1]),
            )
            for dtype, dims, layout in found
            if dtype != "token"
        ]


class Computation(NamedTuple):
    ops: dict[str, Op]
    root: str

    def parameter(self, number: int) -> Op | None:
        wanted = (op for op in self.ops.values() if op.opcode == "parameter")
        return next((op for op in wanted if op.rest.startswith(f"{number})")), None)

    def users(self, name: str) -> list[Op]:
        """The ops that read this one, bitcasts looked through."""
        users = [op for op in self.ops.values() if name in op.operands]
        return [
            deep
            for op in users
            for deep in (self.users(op.name) if op.opcode == "bitcast" else [op])
        ]


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def _closing(text: str, start: int) -> int:
    """Where the parenthesis opened at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def parse(text: str) -> Program:
    """The computations of a program and the name of the one that is run."""
    computations: dict[str, Computation] = {}
    ops: dict[str, Op] = {}
    entry = root = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, ops, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif line == "}":
            computations[name] = Computation(ops, root)
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            start = found.end()
            end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
            opened = line.find("(", end)
            closed = _closing(line, opened)
            inside, opcode = line[opened + 1 : closed], line[end:opened].strip()
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            rest = line[opened + 1 :] if opcode in ("parameter", "constant") else line[closed + 1 :]
            ops[found[2]] = Op(found[2], line[start:end], opcode, operands, rest)
            root = found[2] if found[1] else root
    return Program(computations, entry)


def trips(program: Program, loop: Op) -> int | None:
    """How often the body of a while loop runs, or None if its text does not tell."""
    if known := re.search(r'known_trip_count\\?"?:\{\\?"?n\\?"?:\\?"?(\d+)', loop.rest):
        return int(known[1])
    names = [re.search(rf"\b{part}=%?([\w.\-]+)", loop.rest) for part in ("condition", "body")]
    condition, body = (program.computations[found[1]] for found in names if found)
    compare = condition.ops[condition.root]
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return None
    counter, limit = (condition.ops[name] for name in compare.operands)
    index = re.search(r"index=(\d+)", counter.rest)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element" or not index:
        return None

    # The counter of the next round: the old one, plus constants.
    step, op = 0, body.ops[body.ops[body.root].operands[int(index[1])]]
    while op.opcode in ("add", "copy", "bitcast"):
        terms = [body.ops[name] for name in op.operands]
        step += sum(int(term.rest.split(")")[0]) for term in terms if term.opcode == "constant")
        op = next((term for term in terms if term.opcode != "constant"), op)
    return math.ceil(int(limit.rest.split(")")[0]) / step) if step else None


class Call(NamedTuple):
    """An op as it is executed."""

    op: Op
    computation: str  # the one that it stands in
    around: str  # the loop body, branch or entry that runs it, fusions looked through
    times: int


def executed(program: Program, *, into_fusions: bool) -> Iterator[Call]:
    """Every op of the program with how often it is run; a loop of unknown length counts once."""

    inside = ("fusion",) if into_fusions else ()

    def walk(name: str, around: str, times: int) -> Iterator[Call]:
        for op in program.computations[name].ops.values():
            yield Call(op, name, around, times)
            called = [found for found in CALLS.findall(op.rest) if found in program.computations]
            if op.opcode == "while":
                for body in called:
                    yield from walk(body, body, times * (trips(program, op) or 1))
            elif op.opcode == "conditional":
                for found in BRANCHES.findall(op.rest):
                    for branch in re.findall(r"[\w.\-]+", found):
                        yield from walk(branch, branch, times)
            elif op.opcode in (*inside, "call", "async-start"):
                for body in called:
                    yield from walk(body, around, times)

    return walk(program.entry, program.entry, 1)


class Collective(NamedTuple):
    """What devices exchange, together."""

    kind: str  # of KINDS
    arrays: tuple[Array, ...]  # whole: what a gather gives, what a reduction takes
    axes: tuple[str, ...]  # of the mesh; ("slices",) over the network between slices
    members: int  # devices that exchange with each other
    times: int  # in a step
    computed: bool  # whether a matrix product went into it
    op: str  # where in the model

    @property
    def payload(self) -> int:
        """Bytes in one step."""
        return self.times * sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one step, when members stand in a ring."""
        part = (self.members - 1) / self.members
        factor = {"all-reduce": 2 * part, "collective-permute": 1.0}.get(self.kind, part)
        return factor * self.payload


def groups(rest: str) -> np.ndarray | None:
    """Which devices exchange with each other: [group, member]; None if all do."""
    if pairs := re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", rest):
        return np.array([[int(x) for x in p.split(",")] for p in re.findall(r"[\d,]+\d", pairs[1])])
    if named := re.search(r"replica_groups=@?mesh\S*?\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        sizes = [(name, int(size)) for name, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])]
        ids = _iota(named[2])
        ids = np.arange(math.prod(size for _, size in sizes)) if ids is None else ids
        ids = ids.reshape([size for _, size in sizes])
        chosen = re.findall(r"\w+", named[3])
        inner = [i for i, (name, _) in enumerate(sizes) if name in chosen]
        ids = np.moveaxis(ids, inner, range(-len(inner), 0))
        return ids.reshape(-1, math.prod(sizes[i][1] for i in inner))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+)", rest):
        ids = _iota(iota[2])
        return None if ids is None else ids.reshape([int(x) for x in iota[1].split(",")])
    if listed := re.search(r"replica_groups=\{(\{[^=]*?\})\}", rest):
        return np.array(
            [[int(x) for x in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        )
    return None


def _iota(text: str) -> np.ndarray | None:
    """Devices in the order that `[32,4]T(1,0)` names: counted in that shape, then transposed."""
    if (found := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)) is None:
        return None
    dims = [int(x) for x in found[1].split(",")]
    order = [int(x) for x in found[2].split(",")] if found[2] else range(len(dims))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order)


def axes_of(members: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which devices (their places in it, row-major) differ."""
    places = np.unravel_index(members, tuple(mesh.values()))
    return tuple(axis for axis, at in zip(mesh, places, strict=True) if len(np.unique(at)) > 1)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """What the program's devices exchange in one run.

    A collective that is spread over several fusions, to run beside other work, counts once. One
    between slices stands in the text as a transfer to the hosts.
    """
    found, seen = [], set()
    for op, computation, around, times in executed(program, into_fusions=True):
        kind = op.opcode.removesuffix("-start")
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)
        if op.opcode == "send" and between:
            kind = between[1].lower().replace("_", "-")
        elif kind not in KINDS:
            continue
        # What is spread over fusions has one channel; in a row, copies share theirs.
        channel = computation != around and re.search(r"channel_id=(\d+)", op.rest)
        key = (around, channel[1] if channel else op.name)
        if key in seen:
            continue
        seen.add(key)

        of = program.computations[computation]
        arrays = op.arrays()
        if op.opcode == "send":
            arrays = arrays[:1]  # data, context, token
        elif op.opcode in PAIRS:
            arrays = arrays[len(op.operands) : 2 * len(op.operands)]  # operands, results, handles
        elif kind == "reduce-scatter":
            arrays = [array for name in op.operands for array in of.ops[name].arrays()]
        # On TPU a reduce-scatter is a fusion of an all-reduce and the slice that is kept.
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # of what the fusion was given; inside, it may be padded
            given = [op for op in of.ops.values() if op.opcode == "parameter"]
            arrays = [array for op in given for array in op.arrays()]

        if op.opcode == "send":
            slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', op.rest)
            axes: tuple[str, ...] = ("slices",)
            members = len(slices[1].split(",")) if slices else 2
        else:
            who = groups(op.rest)
            who = np.arange(math.prod(mesh.values()))[None] if who is None else who
            axes, members = axes_of(who[0], mesh), who.shape[1]
            if kind == "collective-permute":
                axes = axes_of(who[np.argmax(who[:, 0] != who[:, 1])], mesh)
                members = math.prod(mesh[axis] for axis in axes)
        if members == 1 or not axes:
            continue
        name = re.search(r'op_name="([^"]*)"', op.rest)
        computed = any(_computed(program, computation, operand) for operand in op.operands)
        found.append(
            Collective(
                kind, tuple(arrays), axes, members, times, computed, name[1] if name else op.name
            )
        )
    return found


def _computed(program: Program, computation: str, name: str) -> bool:
    """Whether a matrix product stands between the program's inputs and this op.

    Follows loops around, but not into the one who called: what a fusion was given is no product.
    """
    todo: list[tuple[str, str, int | None]] = [(computation, name, None)]
    seen: set[tuple[str, str, int | None]] = set()
    while todo:
        inside, at, index = todo.pop()
        if (inside, at, index) in seen:
            continue
        seen.add((inside, at, index))
        of = program.computations[inside]
        op = of.ops[at]
        if op.opcode in ("dot", "convolution"):
            return True
        if op.opcode == "get-tuple-element":
            number = re.search(r"index=(\d+)", op.rest)
            todo.append((inside, op.operands[0], int(number[1]) if number else None))
        elif op.opcode == "tuple" and index is not None:
            todo.append((inside, op.operands[index], None))
        elif op.opcode == "while" and index is not None:
            todo.append((inside, op.operands[0], index))
            for body in CALLS.findall(op.rest):
                todo.append((body, program.computations[body].root, index))
        elif op.opcode == "parameter" and index is not None:
            # The loop hands its result to its next round.
            if program.computations[inside].ops[of.root].opcode == "tuple":
                todo.append((inside, of.root, index))
        elif op.opcode in ("fusion", "call"):
            for body in CALLS.findall(op.rest):
                if body in program.computations:
                    todo.append((body, program.computations[body].root, index))
            todo += [(inside, operand, None) for operand in op.operands]
        else:
            todo += [(inside, operand, None) for operand in op.operands]
    return False


def traffic(program: Program) -> int:
    """Bytes that the ops of one run read from and write to main memory.

    Of an array of which an op reads or replaces a slice only, the slice counts.
    """
    total = 0
    for op, computation, _, times in executed(program, into_fusions=False):
        if not FREE.match(op.opcode):
            total += times * _moved(program, program.computations[computation], op)
    return total


def _main(op: Op | None) -> int:
    return sum(array.bytes for array in op.arrays() if array.space == 0) if op else 0


def _moved(program: Program, of: Computation, op: Op) -> int:
    called = [name for name in CALLS.findall(op.rest) if name in program.computations]
    if op.opcode.removesuffix("-start") in SLICES:
        # One that is started gives what it slices, the slice, and a context.
        part = op.arrays()[-2 if op.opcode.endswith("-start") else 0]
        return part.bytes * (bool(_main(of.ops.get(op.operands[0]))) + (part.space == 0))
    if op.opcode in PAIRS:
        return _main(op)
    if op.opcode == "dynamic-update-slice":
        return 2 * _main(of.ops.get(op.operands[1]))
    if op.opcode != "fusion" or not called:
        return _main(op) + sum(_main(of.ops.get(name)) for name in op.operands)

    inner = program.computations[called[0]]
    # Outputs that are an operand's own memory, such as the buffers of a running collective.
    shared = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.rest)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", shared[1]) if shared else []
    kept = {int(operand) for _, operand in pairs}
    outputs = {int(output or 0) for output, _ in pairs}
    total = 0
    for number, name in enumerate(op.operands):
        whole = _main(of.ops.get(name))
        if whole and number not in kept:
            total += _read(program, inner, number, whole)
    root = inner.ops[inner.root]
    results = [inner.ops[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for number, (array, result) in enumerate(zip(op.arrays(), results, strict=False)):
        while result.opcode == "bitcast":
            result = inner.ops[result.operands[0]]
        if number not in outputs and array.space == 0:
            update = result.opcode == "dynamic-update-slice"
            replaced = inner.ops[result.operands[1]] if update else None
            total += sum(x.bytes for x in replaced.arrays()) if replaced else array.bytes
    return total


def _read(program: Program, inner: Computation, number: int, whole: int) -> int:
    """Bytes that a fusion reads of its operand, which has `whole`; also in fusions inside it."""
    parameter = inner.parameter(number)
    if parameter is None:
        return 0
    read = 0
    for user in inner.users(parameter.name):
        called = CALLS.findall(user.rest)
        places = [place for place, name in enumerate(user.operands) if name == parameter.name]
        if user.opcode in SLICES:
            read += sum(array.bytes for array in user.arrays())
        elif user.opcode == "fusion" and places and called[0] in program.computations:
            nested = program.computations[called[0]]
            read += sum(_read(program, nested, place, whole) for place in places)
        elif user.opcode != "dynamic-update-slice":
            return whole
    return min(read, whole)
