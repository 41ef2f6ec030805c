"""Pack images of a folder into shards of a tfds dataset: what one process does for `prepare`."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mae_jax import files
from mae_jax.data import arrayrecord
from mae_jax.data.folder import FolderSource
from mae_jax.data.transforms import ORIENTATION, BadImage, decode

IMAGES_PER_SHARD = 256  # what an interruption may cost; more beyond 1024 shards
MAX_SHARDS = 1024
JPEG_SIDE = 65_500  # pixels, of libjpeg


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a dataset: its images, its file, and the report beside a complete file."""

    source: FolderSource
    path: Path
    resize: int | None
    quality: int

    @property
    def report(self) -> Path:
        return self.path.with_name(self.path.name + ".json")


def make_shards(
    images: FolderSource, work: Path, name: str, resize: int | None, quality: int
) -> list[Shard]:
    """Divide the images, in the order of their names' hashes, into shards of `work`."""
    order = arrayrecord.shuffled(images.files)
    num_shards = min(-(-len(order) // IMAGES_PER_SHARD), MAX_SHARDS)
    return [
        Shard(
            dataclasses.replace(
                images, files=[images.files[i] for i in rows], labels=images.labels[rows]
            ),
            arrayrecord.shard_path(work, name, "train", i, num_shards),
            resize,
            quality,
        )
        for i, rows in enumerate(np.array_split(np.array(order), num_shards))
    ]


def write_shard(shard: Shard) -> None:
    """Write one shard, then its report; runs in a worker process."""
    features = arrayrecord.image_features(shard.source.class_names)
    histogram = np.zeros((3, 256), np.int64)
    bad = {}

    def records() -> Iterator[bytes]:
        for i in range(len(shard.source)):
            record = shard.source[i]
            try:
                if "unreadable" in record:
                    raise BadImage(record["unreadable"])
                data, image = encode(record["image"], shard.resize, shard.quality)
            except BadImage as error:
                bad[record["name"]] = str(error)
                continue
            histogram[:] += np.reshape(image.histogram(), (3, 256))
            example = {"image": data, "file_name": record["name"]}
            if shard.source.class_names:
                example["label"] = record["label"]
            yield features.serialize_example(features.encode_example(example))

    count, size = arrayrecord.write_shard(shard.path, records())
    report = {"images": count, "bytes": size, "histogram": histogram.tolist(), "bad": bad}
    files.write_json(shard.report, report)


def encode(data: bytes, resize: int | None, quality: int) -> tuple[bytes, Image.Image]:
    """Return what to store of an image file, and the RGB image that it shows.

    Raises:
      BadImage: it cannot be read.
    """
    decoded = decode(data, 3)
    image = decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded)
    if resize is None:
        with Image.open(io.BytesIO(data)) as original:
            plain = original.format in ("JPEG", "PNG") and original.mode in ("RGB", "L")
            upright = original.getexif().get(ORIENTATION, 1) == 1
            if plain and upright and "transparency" not in original.info:
                return data, image
    scale = resize / min(image.size) if resize else 1
    if max(image.size) * scale > JPEG_SIDE:
        raise BadImage(
            f"{image.width} x {image.height} pixels: too long a strip, JPEG ends at {JPEG_SIDE:,}"
        )
    if resize:
        width, height = (max(resize, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), image


def mean_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, of pixels from 0 to 1.

    Args:
      histogram: [3, 256], how many pixels have each value.
    """
    levels = np.arange(256) / 255
    weights = histogram / histogram.sum(1, keepdims=True)
    mean = weights @ levels
    return mean.tolist(), np.sqrt(weights @ levels**2 - mean**2).tolist()
