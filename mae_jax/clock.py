"""Add up the TPU compiler's own estimate of cycles over a program, and list what has none.

The compiler writes `estimated_cycles` beside nearly every fusion and convolution. Collectives,
copies, custom calls and gathers have none: they are counted in bytes.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mae_jax import traffic
from mae_jax.flops import Chip
from mae_jax.hlo import Call, Op, Program, executed

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def cycles(program: Program) -> int:
    """Return the estimated cycles of one run, with loops as often as they run."""
    found = ((call, CYCLES.search(call.op.rest)) for call in executed(program, into_fusions=False))
    return sum(call.times * int(match[1]) for call, match in found if match)


def unrated(program: Program) -> list[dict[str, Any]]:
    """Return what has no estimate and moves data of the main memory, collectives apart.

    A row says how often its kind runs, how many bytes that moves, and whether the transfers run
    beside other work. The largest comes first.
    """
    times: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for call in executed(program, into_fusions=False):
        if CYCLES.search(call.op.rest) or _exchanges(program, call):
            continue
        if size := traffic.moved(program, call):
            name = _kind(call.op)
            times[name] += call.times
            moved[name] += call.times * size
    return [
        {"kind": kind, "times": times[kind], "bytes": size, "beside": kind.endswith("-start")}
        for kind, size in moved.most_common()
    ]


def _kind(op: Op) -> str:
    """Return what to call an instruction: the target of a custom call, the work of a fusion."""
    if target := re.search(r'custom_call_target="([^"]+)"', op.rest):
        return target[1]
    return re.sub(r"[.\d]+$", "", op.name) if op.opcode == "fusion" else op.opcode


def _exchanges(program: Program, call: Call) -> bool:
    """Return whether an instruction is a collective, or a fusion around one."""
    if traffic.kind(call) is not None:
        return True
    inner = (program.computations[name] for name in program.called(call.op))
    return any(
        _exchanges(program, Call(op, "", "", 1)) for part in inner for op in part.ops.values()
    )


def waiting(exchanges: Iterable[traffic.Collective], chip: Chip) -> dict[str, float]:
    """Return the seconds of collectives at the links' peak: beside other work, and alone.

    Those between slices, which take another network, do not count.
    """
    seconds = {"beside": 0.0, "alone": 0.0}
    for exchange in exchanges:
        if chip.link_rate and "slices" not in exchange.axes:
            kind = "beside" if exchange.beside else "alone"
            seconds[kind] += exchange.sent / (chip.link_rate * 1e9)
    return seconds
