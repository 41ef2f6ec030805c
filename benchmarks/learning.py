"""Compare what ours and IcarusWizard's MAE (MIT) learn from the same images in the same steps.

    bash benchmarks/run.sh learning --data=CIFAR-10 --peer=CLONE [--epochs=3] [--seeds=3]

CLONE is a clone of github.com/IcarusWizard/MAE. Both have width 128, 6 blocks, patches of 4 and a
decoder of 128 x 2 without projection and last norm (benchmarks/icarus_decoder.py), see plain
pixels from -1 to 1, and take AdamW steps by one schedule. Ours starts as theirs does: linear layers
as PyTorch's, learned positions, weight decay on everything (benchmarks/icarus_task.py). What still
differs: their queries, keys and values have no bias, LayerNorm adds 1e-5, and the order of images
and masks is drawn otherwise. The third side, "paper", is ours as the paper starts: Xavier's
matrices, sine-cosine positions in the encoder, weight decay on matrices and tokens.

The probe is scikit-learn's logistic regression of the class token of 10,000 training images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import sides

BATCH, EVERY = 256, 20  # steps between two reported losses of ours
OURS = {
    "target.name": "pixels", "data.mean": "(0.5, 0.5, 0.5)", "data.std": "(0.5, 0.5, 0.5)",
    "data.crop": "center", "data.flip": "0.0", "model.decoder_width": "128",
    "model.decoder_heads": "4", "model.decoder": "benchmarks.icarus_decoder",
    "log_every": f"{EVERY} steps", "evals.reconstruct.images": "100",
}  # fmt: skip
SIDES = ("ours", "icarus", "paper")


def read(data: Path, out: Path) -> Path:
    """Write the images as arrays, once: all of train, its bank, and the test; return the file."""
    from PIL import Image

    file = out / "images.npz"
    if not file.exists():
        arrays, labels = {}, {}
        for split in ("train", "test"):
            paths = sorted(data.glob(f"{split}/*/*"))
            classes = sorted({path.parent.name for path in paths})
            arrays[split] = np.stack(
                [np.asarray(Image.open(path).convert("RGB")) for path in paths]
            )
            labels[split] = np.array([classes.index(path.parent.name) for path in paths])
        bank = np.random.default_rng(0).permutation(len(arrays["train"]))[:10_000]
        arrays["bank"], labels["bank"] = arrays["train"][bank], labels["train"][bank]
        np.savez(file, **arrays, **{f"{name}_labels": x for name, x in labels.items()})
    return file


def train_ours(args: argparse.Namespace, side: str, seed: int, arrays: Path, out: Path) -> None:
    """Train a side with `mae-jax train`, and write losses and features."""
    import jax

    import mae_jax

    workdir = out / f"{side}-{seed}"
    recipe = f"configs/cifar10.py:data={args.data},small=true,epochs={args.epochs},seed={seed}"
    steps = args.epochs * (args.images // BATCH)
    overrides = OURS | {"optim.blr": str(args.blr), "optim.warmup": f"{max(steps // 10, 1)} steps"}
    if side == "ours":
        overrides["task"] = "benchmarks.icarus_task"
    command = [sys.executable, "-m", "mae_jax", "train", f"--config={recipe}"]
    command += [f"--workdir={workdir}", *(f"--config.{key}={x}" for key, x in overrides.items())]
    subprocess.run(command, check=True, env=os.environ | sides.CPU, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [x["train/loss"] for x in lines if "train/loss" in x]
    model, params = mae_jax.load(workdir, target="pixels")
    encode = jax.jit(lambda images: model.encode(params, images)[:, 0])
    loaded, found = np.load(arrays), {}
    for name in ("bank", "test"):
        images = loaded[name]
        found[name] = np.concatenate(
            [encode(images[i : i + 500]) for i in range(0, len(images), 500)]
        )
    np.savez(out / f"{side}-{seed}.npz", losses=losses, **found)


def train_theirs(args: argparse.Namespace, seed: int, arrays: Path, out: Path) -> None:
    """Train theirs, and write losses and features."""
    given = dict(
        peer=args.peer, arrays=arrays, out=out / f"icarus-{seed}.npz", seed=seed,
        epochs=args.epochs, batch_size=BATCH, blr=args.blr,
    )  # fmt: skip
    options = [f"--{name}={x}" for name, x in given.items()]
    result = sides.run(sides.script("icarus", *options, python=os.environ["TORCH_PYTHON"]))
    if "error" in result:
        sys.exit(f"IcarusWizard's MAE did not run: {result['error']}")


def probe(file: Path, arrays: Path) -> float:
    """Return the top-1 accuracy, in percent, of logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression

    found, labels = np.load(file), np.load(arrays)
    mean, std = found["bank"].mean(0), found["bank"].std(0) + 1e-6
    bank, test = ((found[name] - mean) / std for name in ("bank", "test"))
    model = LogisticRegression(C=0.01, max_iter=500).fit(bank, labels["bank_labels"])
    return 100 * model.score(test, labels["test_labels"])


def curves(out: Path, side: str, seeds: int) -> np.ndarray:
    """Return the losses (seeds, reports): of steps 1, EVERY, 2 EVERY and so on."""
    found = [np.load(out / f"{side}-{seed}.npz")["losses"] for seed in range(seeds)]
    if side == "icarus":
        found = [[x[0], *x[EVERY - 1 :: EVERY]] for x in found]
    length = min(map(len, found))
    return np.array([x[:length] for x in found])


def draw(out: Path, losses: dict[str, np.ndarray], probes: dict[str, list[float]]) -> None:
    """Draw loss curves and probes, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for number, (side, found) in enumerate(losses.items()):
        for seed, line in enumerate(found):
            steps = [1, *range(EVERY, EVERY * len(line), EVERY)]
            left.plot(steps, line, f"C{number}", alpha=0.6, label=None if seed else side)
        right.plot([number] * len(probes[side]), probes[side], f"C{number}o")
    left.set(xlabel="step", ylabel="loss, plain pixels", yscale="log")
    left.legend()
    right.set(ylabel="logistic regression, top-1 %", xlim=(-0.5, 2.5))
    right.set_xticks(range(len(losses)), losses)
    figure.savefig(out / "learning.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blr", type=float, default=1e-3)
    args = parser.parse_args()
    out = sides.OUT / "learning"
    out.mkdir(parents=True, exist_ok=True)
    arrays = read(args.data, out)
    args.images = len(np.load(arrays)["train"])
    for seed in range(args.seeds):
        for side in SIDES:
            if not (out / f"{side}-{seed}.npz").exists():
                if side == "icarus":
                    train_theirs(args, seed, arrays, out)
                else:
                    train_ours(args, side, seed, arrays, out)
                print(f"{side}, seed {seed}: done", file=sys.stderr, flush=True)
    losses = {side: curves(out, side, args.seeds) for side in SIDES}
    reports = min(x.shape[1] for x in losses.values())  # ours also reports the last step
    losses = {side: x[:, :reports] for side, x in losses.items()}
    probes = {
        side: [probe(out / f"{side}-{seed}.npz", arrays) for seed in range(args.seeds)]
        for side in losses
    }
    print(
        f"| {args.epochs} epochs, {args.seeds} seeds | loss, last tenth | logistic, top-1 % |\n"
        "|---|---|---|"
    )
    for side, found in losses.items():
        ends = [line[-max(len(line) // 10, 1) :].mean() for line in found]
        cells = (
            f"{statistics.mean(x):{form}} ± {np.std(x, ddof=1) if len(x) > 1 else 0:{form}}"
            for x, form in ((ends, ".4f"), (probes[side], ".1f"))
        )
        print(f"| {side} | {' | '.join(cells)} |")
    draw(out, losses, probes)
    print(f"figure {out / 'learning.png'}")


if __name__ == "__main__":
    main()
