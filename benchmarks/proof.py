"""Make the runs of the published protocol on CIFAR-10 and print them beside the published numbers.

python benchmarks/proof.py WORKDIR DATA [tune] [--limit=SECONDS] [--share=PART] [--FLAG ...]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from mae_jax.distributed import PREEMPTED

RECIPE = "configs/cifar10.py"
STEPS = {"pretrain": 150 * (50_000 // 512), "tuned": 50 * (50_000 // 128)}
STEPS["scratch"] = STEPS["tuned"]
# What a course repository publishes for ViT-Ti/2 and 150 epochs (docs/cifar10.md), and our metric.
PUBLISHED = (
    ("loss of pre-training, pixels in [-1, 1]", ".0401", "pretrain", "train/loss"),
    (
        "linear probe; here logistic regression of the best block, %",
        "53.1",
        "frozen",
        "eval/logistic_cls_best",
    ),
    ("20 nearest neighbours, %", "-", "frozen", "eval/knn20_cls"),
    ("fine-tuned, %", "82.2", "tuned", "eval/top1"),
    ("from scratch, %", "73.0", "scratch", "eval/top1"),
)


def train(root: Path, name: str, arguments: str, seconds: float, *flags: str) -> None:
    """Make a run, or go on with it, for so long."""
    command = [sys.executable, "-m", "mae_jax", "train", f"--config={RECIPE}:{arguments}"]
    process = subprocess.Popen([*command, f"--workdir={root / name}", *flags])
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # it saves and stops
        status = process.wait()
    if status not in (0, PREEMPTED):
        raise SystemExit(f"{name} ended with {status}; its messages are above")


def reached(workdir: Path, key: str) -> tuple[int, float] | None:
    """Return (step, value) of a metric where it was measured last."""
    path = workdir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    found = [(line["step"], line[key]) for line in lines if key in line]
    return found[-1] if found else None


def table(root: Path) -> str:
    """Return what was reached, beside what is published."""
    lines = ["| | published | here | steps |", "|---|---|---|---|"]
    for words, published, name, key in PUBLISHED:
        value = reached(root / name, key)
        done = reached(root / "pretrain", "train/loss") if name == "frozen" else value
        trained = "pretrain" if name == "frozen" else name
        steps = f"{done[0]:,} of {STEPS[trained]:,}" if done else ""
        lines.append(f"| {words} | {published} | {f'{value[1]:.4g}' if value else ''} | {steps} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/proof.sh", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("data")
    parser.add_argument("part", nargs="?", choices=("pretrain", "tune"), default="pretrain")
    parser.add_argument("--limit", type=float, default=540, help="seconds")
    parser.add_argument("--share", type=float, default=1.0, help="of steps and images")
    parser.add_argument("--small", action="store_true", help="the model of docs/cifar10.md")
    args, others = parser.parse_known_args()
    if wrong := [flag for flag in others if not flag.startswith("--config.")]:
        parser.error(f"{wrong[0]} is unknown: give one of these, or --config.KEY=VALUE to train by")
    root, data = args.workdir, f"data={args.data},small={args.small}"
    if not any(Path(args.data, "train").glob("*/*")):
        parser.error(f"{args.data} holds no train/CLASS/*.jpg: give the folder of CIFAR-10")

    def length(name: str) -> list[str]:
        steps = max(1, round(args.share * STEPS[name]))
        flags = [f"--config.train_for={steps} steps"]
        if args.share < 1:  # a tenth, as in the whole run
            flags.append(f"--config.optim.warmup={steps // 10} steps")
        return flags + others

    part = "" if args.share == 1 else f"[:{max(1, round(100 * args.share))}%]"
    began = time.monotonic()
    if args.part == "pretrain":
        train(root, "pretrain", data, args.limit, *length("pretrain"))
        splits = [f"--config.data.split=train{part}"]
        for name in ("knn", "logistic"):
            splits.append(f"--config.evals.{name}.bank_split=train{part}")
            splits.append(f"--config.evals.{name}.split=test{part}")
        train(root, "frozen", f"{data},task=knn,init={root / 'pretrain'}", 600, *splits)
    else:
        starts = {"tuned": f",init={root / 'pretrain'}", "scratch": ""}
        for name, init in starts.items():
            test = [f"--config.evals.accuracy.{x}" for x in (f"split=test{part}", "every=5 epochs")]
            train(root, name, f"{data},task=finetune{init}", args.limit / 2, *length(name), *test)
    text = table(root)
    (root / "proof.md").write_text(text + "\n")
    print(f"\n{text}\n{(time.monotonic() - began) / 60:.1f} minutes; {root / 'proof.md'}")


if __name__ == "__main__":
    main()
