"""From a source to batches for evaluation: every example once, in order, the last batch padded.

Batches are read as in pipeline.py, with the same promises about hosts and processes.
"""

from collections.abc import Callable, Iterator

import grain
import numpy as np

from mae_jax.data import bad_images, crops
from mae_jax.data.bands import BadImage
from mae_jax.data.decode import Picture
from mae_jax.data.pipeline import Batch, Example, numbered
from mae_jax.data.sources import Source
from mae_jax.data.workers import read_ahead


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    rows: np.ndarray | None = None,
    limit: int | None = None,
    crop: Callable[[Picture, tuple[int, int]], np.ndarray] = crops.center,
    workers: int = -1,
    dtype: type[np.number] = np.uint8,
) -> Iterator[Batch]:
    """Return every image once, in order, by one crop, not flipped; the last batch is padded.

    Every host gets the same number of batches.

    Args:
      limit: read only this many images, the first ones; None = all.
      crop: (picture, (height, width)) -> [H, W, C].
      workers: config.data.workers.
      dtype: of the images; see `bands.pixel_type`.

    Returns:
      Dicts of image [rows, H, W, C]; label, index and bad: int32 [rows]; valid: bool [rows], False
      for padding, which is black with index 0. An image that cannot be read is black too, and its
      index stands in `bad`.
    """
    blank = {"image": np.zeros((*image_size, channels), dtype), "label": np.int32(-1)}

    def make(index: int) -> Example:
        record, picture = bad_images.read(source, index, channels, dtype)
        return {"image": crop(picture, image_size), "label": np.int32(record["label"])}

    return ordered_batches(
        source, make, blank, batch_size=batch_size, rows=rows, limit=limit, workers=workers
    )


def ordered_batches(
    source: Source,
    make: Callable[[int], Example],
    blank: Example,
    *,
    batch_size: int,
    rows: np.ndarray | None,
    limit: int | None = None,
    workers: int = -1,
) -> Iterator[Batch]:
    """Return batches in order, the last one padded, of the examples that `make` reads.

    Args:
      make: index of a record -> the arrays of an example, one of them `image`; raises BadImage if
        it cannot be read.
      blank: the example that stands for padding and for what cannot be read.
    """
    rows = np.arange(batch_size) if rows is None else rows
    count = len(source) if limit is None else min(limit, len(source))

    def load(index: int) -> Example:
        if index >= count:
            return numbered(blank, 0, -1) | {"valid": False}
        try:
            return numbered(make(index), index, -1) | {"valid": True}
        except BadImage:
            return numbered(blank, index, index) | {"valid": True}

    examples = grain.MapDataset.range(-(-count // batch_size) * batch_size).map(load)
    image = blank["image"]
    return read_ahead(examples, batch_size, rows, image.shape, workers, count, image.dtype.type)
