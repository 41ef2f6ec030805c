"""One side of the input benchmark: read JPEGs, crop, resize to 224, mirror, make batches.

    python benchmarks/loader.py ours|torch|tensorflow FOLDER --cores=2 [--workers=N] [--size=32] ...

All sides decode the same files and make uint8 batches of 128 by random resized crops with
antialiased bicubic resampling. Prints a line of JSON: seconds per image, without the first batches,
CPU seconds per image of all processes, and the seconds until the first batch.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH = 128


def ours(args: argparse.Namespace) -> Iterator[Any]:
    """Yield our batches."""
    from mae_jax.configs import finetune, pretrain
    from mae_jax.data import pipeline, sources

    config = (finetune if args.finetune else pretrain).get_config()
    config.data.workers = args.workers
    config.data.resizer = args.resizer
    source = sources.open_source(f"folder:{args.folder}", "train")
    sizes: dict[str, Any] = dict(batch_size=BATCH, image_size=(args.size, args.size), channels=3)
    for batch in pipeline.train_batches(source, config.data, **sizes, seed=0):
        yield batch["image"]


def box(width: int, height: int, least: float) -> tuple[int, int, int, int]:
    """Return a random left, top, right, bottom of an area from `least` to 1, aspect 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * random.uniform(least, 1.0)
        aspect = (4 / 3) ** random.uniform(-1, 1)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def torch(args: argparse.Namespace) -> Iterator[Any]:
    """Yield batches of torch's DataLoader, read with Pillow."""
    import numpy as np
    from PIL import Image
    from torch import from_numpy, set_num_threads
    from torch.utils.data import DataLoader, Dataset

    from mae_jax.data import augment  # Pillow's operations in Python, as timm's are

    set_num_threads(1)
    files = sorted(Path(args.folder).rglob("*.jpg"))
    least = 0.08 if args.finetune else 0.2
    distort = augment.parse("rand-m9-mstd0.5-inc1") if args.finetune else None

    class Crops(Dataset):
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> Any:
            image = Image.open(files[index % len(files)]).convert("RGB")
            part = image.crop(box(*image.size, least))
            image = part.resize((args.size, args.size), Image.Resampling.BICUBIC)
            if random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            array = np.array(image)
            if distort:
                array = distort(array, np.random.default_rng(random.getrandbits(64)))
            return from_numpy(array)

    yield from DataLoader(Crops(), BATCH, shuffle=True, num_workers=args.workers, prefetch_factor=4)


def tensorflow(args: argparse.Namespace) -> Iterator[Any]:
    """Yield batches of tf.data."""
    import tensorflow as tf

    files = sorted(str(file) for file in Path(args.folder).rglob("*.jpg"))

    def load(file: Any) -> Any:
        data = tf.io.read_file(file)
        shape = tf.image.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4]),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.2, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (args.size, args.size), "bicubic", antialias=True)
        image = tf.image.random_flip_left_right(tf.clip_by_value(image, 0, 255))
        return tf.cast(tf.round(image), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(files).repeat().shuffle(1000)
    data = data.map(load, tf.data.AUTOTUNE).batch(BATCH).prefetch(2)
    yield from data.as_numpy_iterator()


def cpu_seconds() -> float:
    """Return the CPU time that this process and its workers have used."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user mode, and in the kernel
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def own_gib(process: Any) -> float:
    """Return the memory of a process that it shares with no other."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"Private_\w+: +(\d+) kB", text))) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "torch", "tensorflow"])
    parser.add_argument("folder")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--size", type=int, default=224, help="of the batches' images")
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--resizer", default="pillow", help="of ours")
    parser.add_argument("--seconds", type=float, default=15)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    batches = {"ours": ours, "torch": torch, "tensorflow": tensorflow}[args.side](args)
    start = time.perf_counter()
    first = 0.0
    for _ in range(6):  # more than what was read ahead while nobody timed
        batch = next(batches)
        first = first or time.perf_counter() - start
    assert batch.shape == (BATCH, args.size, args.size, 3), batch.shape
    began, cpu_began, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - began < args.seconds:
        next(batches)
        count += BATCH
    seconds = (time.perf_counter() - began) / count
    cpu = (cpu_seconds() - cpu_began) / count
    from benchmarks.sides import versions

    packages = {
        "ours": ("grain", "pillow", "simplejpeg", "cykooz-resizer"),
        "torch": ("torch",),
        "tensorflow": ("tensorflow",),
    }
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "first": first,
        "batch_bytes": batch.nbytes / BATCH,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "worker_gib": max((own_gib(x.pid) for x in multiprocessing.active_children()), default=0),
        "versions": versions(*packages[args.side]),
    }
    print(json.dumps(result), flush=True)
    os._exit(0)  # some loaders wait for their workers


if __name__ == "__main__":
    main()
