"""Write a trace of some steps of a run, for TensorBoard and Perfetto."""

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mae_jax.errors import UserError


def window(text: str, start: int, total: int) -> range:
    """Return the steps of --profile=FIRST:LAST that are still to be made; none for ''.

    Args:
      start: steps that were done before.
      total: steps of the whole run.

    Raises:
      UserError: it names no steps, or steps after the end of the run.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile={text}: write FIRST:LAST, two numbers of steps, as in 10:12")
    if last > total:
        made = f"steps 1 to {total}" if total else "no step"
        raise UserError(f"--profile={text}: this run makes {made}")
    return range(max(first, start + 1), last + 1)


@contextlib.contextmanager
def traced(
    step_fn: Callable[[Any, Any], tuple],
    steps: range,
    start: int,
    workdir: str | os.PathLike,
    log: Callable[[str], None],
) -> Iterator[Callable[[Any, Any], tuple]]:
    """Yield `step_fn` with a trace of these steps, in WORKDIR/profile.

    The device finishes what it has to do before the first and after the last of them. If the run
    ends in between, the trace ends with it.

    Args:
      start: steps that were done before the first call.
    """
    numbers, begun = itertools.count(start + 1), False
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a function would be an event

    def step(state: Any, batch: Any) -> tuple:
        nonlocal begun
        number = next(numbers)
        if number == steps[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(local, create_perfetto_trace=True, profiler_options=options)
            begun = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            state, metrics = step_fn(state, batch)
        if number == steps[-1]:
            jax.block_until_ready(state)
            write(number)
        return state, metrics

    def write(last: int) -> None:
        nonlocal begun
        begun = False
        jax.profiler.stop_trace()
        folder = epath.Path(workdir) / "profile"
        for file in filter(Path.is_file, local.rglob("*")):
            copy = folder / file.relative_to(local)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        log(
            f"trace of steps {steps[0]} to {last}: tensorboard --logdir={folder} (with pip"
            " install xprof), or its perfetto_trace.json.gz in ui.perfetto.dev"
        )

    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary)
        try:
            yield step
        finally:
            if begun:
                write(next(numbers) - 1)
