r"""One GPU: our pre-training step against Hugging Face's ViTMAE, and a short run on real JPEGs.

    bash benchmarks/gpu.sh [--tiny] [--images=folder:PATH] [--limit=600]

All programs compile at the same time, for which a GPU machine has the cores; then they take turns
on the quiet device. What is not compiled in half of the limit is left out. The run on JPEGs is that
of `mae-jax train`, with its input, and writes a trace for TensorBoard and Perfetto. --tiny is for a
machine without a GPU: small networks, to see that everything works; its numbers say nothing.
"""

import argparse
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks import sides

BF16 = "--dtype=bfloat16"
OURS = {  # those that compile longest first
    "H/14, 64, cudnn, unrolled": "--variant=H/14 --batch=64 --attention=cudnn",
    "L/16, 256, cudnn, unrolled": "--variant=L/16 --batch=256 --attention=cudnn",
    "L/16, 128, cudnn, unrolled": "--variant=L/16 --batch=128 --attention=cudnn",
    "L/16, 128, cudnn, unrolled, tokens in bfloat16": "--variant=L/16 --batch=128"
    " --attention=cudnn --residual=bfloat16",
    "B/16, 512, cudnn, unrolled": "--variant=B/16 --batch=512 --attention=cudnn",
    "B/16, 256, cudnn, unrolled": "--variant=B/16 --batch=256 --attention=cudnn",
    "B/16, 256, xla, unrolled": "--variant=B/16 --batch=256 --attention=xla",
    "L/16, 128, cudnn, loop": "--variant=L/16 --batch=128 --attention=cudnn --unroll=1",
    "L/16, 128, xla, loop": "--variant=L/16 --batch=128 --attention=xla --unroll=1",
    "L/16, 128, cudnn, loop, mask tokens in the encoder": "--variant=L/16 --batch=128"
    " --attention=cudnn --unroll=1 --tokens_in_encoder",
}
HF = {
    f"HF {variant}, {batch}, torch.compile": f"--variant={variant} --batch={batch} --compiled"
    for variant, batch in (("H/14", 64), ("L/16", 128), ("L/16", 256), ("B/16", 256), ("B/16", 512))
}
TINY = "--variant=Ti/16 --decoder_depth=1 --image_size=32 --batch=4"
TINY_OURS = {
    "Ti/16, 4, auto": f"{TINY} --unroll=1",
    "Ti/16, 4, auto, mask tokens in the encoder": f"{TINY} --unroll=1 --tokens_in_encoder",
}
TINY_HF = {"HF Ti/16, 4, eager": TINY}


class Side:
    """A process that compiles programs and times one of them when asked; see `sides.serve`."""

    def __init__(self, command: list[str]):
        environment = os.environ | sides.CPU | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._results: queue.Queue = queue.Queue()
        self.compiled: dict[str, dict] = {}  # name -> its seconds, or its error
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for text in self._process.stdout:
            if not text.startswith("{"):
                continue
            line = json.loads(text)
            print(line, file=sys.stderr, flush=True)
            if "ready" in line:
                self.compiled[line.pop("ready")] = line
            else:
                self._results.put(line["result"])
        self.ended = True
        self._results.put({"error": "its process ended"})

    def time(self, name: str, steps: int) -> dict[str, Any]:
        """Return what a block of steps of a program took."""
        assert self._process.stdin
        try:
            print(json.dumps({"name": name, "steps": steps}), file=self._process.stdin, flush=True)
            return self._results.get(timeout=120)
        except (BrokenPipeError, queue.Empty):
            return {"error": "no answer"}

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def race(ours: dict, peers: dict, torch: str, steps: int, seconds: float) -> dict[str, list[dict]]:
    """Compile all programs and peers for `seconds` at most; return two rounds of those ready.

    Peers go first in both rounds, and are ended after them, so that their memory is free.
    """
    options = {name: [*shlex.split(text), BF16] for name, text in ours.items()}
    running = {name: Side(sides.script("ours", f"--race={json.dumps(options)}")) for name in [""]}
    started = dict.fromkeys(ours, running[""])
    for name, text in peers.items() if torch else ():
        command = sides.script("huggingface", f"--race={name}", BF16, *text.split(), python=torch)
        started[name] = running[name] = Side(command)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(name in side.compiled or side.ended for name, side in started.items()):
            break
        time.sleep(0.2)
    results: dict[str, list[dict]] = {}
    for group in (peers, ours):
        names = [name for name in group if name in started]
        for order in (names, names[::-1]):
            for name in order:
                late = {"error": "not compiled in time"}
                fact = started[name].compiled.get(name, late)
                result = {} if "error" in fact else started[name].time(name, steps)
                results.setdefault(name, []).append(fact | result)
        for name in group:
            if name in running:
                running[name].end()
    running[""].end()
    return results


def train(images: str, tiny: bool) -> tuple[dict[str, float], str]:
    """Run `mae-jax train` on JPEGs for a while; return its last metrics, and where its trace is."""
    workdir = sides.OUT / "gpu_run"
    shutil.rmtree(workdir, ignore_errors=True)
    size = "variant=Ti/16,image_size=32,batch_size=8" if tiny else "variant=B/16,batch_size=256"
    steps, every, warmup, decoder_depth = (4, 2, 2, 1) if tiny else (150, 50, 4, 8)
    words = [
        f"--config=pretrain:{size}",
        f"--config.model.decoder_depth={decoder_depth}",
        f"--config.data.source={images}",
        f"--workdir={workdir}",
        f"--profile={steps - 2}:{steps}",
        f"--config.train_for={steps} steps",
        f"--config.log_every={every} steps",
        f"--config.checkpoint.every={steps} steps",
        "--config.checkpoint.keep_every=",
        f"--config.optim.warmup={warmup} steps",
        "--config.evals.reconstruct.every=",
        "--config.evals.reconstruct.split=train[:8]",
        "--config.evals.reconstruct.images=8",
    ]
    command = [sys.executable, "-m", "mae_jax", "train", *words]
    process = subprocess.run(command, env=os.environ | sides.CPU, capture_output=True, text=True)
    if process.returncode:
        return {}, (process.stderr or process.stdout).strip().splitlines()[-1][:200]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "perf/data_wait_frac" in row]
    return rows[-2], str(workdir / "profile")  # the last block holds the trace


def table(results: dict[str, list[dict]]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table, and a line for each model with a peer."""
    rows, best = [], {}
    for name, rounds in results.items():
        words = name.removeprefix("HF ").split(", ")
        side = "HF" if name.startswith("HF ") else "ours"
        fastest = min((x["seconds"][0] for x in rounds if "seconds" in x), default=None)
        rate = int(words[1]) / fastest if fastest else None
        if rate and "mask tokens" not in name:
            best[words[0], side] = max(best.get((words[0], side), 0), rate)
        slowest = max((x["seconds"][0] for x in rounds if "seconds" in x), default=None)
        rows.append(
            [
                name,
                f"{rate:,.0f}" if rate else sides.cell(rounds),
                sides.ratio(int(words[1]), slowest, "{:,.0f}"),
                sides.cell(rounds, "{:.1%}", "mfu"),
                sides.cell(rounds, "{:.0f} s", "compile_seconds"),
                sides.cell(rounds, "{:.1f} GiB", "temporary_gib"),
                sides.cell(rounds, "{:.1f} GiB", "peak_gib"),
                sides.cell(rounds, "{:.4f}", "loss"),
            ]
        )
    notes = [
        f"{model}: {rate / best[model, 'HF']:.2f} of HF's best."
        for (model, side), rate in best.items()
        if side == "ours" and (model, "HF") in best
    ]
    for name in results:
        plain = name.removesuffix(", mask tokens in the encoder")
        if plain != name and plain in results:
            times = sides.ratio(sides.median(results[name]), sides.median(results[plain]))
            notes.append(f"{plain}: {times} times as long with mask tokens in the encoder.")
    return rows, notes


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the default without nvidia-smi")
    parser.add_argument("--images", default="bundled:photos", help="a source of JPEGs; '' = none")
    parser.add_argument("--limit", type=float, default=600, help="seconds, for all of it")
    args = parser.parse_args()
    tiny, torch = args.tiny or not shutil.which("nvidia-smi"), os.environ.get("TORCH_PYTHON", "")
    sides.OUT.mkdir(exist_ok=True)
    ours, peers = (TINY_OURS, TINY_HF) if tiny else (OURS, HF)
    results = race(ours, peers, torch, steps=2 if tiny else 12, seconds=args.limit / 2)
    rows, notes = table(results)
    if not torch:
        notes.append("Without PyTorch here, so without Hugging Face's side.")
    if args.images:
        metrics, place = train(args.images, tiny)
        if metrics:
            rate = metrics["perf/images_per_sec_per_chip"]
            notes.append(
                f"`mae-jax train` on JPEGs ({args.images}): {rate:,.0f} images/s, of which waiting"
                f" {metrics['perf/data_wait_frac']:.1%}: an epoch of 1,281,167 images in"
                f" {1281167 / rate / 60:.1f} minutes. Trace of its last steps: {place}"
            )
        else:
            notes.append(f"`mae-jax train` on JPEGs ({args.images}) failed: {place}")
    cards = {rounds[0]["device"] for rounds in results.values() if "device" in rounds[0]}
    notes.append(f"In all {time.monotonic() - began:.0f} s. MAE B/16 on an A100: 1,142 images/s")
    head = ["program, batch", "images/s", "slower round", "MFU", "compiled in", "temporary"]
    title = f"{', '.join(sorted(cards)) or 'nothing ran'}; bfloat16" + (", tiny" if tiny else "")
    sides.report(
        "gpu", title, [*head, "peak memory", "loss"], rows, results, notes, script="gpu.sh"
    )


if __name__ == "__main__":
    main()
