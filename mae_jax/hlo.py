"""Read the text of a compiled program: its instructions, and how often each of them runs.

The text is XLA's HLO after all passes, for one device of an SPMD program, on CPU, GPU or TPU.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
# NAME = SHAPE OPCODE(OPERANDS), ATTRIBUTES. A shape may contain parentheses, but none after a word.
INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, ([\w\-]+=.*))?$"
)
CALLED = re.compile(
    r"\b(?:calls|body|to_apply|called_computation|true_computation|false_computation"
    r"|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Array(NamedTuple):
    """The size of one array, and where it lies: `space` 0 is the device's main memory."""

    bytes: int
    space: int


class Op(NamedTuple):
    """One instruction."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; of a parameter its number, of a constant its value

    def arrays(self) -> list[Array]:
        """Return the arrays of the result; a tuple is flattened."""
        return [
            Array(_bytes(dtype, dims), int((re.search(r"S\((\d+)\)", layout) or [0, 0])[1]))
            for dtype, dims, layout in re.findall(
                r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", self.shape
            )
            if dtype != "token"
        ]

    def main_memory(self) -> int:
        """Return the bytes of the result that lie in the device's main memory."""
        return sum(array.bytes for array in self.arrays() if array.space == 0)


def _bytes(dtype: str, dims: str) -> int:
    """Return the bytes of an array such as `bf16` `8,16`."""
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8 * (dtype == "pred")
    return math.ceil(math.prod(int(dim) for dim in dims.split(",") if dim) * bits / 8)


class Computation(NamedTuple):
    """A function of a program: its instructions by name, and the name of the one it returns."""

    ops: dict[str, Op]
    root: str

    def parameters(self) -> dict[int, Op]:
        """Return the parameters by their number."""
        return {int(op.rest): op for op in self.ops.values() if op.opcode == "parameter"}

    def operands(self, op: Op) -> list[Op]:
        """Return the instructions whose results `op` takes."""
        return [self.ops[name] for name in op.operands if name in self.ops]

    def users(self, name: str) -> list[Op]:
        """Return the instructions that read a result, also through bitcasts."""
        users = [op for op in self.ops.values() if name in op.operands]
        return [
            reader
            for op in users
            for reader in (self.users(op.name) if op.opcode == "bitcast" else [op])
        ]


class Program(NamedTuple):
    """A compiled program: its computations by name, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str

    def called(self, op: Op) -> list[str]:
        """Return the names of the computations that an instruction calls."""
        names = re.findall(r"[\w.\-]+", " ".join(CALLED.findall(op.rest)))
        return [name for name in names if name in self.computations]


def parse(text: str) -> Program:
    """Return the program that a text describes."""
    computations: dict[str, Computation] = {}
    ops: dict[str, Op] = {}
    entry = root = name = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name, ops, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif line == "}":
            computations[name] = Computation(ops, root)
        elif found := INSTRUCTION.match(line):
            is_root, result, shape, opcode, inside, attributes = found.groups(default="")
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            rest = inside if opcode in ("parameter", "constant") else attributes
            ops[result] = Op(result, shape, opcode, operands, rest)
            root = result if is_root else root
    return Program(computations, entry)


def trips(program: Program, loop: Op) -> int | None:
    """Return how often the body of a while loop runs, or None if its text does not say."""
    if count := re.search(r'known_trip_count\\?"?:\{\\?"?n\\?"?:\\?"?(\d+)', loop.rest):
        return int(count[1])
    names = [re.search(rf"\b{part}=%?([\w.\-]+)", loop.rest) for part in ("condition", "body")]
    condition, body = (program.computations[name[1]] for name in names if name)
    compare = condition.ops[condition.root]
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return None
    counter, limit = condition.operands(compare)
    index = re.search(r"index=(\d+)", counter.rest)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element" or not index:
        return None

    # The counter of the next round is the counter of this one plus constants.
    step, op = 0, body.ops[body.ops[body.root].operands[int(index[1])]]
    while op.opcode in ("add", "copy", "bitcast"):
        terms = body.operands(op)
        step += sum(int(term.rest) for term in terms if term.opcode == "constant")
        op = next((term for term in terms if term.opcode != "constant"), op)
    return math.ceil(int(limit.rest) / step) if step else None


class Call(NamedTuple):
    """An instruction as it is executed."""

    op: Op
    computation: str  # the one that contains the instruction
    around: str  # the loop body, branch or entry that runs it; fusions do not count
    times: int


def executed(program: Program, *, into_fusions: bool) -> Iterator[Call]:
    """Yield every instruction with how often it runs; a loop of unknown length counts once."""
    inlined = ("call", "async-start", *(["fusion"] if into_fusions else []))

    def walk(name: str, around: str, times: int) -> Iterator[Call]:
        for op in program.computations[name].ops.values():
            yield Call(op, name, around, times)
            for called in program.called(op):
                if op.opcode == "while":
                    yield from walk(called, called, times * (trips(program, op) or 1))
                elif op.opcode == "conditional":
                    yield from walk(called, called, times)
                elif op.opcode in inlined:
                    yield from walk(called, around, times)

    return walk(program.entry, program.entry, 1)
