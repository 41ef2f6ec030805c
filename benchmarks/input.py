"""Images per second and core: our input against torch's DataLoader with Pillow, and tf.data.

    bash benchmarks/run.sh input [--rounds=2] [--seconds=10]

512 JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet's are on average, are cut from the
photographs in scikit-image. Each has a hundred names, since shuffling very few files is slow.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import sides

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "retina", "rocket", "chelsea", "hubble_deep_field")


def write_images(folder: Path, count: int) -> float:
    """Write JPEGs; return their mean size in bytes."""
    from PIL import Image
    from skimage import data

    rng = np.random.default_rng(0)
    sizes = []
    pictures = [Image.fromarray(getattr(data, name)()[..., :3]) for name in PHOTOGRAPHS]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        scale = rng.uniform(1.0, 1.5) * max(500 / picture.width, 375 / picture.height)
        if scale > 1:
            size = (int(picture.width * scale) + 1, int(picture.height * scale) + 1)
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        left = int(rng.integers(picture.width - 500 + 1))
        top = int(rng.integers(picture.height - 375 + 1))
        part = picture.crop((left, top, left + 500, top + 375))
        noise = rng.normal(0, 5, (375, 500, 1))  # as of a camera: enlarging took it away
        grainy = np.clip(np.asarray(part) + noise, 0, 255).astype(np.uint8)
        file = folder / f"{number % 4}" / f"{number:04}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(grainy).save(file, quality=96)
        sizes.append(file.stat().st_size)
        for name in range(1, 100):
            os.link(file, file.with_name(f"{number:04}_{name:02}.jpg"))
    return float(np.mean(sizes))


def loaders(folder: str, seconds: float, cores: int) -> dict[str, list[str]]:
    """Return the commands of all sides on so many cores."""

    def side(name: str, *options: str, python: str = sys.executable) -> list[str]:
        common = (name, folder, f"--seconds={seconds}", f"--cores={cores}")
        return sides.script("loader", *common, *options, python=python)

    torch = os.environ.get("TORCH_PYTHON", "")
    tensorflow = os.environ.get("TENSORFLOW_PYTHON", "")
    workers, fast, finetune = f"--workers={cores}", "--resizer=fast", "--finetune"
    commands = {
        "ours, threads": side("ours"),
        "ours, processes": side("ours", workers),
        "ours, fast, threads": side("ours", fast),
        "ours, fast, processes": side("ours", fast, workers),
        "torch DataLoader, Pillow": side("torch", workers, python=torch),
        "tf.data": side("tensorflow", python=tensorflow),
        "ours, fine-tuning": side("ours", finetune),
        "ours, fast, fine-tuning": side("ours", finetune, fast),
        "torch DataLoader, Pillow, fine-tuning": side("torch", workers, finetune, python=torch),
    }
    return {f"{name}, {cores} cores": command for name, command in commands.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), 512)
        commands = {}
        for count in sorted({1, cores}):
            commands |= loaders(folder, args.seconds, count)
        results = sides.take_turns(commands, args.rounds)
    rows = []
    panels: dict[str, dict[str, float]] = {}
    for name, rounds in results.items():
        seconds, count = sides.median(rounds), int(name.split()[-2])
        kind = "fine-tuning, " if "fine-tuning" in name else ""
        if seconds:
            panel = panels.setdefault(f"{kind or 'pre-training, '}images/s", {})
            panel[name.replace(kind, "")] = 1 / seconds
        peer = sides.median(results[f"torch DataLoader, Pillow, {kind}{count} cores"])
        rows.append(
            [
                name,
                sides.ratio(1, seconds, "{:.0f}") or sides.cell(rounds),
                sides.ratio(1 / count, seconds, "{:.0f}"),
                sides.ratio(peer, seconds),
                sides.cell(rounds, "{:.2f} GiB", "peak_gib"),
                sides.cell(rounds, "{:.2f} GiB", "worker_gib"),
                sides.cell(rounds, "{:.0f} kB", "batch_bytes", per=1e3),
            ]
        )
    head = ["side", "images/s", "per core", "of torch's", "peak memory", "largest worker"]
    head += ["bytes to the device, per image"]
    title = f"512 JPEGs, {size / 1e3:.0f} kB on average"
    sides.report("input", title, head, rows, results)
    sides.bars("input", panels)


if __name__ == "__main__":
    main()
