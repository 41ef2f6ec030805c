"""Measure the wait for a command's help, for the first step, a small run, a save and a restore.

    bash benchmarks/run.sh start [--variant=B/16] [--batch=16] [--rounds=3]

The first step of `mae-jax train` is timed with an empty and with a filled compilation cache, from
the start of the process until its metrics are on disk. A small run makes two steps on digits and
all that a run does: an evaluation, pictures, a checkpoint, curves. A save is written in the
background: timed are the save, and the step after it, which must not overwrite what is still being
written. Last comes the first save of a process whose (simulated) devices all hold the whole state.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ours, sides

COMMANDS = ("", "train", "plan", "prepare", "convert", "visualize", "embed")


def timed(function: Callable, *arguments: Any) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def help_text(command: str) -> None:
    words = [sys.executable, "-m", "mae_jax", *command.split(), "--help"]
    subprocess.run(words, check=True, capture_output=True)


def first_step(args: argparse.Namespace, folder: Path) -> dict:
    """Time a run until metrics.jsonl has its first line, then end it; FOLDER/cache is the cache."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "mae_jax", "train", f"--workdir={workdir}"),
        f"--config=configs/pretrain.py:variant={args.variant},batch_size={args.batch}",
        *("--config.data.source=bundled:photos", "--config.data.synthetic=True"),
        *("--config.train_for=1000 steps", "--config.log_every=1 steps"),
        *("--config.optim.warmup=10 steps", f"--config.model.dtype={args.dtype}"),
        *("--config.checkpoint.every=1000 steps", "--config.checkpoint.keep_every="),
        *("--config.evals.reconstruct.every=", "--config.evals.reconstruct.split=test"),
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics = workdir / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.read_text().count("\n")):
            if process.poll() is not None:
                assert process.stderr
                lines = process.stderr.read().decode().strip().splitlines() or ["no output"]
                return {"error": lines[-1][:200]}
            time.sleep(0.05)
        return {"seconds": time.perf_counter() - began}
    finally:
        process.kill()
        process.wait()


def small_run(folder: Path) -> None:
    """Make a run of two steps on digits; FOLDER/cache is the cache."""
    command = [sys.executable, "-m", "mae_jax", "train", "--config=configs/digits.py"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    with tempfile.TemporaryDirectory() as workdir:
        command += [f"--workdir={workdir}", "--config.train_for=2 steps"]
        subprocess.run(command, env=environment, check=True, capture_output=True)


def saved(args: argparse.Namespace) -> dict:
    """Time saves and restores of a whole training state, the steps after them, and other steps."""
    import jax

    from mae_jax import checkpoint

    _, shapes, state, step_fn, batch = ours.build(args, args.replicas)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    times: dict = {"blocking": [], "after": [], "written": [], "restored": []}

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(step_fn(state, batch))[0]

    def write(number: int) -> None:
        saver.save(number, state)
        saver.wait()

    def restore() -> None:
        jax.block_until_ready(saver.restore(shapes))

    step()
    times["seconds"] = [timed(step) for _ in range(args.steps)]
    with tempfile.TemporaryDirectory(dir=sides.OUT) as folder:
        saver = checkpoint.Checkpointer(folder, keep=1)
        for number in range(1, 4):
            times["blocking"].append(timed(saver.save, number, state))
            times["after"].append(timed(step))
        for number in range(4, 7):
            times["written"].append(timed(write, number))
            times["restored"].append(timed(restore))
        saver.close()
    times["first"], times["later"] = times["blocking"][:1], times["blocking"][1:]
    return times | {"bytes": size, "versions": sides.versions("jax", "flax", "optax")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ours.options(parser)
    parser.set_defaults(steps=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--replicas", type=int, default=1, help="devices that hold a whole state")
    args = parser.parse_args()
    sides.OUT.mkdir(exist_ok=True)
    if args.save:
        print(json.dumps(saved(args)))
        return
    results: dict[str, list[dict]] = {}

    def add(name: str, result: dict) -> None:
        results.setdefault(name, []).append(result)

    for _ in range(args.rounds):
        for command in COMMANDS:
            add(
                " ".join(["mae-jax", *command.split(), "--help"]),
                {"seconds": timed(help_text, command)},
            )
    helps = {name: sides.median(rounds) for name, rounds in results.items()}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
            add("first step, empty cache", first_step(args, Path(folder)))
            add("first step, cached", first_step(args, Path(folder)))
            small_run(Path(folder))
            add("a small run, cached", {"seconds": timed(small_run, Path(folder))})
    options = [f"--variant={args.variant}", f"--batch={args.batch}", f"--dtype={args.dtype}"]
    save = sides.run(sides.script("start", "--save", *options))
    alike = sides.run(sides.script("start", "--save", "--replicas=4", *options))
    gigabytes = save.get("bytes", 0) / 1e9
    speeds = {}
    for name, side, key in (
        ("save: until it returns", save, "blocking"),
        ("the step after a save", save, "after"),
        ("a step, to compare", save, "seconds"),
        ("save: written and committed", save, "written"),
        ("restore, with its digests checked", save, "restored"),
        ("first save of 4 devices alike: until it returns", alike, "first"),
        ("a later one", alike, "later"),
    ):
        add(name, side if "error" in side else side | {"seconds": side[key]})
        if key in ("written", "restored"):
            speeds[name] = sides.ratio(gigabytes, sides.median(results[name]), "{:.2f} GB/s")
    rows = [[name, sides.cell(x), speeds.get(name, "")] for name, x in results.items()]
    title = f"{args.variant}, batch {args.batch}, {args.dtype}; state {gigabytes:.2f} GB"
    sides.report("start", title, ["what", "median", "speed"], rows, results)
    others = {name: sides.median(x) for name, x in results.items() if name not in helps}
    sides.bars("start", {"to a step, to disk and back, s": others, "to the help text, s": helps})


if __name__ == "__main__":
    main()
