"""Images per second and core: our input against torch's DataLoader with Pillow, and tf.data.

    bash benchmarks/run.sh input [--rounds=2] [--seconds=10]

512 JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet's are on average, and as many of 32 x 32
pixels are cut from the photographs in scikit-image. Each has a hundred names, since shuffling very
few files is slow. "default" is the recipe as it is.
"""

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import sides

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "retina", "rocket", "chelsea", "hubble_deep_field")


TORCH = "torch DataLoader, Pillow"
SIZES = {"large": 224, "small": 32}  # of the batches' images


def write_images(folder: Path, count: int) -> float:
    """Write JPEGs of both sizes; return the mean size of the large ones in bytes."""
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
        large = Image.fromarray(grainy)
        small = large.crop((62, 0, 437, 375)).resize((32, 32), Image.Resampling.BICUBIC)
        for kind, image, quality in (("large", large, 96), ("small", small, 75)):
            file = folder / kind / f"{number % 4}" / f"{number:04}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, quality=quality)
            for name in range(1, 100):
                os.link(file, file.with_name(f"{number:04}_{name:02}.jpg"))
        sizes.append((folder / f"large/{number % 4}/{number:04}.jpg").stat().st_size)
    return float(np.mean(sizes))


def loaders(folder: str, kind: str, seconds: float, cores: int) -> dict[str, list[str]]:
    """Return the commands of all sides on images of one kind and so many cores."""

    def side(name: str, *options: str, python: str = sys.executable) -> list[str]:
        common = (name, f"{folder}/{kind}", f"--seconds={seconds}", f"--cores={cores}")
        return sides.script("loader", *common, f"--size={SIZES[kind]}", *options, python=python)

    torch = os.environ.get("TORCH_PYTHON", "")
    tensorflow = os.environ.get("TENSORFLOW_PYTHON", "")
    workers, fast, finetune = f"--workers={cores}", "--resizer=fast", "--finetune"
    commands = {
        "ours, default": side("ours"),
        "ours, threads": side("ours", "--workers=0"),
        "ours, processes": side("ours", workers),
        "ours, fast, default": side("ours", fast),
        TORCH: side("torch", workers, python=torch),
        "tf.data": side("tensorflow", python=tensorflow),
    }
    if kind == "large":
        commands |= {
            "ours, default, fine-tuning": side("ours", finetune),
            "ours, fast, default, fine-tuning": side("ours", finetune, fast),
            f"{TORCH}, fine-tuning": side("torch", workers, finetune, python=torch),
        }
    return {f"{kind}: {name}, {cores} cores": command for name, command in commands.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), 512)
        commands = {}
        for kind, count in itertools.product(SIZES, sorted({1, cores})):
            commands |= loaders(folder, kind, args.seconds, count)
        results = sides.take_turns(commands, args.rounds)
    rows = []
    panels: dict[str, dict[str, float]] = {}
    for name, rounds in results.items():
        seconds, count = sides.median(rounds), int(name.split()[-2])
        kind, side = name.split(": ")
        task = "fine-tuning, " if "fine-tuning" in name else ""
        if seconds:
            panel = panels.setdefault(f"{kind}, {task}images/s", {})
            panel[side.replace(task, "")] = 1 / seconds
        peer = sides.median(results[f"{kind}: {TORCH}, {task}{count} cores"])
        rows.append(
            [
                name,
                sides.ratio(1, seconds, "{:.0f}") or sides.cell(rounds),
                sides.ratio(1 / count, seconds, "{:.0f}"),
                sides.ratio(peer, seconds),
                sides.cell(rounds, "{:.3f} ms", "cpu_seconds", per=1e-3),
                sides.cell(rounds, key="first", form="{:.1f} s"),
                sides.cell(rounds, "{:.2f} GiB", "peak_gib"),
                sides.cell(rounds, "{:.2f} GiB", "worker_gib"),
                sides.cell(rounds, "{:.0f} kB", "batch_bytes", per=1e3),
            ]
        )
    head = [
        "side",
        "images/s",
        "per core",
        "of torch's",
        "CPU per image",
        "first batch",
        "peak memory",
    ]
    head += ["a worker's own memory", "bytes to the device, per image"]
    title = f"large: 512 JPEGs, {size / 1e3:.0f} kB on average; small: 512 JPEGs of 32 px"
    sides.report("input", title, head, rows, results)
    sides.bars("input", panels)


if __name__ == "__main__":
    main()
