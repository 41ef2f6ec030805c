"""Make the runs of a study with `mae-jax train`, one on each core, and tables of them.

A run that is finished has a file NAME.done. Ctrl-C or SIGTERM stops the study: its runs save where
they are, and the same command goes on from there.
"""

import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SEEDS = (0, 1, 2)


class Run(NamedTuple):
    """A run of a study."""

    name: str
    config: str  # --config, without init and seed
    seed: int = 0
    init: str = ""  # name of the run that it starts from
    overrides: tuple[str, ...] = ()  # more flags


class Stopped(Exception):
    """The study was asked to stop, or a run failed; the message is for the user."""


def execute(run: Run, root: Path, core: int, running: dict[str, subprocess.Popen]) -> None:
    """Make a run on one core, unless it was made before.

    Raises:
      Stopped: the run failed, or was interrupted; the message has the end of its log.
    """
    done, log = root / f"{run.name}.done", root / f"{run.name}.log"
    if done.exists():
        return
    init = f",init={root / run.init}" if run.init else ""
    config = f"--config={run.config},seed={run.seed}{init}"
    workdir = f"--workdir={root / run.name}"
    command = [sys.executable, "-m", "mae_jax", "train", config, workdir, *run.overrides]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # saves time in page faults
    }
    with open(log, "a") as out:
        process = running[run.name] = subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through `stop`, once
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        status = process.wait()
    del running[run.name]
    if status != 0:
        raise Stopped(
            f"{run.name} ended with {status}:\n{log.read_text()[-2000:]}\nAll of it: {log}"
        )
    done.touch()


def execute_all(study: list[Run], root: Path) -> None:
    """Make all runs, as many at a time as there are cores.

    Args:
      study: the runs, each after the one that it starts from.
      root: the folder of their workdirs.

    Raises:
      Stopped: see `execute`; the other runs have saved and ended.
    """
    began = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    missing = [run for run in study if not (root / f"{run.name}.done").exists()]
    print(f"{len(study)} runs, {len(study) - len(missing)} of them done before", flush=True)
    cores: queue.Queue[int] = queue.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    futures: dict[str, Future] = {}
    running: dict[str, subprocess.Popen] = {}

    def work(run: Run) -> None:
        if run.init in futures:  # submitted earlier, and so finished or running
            futures[run.init].result()
        core = cores.get()
        try:
            execute(run, root, core, running)
        finally:
            cores.put(core)

    def stop(*_: object) -> None:
        raise Stopped("stopped: every run has saved, and the same command goes on")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor(cores.qsize()) as pool:
        for run in missing:
            futures[run.name] = pool.submit(work, run)
        try:
            for number, run in enumerate(missing, 1):
                futures[run.name].result()
                minutes = (time.monotonic() - began) / 60
                print(f"{number}/{len(missing)}  {run.name}  after {minutes:.0f} min", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running.values()):
                process.terminate()
            raise


def last_value(root: Path, name: str, key: str) -> float:
    """Return the last value of a metric of a run."""
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [metrics[key] for metrics in map(json.loads, lines) if key in metrics][-1]


def values(root: Path, name: str, key: str) -> list[float]:
    """Return the last value of a metric in the runs NAME and NAME-SEED that are finished."""
    names = [name, *(f"{name}-{seed}" for seed in SEEDS)]
    return [last_value(root, x, key) for x in names if (root / f"{x}.done").exists()]


def over_seeds(root: Path, name: str, key: str) -> tuple[float, float]:
    """Return mean and sample standard deviation of a metric over the seeds."""
    found = values(root, name, key)
    return statistics.mean(found), statistics.stdev(found)


def table(head: list[str], rows: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Return the lines of a Markdown table; a cell is a mean and a standard deviation."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in cells) + " |")
    return [*lines, ""]


def write(lines: list[str], root: Path, draw: Callable[[Path], None]) -> None:
    """Write the tables to study.md, draw study.png, and print the first."""
    (root / "study.md").write_text("\n".join(lines) + "\n")
    draw(root)
    print("\n".join(lines))
    print(f"table  {root / 'study.md'}\nfigure {root / 'study.png'}")


def run(study: list[Run], root: Path) -> int:
    """Make all runs; return the exit status of the command."""
    try:
        execute_all(study, root)
    except Stopped as error:
        print(error, file=sys.stderr)
        return 1
    return 0
