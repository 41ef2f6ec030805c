"""How long does one wait for a command's help, for the first step, for a save and a restore?

    bash benchmarks/run.sh start [--variant=B/16] [--batch=16] [--rounds=3]

The first step of `mae-jax train` is timed with an empty and with a filled compilation cache, from
the start of the process until its metrics are on disk. A save is written in the background: timed
are the save, and the step after it, which must not overwrite what is still being written. Last
comes the first save of a process whose (simulated) devices all hold the whole state.
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


def helped(command: str) -> dict:
    """Time the help of a command."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "mae_jax", *filter(None, [command]), "--help"]
    subprocess.run(words, check=True, capture_output=True)
    return {"seconds": time.perf_counter() - began}


def first_step(args: argparse.Namespace, folder: Path) -> dict:
    """Time a run until metrics.jsonl has its first line, then end it."""
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
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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


def saved(args: argparse.Namespace) -> dict:
    """Time saves and restores of a whole training state, the steps after them, and other steps."""
    import jax

    from mae_jax import checkpoint

    _, shapes, state, step_fn, batch = ours.build(args, args.replicas)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    times: dict = {"blocking": [], "after": [], "written": [], "restored": []}

    def timed(function: Callable, *arguments: Any) -> float:
        began = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - began

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
    for _ in range(args.rounds):
        for command in COMMANDS:
            results.setdefault(f"mae-jax {command} --help".replace("  ", " "), []).append(
                helped(command)
            )
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            shutil.rmtree(Path(folder) / "compilation_cache", ignore_errors=True)
            results.setdefault("first step, empty cache", []).append(first_step(args, Path(folder)))
            results.setdefault("first step, cached", []).append(first_step(args, Path(folder)))
    options = [f"--variant={args.variant}", f"--batch={args.batch}", f"--dtype={args.dtype}"]
    save = sides.run(sides.script("start", "--save", *options))
    alike = sides.run(sides.script("start", "--save", "--replicas=4", *options))
    medians = {name: sides.median(rounds) for name, rounds in results.items()}
    rows = [
        [name, f"{seconds:.2f} s" if seconds else sides.errors(results[name]), ""]
        for name, seconds in medians.items()
    ]
    for name, side, key, fast in (
        ("save: until it returns", save, "blocking", False),
        ("the step after a save", save, "after", False),
        ("a step, to compare", save, "seconds", False),
        ("save: written and committed", save, "written", True),
        ("restore, with its digests checked", save, "restored", True),
        ("first save of 4 devices alike: until it returns", alike, "first", False),
        ("a later one", alike, "later", False),
    ):
        medians[name] = seconds = sides.median([side], key)
        speed = f"{side['bytes'] / seconds / 1e9:.2f} GB/s" if fast and seconds else ""
        rows.append([name, f"{seconds:.2f} s" if seconds else side["error"], speed])
    results |= {"save": [save], "4 devices alike": [alike]}
    title = f"{args.variant}, batch {args.batch}, {args.dtype}, {os.cpu_count()} cores;"
    title += f" state {save.get('bytes', 0) / 1e9:.2f} GB; {sides.all_versions(results)}"
    head = ["what", "median", "speed"]
    sides.report("start", f"{title}\n\n{sides.markdown(head, rows)}", {"results": results})
    helps = {name: value for name, value in medians.items() if name.endswith("--help")}
    others = {name: value for name, value in medians.items() if name not in helps}
    sides.bars("start", {"to a step, to disk and back, s": others, "to the help text, s": helps})


if __name__ == "__main__":
    main()
