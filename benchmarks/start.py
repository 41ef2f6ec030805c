"""How long one waits: for a command's help, for the first step, for a save and a restore.

    bash benchmarks/run.sh start [--variant=B/16] [--batch=16] [--rounds=3]

The first step of `mae-jax train` with an empty and with a filled compilation cache, from the start
of the process until its metrics are on disk; a save, which is written in the background, and how
much longer the step after it takes: it must not overwrite what is still being written; and the
first save of a process whose devices (simulated) all hold the whole state.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import ours, sides

COMMANDS = ("", "train", "plan", "prepare", "convert", "visualize", "embed")


def helped(command: str) -> dict:
    began = time.perf_counter()
    words = [sys.executable, "-m", "mae_jax", *filter(None, [command]), "--help"]
    subprocess.run(words, check=True, capture_output=True)
    return {"seconds": time.perf_counter() - began}


def first_step(args: argparse.Namespace, folder: Path) -> dict:
    """Until metrics.jsonl has its first line; the process is then ended."""
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
                words = process.stderr.read().decode().strip().splitlines() or ["no output"]
                return {"error": words[-1][:200]}
            time.sleep(0.05)
        return {"seconds": time.perf_counter() - began}
    finally:
        process.kill()
        process.wait()


def saved(args: argparse.Namespace) -> dict:
    """Saves and restores of a whole training state, the steps after them, and other steps."""
    import jax
    import numpy as np

    from mae_jax import checkpoint, sharding, train
    from mae_jax.tasks import pretrain

    ours.simulate(args.replicas)
    config = ours.make_config(args)
    mesh = sharding.make_mesh(**config.mesh)
    task = pretrain.make_task(config, sharding.constrain_batch(mesh))
    tx, _ = task.optimizer(1000, 100)
    program = train.compile_step(task, tx, config, mesh)
    state = jax.block_until_ready(program.init())
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    found: dict = {"blocking": [], "after": [], "written": [], "restored": [], "bytes": size}
    images = np.zeros((args.batch, args.image_size, args.image_size, 3), np.uint8)
    batch = sharding.put_batch(mesh, {"image": images}, args.batch)

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state = jax.block_until_ready(program.step(state, batch))[0]
        return time.perf_counter() - began

    step()
    found["seconds"] = [step() for _ in range(args.steps)]
    with tempfile.TemporaryDirectory(dir=sides.OUT) as folder:
        checkpointer = checkpoint.Checkpointer(folder, keep=1)
        for number in range(1, 4):
            began = time.perf_counter()
            checkpointer.save(number, state)
            found["blocking"].append(time.perf_counter() - began)
            found["after"].append(step())
        for number in range(4, 7):
            began = time.perf_counter()
            checkpointer.save(number, state)
            checkpointer.wait()
            found["written"].append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(program.state_shapes))
            found["restored"].append(time.perf_counter() - began)
        checkpointer.close()
    found["first"], found["later"] = found["blocking"][:1], found["blocking"][1:]
    return found | {"versions": sides.versions("jax", "flax", "optax")}


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
    given = [f"--variant={args.variant}", f"--batch={args.batch}", f"--dtype={args.dtype}"]
    save = sides.run([sys.executable, __file__, "--save", *given])
    alike = sides.run([sys.executable, __file__, "--save", "--replicas=4", *given])
    medians = {name: sides.median(found) for name, found in results.items()}
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
