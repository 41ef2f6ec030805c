"""From a source to batches of this host's rows, in an order that (seed, step) decides.

The global batches are consecutive stretches of an endless shuffled sequence of record indices. A
host decodes only its own rows of them, and what is random about an example depends on its place in
the sequence alone. So batches are the same for any number of hosts, threads and processes, and a
run resumes at any step with nothing saved.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import bad_images, bands, settings, transforms
from mae_jax.data.bands import BadImage
from mae_jax.data.sources import Source, Unreadable
from mae_jax.data.workers import read_ahead
from mae_jax.errors import UserError

MAX_DRAWS = 100  # attempts to find a readable record in place of an unreadable one

Batch = dict[str, np.ndarray]
Example = dict[str, Any]  # arrays and numbers of one record, `image` among them
Make = Callable[[int, np.random.Generator], Example]


def train_batches(
    source: Source,
    data: ConfigDict,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    seed: int,
    start_step: int = 0,
    rows: np.ndarray | None = None,
    make: Make | None = None,
) -> Iterator[Batch]:
    """Return endless batches for training, the first being that of step `start_step`.

    Every epoch is a new permutation of the source, cut to whole batches.

    Args:
      data: config.data, after `settings.check`.
      batch_size: images in the global batch.
      image_size: (height, width).
      channels: of the images; see `decode.decode`.
      seed: of the order and of the augmentation.
      start_step: how many batches are passed over, at no cost.
      rows: which rows of the global batch to load, sorted; None = all.
      make: (index of a record, random numbers) -> the arrays of an example, one of them `image`;
        raises BadImage, before it draws a number, if the record cannot be read. None = `augmented`.

    Returns:
      Dicts of image: uint8 [rows, H, W, C], float32 with data.value_range; label: int32 [rows],
      -1 = none; index: int32 [rows], of the record in the source; bad: int32 [rows], -1, or the
      record that should have stood here but cannot be read, and was replaced by one drawn at
      random.

    Raises:
      UserError: see `steps_per_epoch`; while iterating: no readable record was found.
    """
    rows = np.arange(batch_size) if rows is None else rows
    dtype = bands.pixel_type(data.get("value_range", ()))
    if data.get("synthetic"):
        return synthetic_batches(rows, image_size, channels, dtype)
    make = make or augmented(source, data, image_size, channels)

    def load(index: int, rng: np.random.Generator) -> Example:
        drawn, bad, first = index, -1, None
        for _ in range(MAX_DRAWS):
            try:
                return numbered(make(index, rng), index, bad)
            except BadImage as error:
                first = first or error
                bad, index = drawn, int(rng.integers(len(source)))
        raise Unreadable(
            f"{MAX_DRAWS} images drawn one after another cannot be read, the first being"
            f" {source[drawn]['name']}: {first}"
        )

    per_epoch = steps_per_epoch(len(source), batch_size) * batch_size
    order = grain.MapDataset.range(len(source)).seed(seed % 2**32)
    # random_map seeds by place in the endless sequence, so it comes before any choice of steps and
    # rows. Everything is lazy: what is not chosen is not read.
    examples = order.shuffle()[:per_epoch].repeat().random_map(load)[start_step * batch_size :]
    return read_ahead(
        examples, batch_size, rows, (*image_size, channels), data.workers, len(source), dtype
    )


def augmented(source: Source, data: ConfigDict, image_size: tuple[int, int], channels: int) -> Make:
    """Return a `make` that reads a labelled image, cropped and augmented as config.data says."""
    dtype = bands.pixel_type(data.get("value_range", ()))
    shape = (*image_size, channels)
    crop, flip, augment = settings.make_crop(data), data.flip, settings.make_augment(data)

    def checked(image: np.ndarray, key: str) -> np.ndarray:
        found = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
        if found != (dtype, shape):  # of a fork's function
            raise UserError(
                f"config.data.{key}={data[key]!r} returned {found[0]}{[*found[1]]}: it must return"
                f" {np.dtype(dtype)}{[*shape]}"
            )
        return image

    def make(index: int, rng: np.random.Generator) -> Example:
        record, picture = bad_images.read(source, index, channels, dtype)
        image = checked(crop(picture, image_size, rng), "crop")
        image = transforms.random_flip(image, flip, rng)
        if augment is not None:
            image = checked(augment(image, rng), "augment")
        return {"image": image, "label": np.int32(record["label"])}

    return make


def synthetic_batches(
    rows: np.ndarray,
    image_size: tuple[int, int],
    channels: int,
    dtype: type[np.number] = np.uint8,
) -> Iterator[Batch]:
    """Yield one random batch for ever, without labels, to tell a slow model from slow input."""
    shape = (len(rows), *image_size, channels)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8).astype(dtype)
    none = np.full(len(rows), -1, np.int32)
    while True:
        yield {"image": image, "label": none, "index": rows.astype(np.int32), "bad": none}


def numbered(example: Example, index: int, bad: int) -> Example:
    """Return an example with its `index`, and in `bad` the record that it replaces, or -1."""
    return example | {"index": np.int32(index), "bad": np.int32(bad)}


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the number of whole batches in an epoch: the incomplete last one is dropped.

    Raises:
      UserError: there are fewer examples than one batch has.
    """
    if num_examples < batch_size:
        raise UserError(
            f"the dataset has {num_examples:,} images, fewer than one batch of {batch_size:,}:"
            f" set config.batch_size to at most {num_examples:,}, or add images"
        )
    return num_examples // batch_size
