"""How long one waits: for a command's help, for the first step, for a save and a restore.

    bash benchmarks/run.sh start [--variant=B/16] [--batch=16] [--rounds=3]

The first step of `mae-jax train` with an empty and with a filled compilation cache, from the start
of the process until its metrics are on disk; a save blocks training until the state is copied, and
is written in the background.
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
        *("--config.evals.reconstruct.every=1000 steps", "--config.evals.reconstruct.split=test"),
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
    """Three saves and restores of a whole training state, and the steps to compare them with."""
    import jax

    from mae_jax import checkpoint, sharding, train
    from mae_jax.tasks import pretrain

    config = ours.make_config(args)
    mesh = sharding.make_mesh(**config.mesh)
    task = pretrain.make_task(config, sharding.constrain_batch(mesh))
    tx, _ = task.optimizer(1000, 100)
    shapes, init = train.lay_out(task, tx, config, mesh)
    state = jax.block_until_ready(init())
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    found: dict = {"blocking": [], "written": [], "restored": [], "bytes": size}
    with tempfile.TemporaryDirectory(dir=sides.OUT) as folder:
        checkpointer = checkpoint.Checkpointer(folder, keep=1)
        for step in range(1, 4):
            began = time.perf_counter()
            checkpointer.save(step, state)
            found["blocking"].append(time.perf_counter() - began)
            checkpointer.wait()
            found["written"].append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(shapes))
            found["restored"].append(time.perf_counter() - began)
        checkpointer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ours.options(parser)
    parser.set_defaults(steps=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
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
    step = sides.run([sys.executable, f"{sides.HERE}/ours.py", *given, "--steps=3"])
    rows = []
    for name, found in results.items():
        seconds = sides.median(found)
        rows.append([name, f"{seconds:.2f} s" if seconds else sides.errors(found), ""])
    if "error" in save:
        rows.append(["save", save["error"], ""])
    else:
        for name, key in (
            ("save: training waits", "blocking"),
            ("save: written and committed", "written"),
            ("restore, with its digests checked", "restored"),
        ):
            seconds = sides.median([save], key)
            assert seconds
            rows.append([name, f"{seconds:.2f} s", f"{save['bytes'] / seconds / 1e9:.2f} GB/s"])
    own = sides.median([step])
    rows.append(["one step, to compare", f"{own:.2f} s" if own else sides.errors([step]), ""])
    results |= {"save": [save], "step": [step]}
    title = f"{args.variant}, batch {args.batch}, {args.dtype}, {os.cpu_count()} cores;"
    title += f" state {save.get('bytes', 0) / 1e9:.2f} GB; {sides.all_versions(results)}"
    head = ["what", "median", "speed"]
    sides.report("start", f"{title}\n\n{sides.markdown(head, rows)}", {"results": results})
    seconds = {name: sides.median(found) for name, found in results.items()}
    seconds |= {f"save: {key}": sides.median([save], key) for key in ("blocking", "written")}
    seconds |= {"restore": sides.median([save], "restored")}
    helps = {name: value for name, value in seconds.items() if name.endswith("--help")}
    others = {name: value for name, value in seconds.items() if name not in helps}
    sides.bars("start", {"to a step, to disk and back, s": others, "to the help text, s": helps})


if __name__ == "__main__":
    main()
