"""Batches of images with label maps: cropped, resized and mirrored together.

What moves pixels is done to both; a map is always resized to the nearest pixel. In a batch `map`
is uint8 [rows, H, W]: class numbers, and `label_maps.IGNORED`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.random import Generator

from mae_jax.data import (
    bad_images,
    bands,
    distortion,
    eval_pipeline,
    label_maps,
    pipeline,
    segfolder,
    sources,
    transforms,
)
from mae_jax.data.bands import BadImage
from mae_jax.data.decode import Picture
from mae_jax.data.label_maps import IGNORED, Legend
from mae_jax.data.segfolder import PairSource
from mae_jax.errors import UserError

PREFIX = "segfolder:"
LOOKED_AT = 32  # pairs, evenly spaced, that are read before anything is written
MAX_SHARE = 0.75  # of a training crop: no class should fill more, if others can be had
TRIES = 10  # to draw such a crop

Size = tuple[int, int]


class Pair(NamedTuple):
    """An image and the class of each of its pixels."""

    image: Picture  # [H, W, C]
    map: np.ndarray  # uint8 [H, W]


def open_pairs(data: Any, source: str, split: str) -> PairSource:
    """Open the pairs of a source, whose labels mean what config.data says.

    Raises:
      UserError: there are none, or the meaning of the labels is not known.
    """
    if source.startswith("counted:"):  # no files: to plan a run by
        images = sources.open_source(source, split)
        classes = data.get("classes", 0) or images.num_classes or 0
        return PairSource(images, [], Legend.from_config({"classes": classes}))
    if not source.startswith(PREFIX):
        raise UserError(
            f"{source!r} has no label maps, which are needed here: give segfolder:PATH, with"
            " PATH/SPLIT/images and PATH/SPLIT/labels"
        )
    return segfolder.open_pairs(source.removeprefix(PREFIX), split, data)


def read(source: PairSource, index: int, channels: int, dtype: type[np.number]) -> Pair:
    """Return a pair of a source.

    Raises:
      BadImage: the image or the map cannot be read, or no pixel has a class.
      UserError: their sizes differ, or the map holds a number or colour of no class.
    """
    record, picture = bad_images.read(source, index, channels, dtype)
    if picture.shape[:2] != record["map"].shape:
        (height, width), (map_height, map_width) = picture.shape[:2], record["map"].shape
        raise UserError(
            f"{record['name']} has {width} x {height} pixels and its label map {map_width} x"
            f" {map_height}: both must have the same size; a map must never be interpolated"
        )
    return Pair(picture, record["map"])


def look_at(source: PairSource, channels: int, dtype: type[np.number]) -> None:
    """Read some pairs, so that wrong labels are found before a run begins.

    Raises:
      UserError: see `read`; or none of these pairs can be read.
    """
    if not source.maps:
        return  # counted examples without files
    bad_images.require_bands(source.images, channels, dtype)
    indices = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).round().astype(int)).tolist()
    reasons = []
    for index in indices:
        try:
            read(source, index, channels, dtype)
        except BadImage as error:
            reasons.append(f"{source.images[index]['name']}: {error}")
    if len(reasons) == len(indices):
        raise UserError(f"none of {len(indices)} pairs looked at can be used; {reasons[0]}")


def stretch(pair: Pair, size_HW: Size) -> Pair:
    """Resize a whole pair to a size, whatever its aspect."""
    height, width = pair.map.shape
    return _resize(pair, (0, 0, width, height), *size_HW)


def random_crop(
    pair: Pair,
    size_HW: Size,
    scales: tuple[float, float],
    rng: Generator,
    resizer: str = "pillow",
) -> Pair:
    """Cut a random part out of a pair that was resized by a random factor.

    The factor 1 makes the image as large as covers the crop; it is uniform in `scales`. Where the
    image is smaller than the crop, it is padded below and on the right, with grey and IGNORED. Up
    to ten places are drawn, until no class has more than 3/4 of the labelled pixels there (as
    DeepLab-style recipes do).
    """
    height, width = pair.map.shape
    factor = max(size_HW[0] / height, size_HW[1] / width) * rng.uniform(*scales)
    sides = []  # (pixels of the crop, pixels of the image that become them)
    for crop, side in zip(size_HW, (height, width), strict=True):
        covered = min(crop, max(round(side * factor), 1))
        sides.append((covered, side if covered < crop else min(max(round(crop / factor), 1), side)))
    (out_height, box_height), (out_width, box_width) = sides
    for _ in range(TRIES):
        top = int(rng.integers(height - box_height + 1))
        left = int(rng.integers(width - box_width + 1))
        count = np.bincount(
            pair.map[top : top + box_height, left : left + box_width].ravel(), minlength=256
        )[:IGNORED]
        if np.count_nonzero(count) > 1 and count.max() < MAX_SHARE * count.sum():
            break
    part = _resize(pair, (left, top, box_width, box_height), out_height, out_width, resizer)
    return _pad(part, size_HW)


def flip(pair: Pair, probability: float, rng: Generator) -> Pair:
    """Mirror a pair left and right, with this probability."""
    if rng.random() >= probability:
        return pair
    return Pair(*(np.ascontiguousarray(x[:, ::-1]) for x in pair))


def _resize(
    pair: Pair, box: transforms.Box, height: int, width: int, resizer: str = "pillow"
) -> Pair:
    return Pair(
        transforms.RESIZERS[resizer](pair.image, box, width, height),
        label_maps.resize(pair.map, box, width, height),
    )


def _pad(pair: Pair, size_HW: Size) -> Pair:
    rows, columns = (size - side for size, side in zip(size_HW, pair.map.shape, strict=True))
    if not rows and not columns:
        return pair
    around = ((0, rows), (0, columns))
    grey = pair.image.mean(dtype=np.float64).astype(pair.image.dtype)
    return Pair(
        np.pad(pair.image, (*around, (0, 0)), constant_values=grey),
        np.pad(pair.map, around, constant_values=IGNORED),
    )


def train_batches(
    source: PairSource, data: ConfigDict, *, image_size: Size, channels: int, **order: Any
) -> Iterator[pipeline.Batch]:
    """Return endless batches for training, in the order and with the promises of `pipeline`.

    Args:
      order: see `pipeline.train_batches`.

    Returns:
      Dicts of image [rows, H, W, C], map uint8 [rows, H, W], index and bad int32 [rows].
    """
    dtype = bands.pixel_type(data.get("value_range", ()))
    scales, resizer = tuple(data.scales), data.resizer

    def make(index: int, rng: Generator) -> pipeline.Example:
        pair = read(source, index, channels, dtype)
        pair = random_crop(pair, image_size, scales, rng, resizer)
        image, map_HW = flip(pair, data.flip, rng)
        if data.distort:
            image = distortion.photometric(image, rng)
        return {"image": image, "map": map_HW}

    order |= dict(image_size=image_size, channels=channels, make=make)
    batches = pipeline.train_batches(source, data, **order)
    if data.get("synthetic"):
        return (x | {"map": np.zeros(x["image"].shape[:3], np.uint8)} for x in batches)
    return batches


def eval_batches(
    source: PairSource,
    *,
    batch_size: int,
    image_size: Size,
    channels: int,
    rows: np.ndarray | None = None,
    workers: int = -1,
    dtype: type[np.number] = np.uint8,
) -> Iterator[pipeline.Batch]:
    """Return every pair once, in order, stretched to the size; see `eval_pipeline.eval_batches`.

    Padding, and what cannot be read, is black and has no labelled pixel.
    """
    blank = {
        "image": np.zeros((*image_size, channels), dtype),
        "map": np.full(image_size, IGNORED, np.uint8),
    }

    def make(index: int) -> pipeline.Example:
        return stretch(read(source, index, channels, dtype), image_size)._asdict()

    options: dict[str, Any] = dict(batch_size=batch_size, rows=rows, workers=workers)
    return eval_pipeline.ordered_batches(source, make, blank, **options)
