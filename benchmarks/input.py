"""Images per second and core: our input against torch's DataLoader with Pillow, and tf.data.

    bash benchmarks/run.sh input [--rounds=2] [--seconds=10]

512 JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet's are on average, cut from real
photographs (those in scikit-image), each under a hundred names: orders of very few files are dear.
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
    """Writes JPEGs; their mean size in bytes."""
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
        noise = rng.normal(0, 5, (375, 500, 1))  # of a camera; enlarging took it away
        grainy = np.clip(np.asarray(part) + noise, 0, 255).astype(np.uint8)
        file = folder / f"{number % 4}" / f"{number:04}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(grainy).save(file, quality=96)
        sizes.append(file.stat().st_size)
        for name in range(1, 100):
            os.link(file, file.with_name(f"{number:04}_{name:02}.jpg"))
    return float(np.mean(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch = os.environ.get("TORCH_PYTHON", "")
    tensorflow = os.environ.get("TENSORFLOW_PYTHON", "")
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), 512)
        script = [f"{sides.HERE}/loader.py"]
        tail = [folder, f"--seconds={args.seconds}"]
        commands = {}
        for count in sorted({1, cores}):
            on = [*tail, f"--cores={count}"]
            here = [sys.executable, *script, "ours", *on]
            commands |= {
                f"ours, threads, {count} cores": here,
                f"ours, processes, {count} cores": [*here, f"--workers={count}"],
                f"ours, fast, threads, {count} cores": [*here, "--resizer=fast"],
                f"ours, fast, processes, {count} cores": [
                    *(*here, "--resizer=fast", f"--workers={count}")
                ],
                f"torch DataLoader, Pillow, {count} cores": [
                    *(torch, *script, "torch", *on, f"--workers={count}")
                ],
                f"tf.data, {count} cores": [tensorflow, *script, "tensorflow", *on],
                f"ours, fine-tuning, {count} cores": [*here, "--finetune"],
                f"ours, fast, fine-tuning, {count} cores": [*here, "--finetune", "--resizer=fast"],
                f"torch DataLoader, Pillow, fine-tuning, {count} cores": [
                    *(torch, *script, "torch", *on, f"--workers={count}", "--finetune")
                ],
            }
        results = sides.take_turns(commands, args.rounds)
    rows = []
    panels: dict[str, dict[str, float]] = {
        "pre-training, images/s": {},
        "fine-tuning, images/s": {},
    }
    for name, found in results.items():
        seconds, count = sides.median(found), int(name.split()[-2])
        if seconds is None:
            rows.append([name, sides.errors(found), *5 * [""]])
            continue
        kind = "fine-tuning, " if "fine-tuning" in name else ""
        panels[f"{kind or 'pre-training, '}images/s"][name.replace(kind, "")] = 1 / seconds
        peer = sides.median(results[f"torch DataLoader, Pillow, {kind}{count} cores"])
        rows.append(
            [
                name,
                f"{1 / seconds:.0f}",
                f"{1 / seconds / count:.0f}",
                f"{peer / seconds:.2f}" if peer else "",
                f"{sides.median(found, 'peak_gib'):.2f} GiB",
                f"{sides.median(found, 'worker_gib'):.2f} GiB",
                f"{sides.median(found, 'batch_bytes') / 1e3:.0f} kB",
            ]
        )
    head = ["side", "images/s", "per core", "of torch's", "peak memory", "largest worker"]
    head += ["bytes to the device, per image"]
    title = f"512 JPEGs, {size / 1e3:.0f} kB on average; {sides.all_versions(results)}"
    sides.report("input", f"{title}\n\n{sides.markdown(head, rows)}", {"results": results})
    sides.bars("input", panels)


if __name__ == "__main__":
    main()
