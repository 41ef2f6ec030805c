"""From a source to uint8 batches of this host's rows, in an order that (seed, step) decides.

The global batches are consecutive stretches of an endless shuffled sequence of record indices. A
host decodes only its own rows of them, and what is random about an example depends on its place in
the sequence alone: batches are the same for any number of hosts, of threads and of processes, and
after any resume, with nothing saved.
"""

import dataclasses
import inspect
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.config import resolve
from mae_jax.data import augment, transforms
from mae_jax.data.sources import Source, Unreadable
from mae_jax.data.transforms import BadImage, Picture
from mae_jax.errors import UserError, nearest

CROPS = ("random_resized", "probe", "fixed", "center")
MAX_DRAWS = 100  # in search of a readable record
SMALL = 2000  # a source of up to so many records is searched for all that is unreadable
LISTED = 50  # unreadable records in an error message
SHARED_MEMORY = Path("/dev/shm")


class WorkerLost(RuntimeError):
    """A process that reads images was killed; started again, the run goes on."""


Crop = Callable[[Picture, tuple[int, int], np.random.Generator], np.ndarray]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the incomplete one is dropped.

    Raises:
      UserError: there is not one whole batch.
    """
    if num_examples < batch_size:
        raise UserError(
            f"the dataset has {num_examples:,} images, fewer than one batch of {batch_size:,}:"
            f" set config.batch_size to at most {num_examples:,}, or add images"
        )
    return num_examples // batch_size


def check(data: ConfigDict) -> None:
    """Check config.data before anything is opened.

    Raises:
      UserError: a value that cannot work.
    """

    def refuse(name: str, wanted: str) -> None:
        raise UserError(f"config.data.{name}={data[name]!r}: {wanted}")

    make_crop(data)
    make_augment(data)
    for name in ("crop_scale", "crop_ratio"):
        if len(data[name]) != 2 or not 0 < data[name][0] <= data[name][1] < math.inf:
            refuse(name, "give two numbers (low, high) with 0 < low <= high")
    if data.crop_scale[1] > 1:
        refuse("crop_scale", "a crop has at most the area of its image, so that high is at most 1")
    if not all(0 < value < math.inf for value in data.std):
        refuse("std", "standard deviations are positive")
    for name in ("flip", "max_bad_fraction"):
        if not 0 <= data[name] <= 1:
            refuse(name, "give a number from 0 to 1")
    for name, least in (("workers", 0), ("threads", 1), ("prefetch", 1)):
        if data[name] < least:
            refuse(name, f"give at least {least}")


def make_crop(data: ConfigDict) -> Crop:
    """The crop that config.data.crop names: one of CROPS, or a dotted path to a `Crop`.

    Raises:
      UserError: there is no such crop, or it cannot resize as config.data.resizer says.
    """
    resizer = data.get("resizer", "pillow")
    if data.crop in ("random_resized", "probe"):
        _check_resizer(resizer)
        probe = data.crop == "probe"
        crop = transforms.probe_crop if probe else transforms.random_resized_crop
        scale, ratio = tuple(data.crop_scale), tuple(data.crop_ratio)
        return lambda picture, size, rng: crop(picture, size, scale, ratio, rng, resizer)
    if resizer != "pillow":
        raise UserError(
            f"config.data.resizer={resizer!r} is for the crops random_resized and probe, not for"
            f" {data.crop!r}: leave it at pillow"
        )
    if data.crop == "fixed":
        return transforms.fixed_crop
    if data.crop == "center":
        return lambda picture, size, rng: transforms.center_crop(picture, size)
    if "." in data.crop:
        own = resolve(data.crop, None)
        try:
            inspect.signature(own).bind("picture", "size", "rng")
        except TypeError as error:
            raise UserError(
                f"config.data.crop={data.crop!r} is no function (picture, (height, width), rng)"
                f" -> uint8 [H, W, C] ({error})"
            ) from error
        return own
    raise UserError(
        f"config.data.crop={data.crop!r} is no crop{nearest(data.crop, list(CROPS))}; or give a"
        " dotted path to a function (picture, (height, width), rng) -> uint8 [H, W, C]"
    )


def _check_resizer(name: str) -> None:
    if name not in transforms.RESIZERS:
        raise UserError(
            f"config.data.resizer={name!r}{nearest(name, list(transforms.RESIZERS))}: give one of"
            f" {', '.join(transforms.RESIZERS)}"
        )
    try:
        transforms.RESIZERS[name](Image.new("L", (1, 1)), (0, 0, 1, 1), 1, 1)
    except ImportError as error:
        raise UserError(
            f"config.data.resizer={name!r}: pip install cykooz-resizer, or leave it at pillow"
            f" ({error})"
        ) from error


def make_augment(data: ConfigDict) -> augment.RandAugment | None:
    """The RandAugment that config.data.augment names; '' or none: no augmentation after the flip.

    Raises:
      UserError: there is no such RandAugment.
    """
    name = data.get("augment", "")
    return augment.parse(name) if name else None


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
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches for training, the first being that of step `start_step`.

    Every epoch is a new permutation of the source, cut to whole batches.

    Args:
      source: what is read.
      data: config.data.
      batch_size: of the global batch.
      image_size: (height, width).
      channels: of the images; see `transforms.decode`.
      seed: of the order and of the augmentation.
      start_step: how many batches are passed over; costs nothing.
      rows: which rows of the global batch to load, sorted; None = all.

    Returns:
      Dicts of image: uint8 [rows, H, W, C]; label: int32 [rows], -1 = none; index: int32 [rows], of
      the record in the source; bad: int32 [rows], -1, or the record that should have stood here but
      cannot be read, and was replaced by one drawn at random.

    Raises:
      UserError: see `check` and `steps_per_epoch`; while iterating: no readable record was found.
    """
    check(data)
    rows = np.arange(batch_size) if rows is None else rows
    if data.get("synthetic"):
        return synthetic_batches(
            batch_size=batch_size, image_size=image_size, channels=channels, rows=rows
        )
    crop, flip, distort = make_crop(data), data.flip, make_augment(data)

    def load(index: int, rng: np.random.Generator) -> dict[str, Any]:
        drawn, bad = index, -1
        for _ in range(MAX_DRAWS):
            try:
                record, picture = _read(source, index, channels)
                break
            except BadImage:
                bad, index = drawn, int(rng.integers(len(source)))
        else:
            raise Unreadable(
                f"{MAX_DRAWS} images drawn one after another cannot be read, the first being"
                f" {_describe(source, drawn, channels)}"
            )
        image = transforms.random_flip(crop(picture, image_size, rng), flip, rng)
        if distort is not None:
            image = distort(image, rng)
        return _example(image, record["label"], index, bad)

    per_epoch = steps_per_epoch(len(source), batch_size) * batch_size
    order = grain.MapDataset.range(len(source)).seed(seed % 2**32)
    # random_map seeds by place in the endless sequence: rows are picked after it. Everything is
    # lazy, rows that are not picked are not read.
    examples = order.shuffle()[:per_epoch].repeat().random_map(load)
    local = _Rows(examples, batch_size, rows)[start_step * len(rows) :]
    num_bytes = len(rows) * math.prod(image_size) * channels
    return _batches(local, len(rows), data, num_bytes, data.workers)


def reported_batches(
    source: Source,
    config: ConfigDict,
    start_step: int,
    rows: np.ndarray,
    check_labels: Callable[[np.ndarray], None] = lambda labels: None,
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, float], list[str]]]:
    """`train_batches` of a whole config, each with its scalars and the lines to log.

    data/bad_images counts the unreadable records that this host met since this start: a resumed run
    begins again at 0, and of several hosts the first writes its own.

    Args:
      check_labels: is given the labels of every batch that was read (none are of a synthetic one).
    """
    stream = train_batches(
        source,
        config.data,
        batch_size=config.batch_size,
        image_size=tuple(config.model.image_size),
        channels=config.model.channels,
        seed=config.seed,
        start_step=start_step,
        rows=rows,
    )
    unreadable = BadImageLog(source, config.data.max_bad_fraction, config.model.channels)
    for batch in stream:
        if not config.data.get("synthetic"):
            check_labels(batch["label"])
        lines = unreadable.add(batch["bad"])
        yield batch, {"data/bad_images": unreadable.count}, lines


def eval_batches(
    source: Source,
    data: ConfigDict,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    rows: np.ndarray | None = None,
    limit: int | None = None,
    crop: Callable[[Picture, tuple[int, int]], np.ndarray] = transforms.center_crop,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, in order, by one crop, not flipped; the last batch is padded.

    Every host gets the same number of batches. Read in threads, whatever config.data.workers is.

    Args:
      limit: read only so many images, from the first on; None = all.
      crop: (picture, (height, width)) -> uint8 [H, W, C].
      Others as of `train_batches`.

    Returns:
      Dicts as of `train_batches`, and valid: bool [rows], False for padding, which is black with
      index 0. An image that cannot be read is black too, its index stands in `bad`.
    """
    rows = np.arange(batch_size) if rows is None else rows
    count = len(source) if limit is None else min(limit, len(source))
    black = np.zeros((*image_size, channels), np.uint8)

    def load(index: int) -> dict[str, Any]:
        if index >= count:
            return _example(black, -1, 0, -1) | {"valid": False}
        try:
            record, picture = _read(source, index, channels)
        except BadImage:
            return _example(black, -1, index, index) | {"valid": True}
        image = crop(picture, image_size)
        return _example(image, record["label"], index, -1) | {"valid": True}

    padded = -(-count // batch_size) * batch_size
    local = _Rows(grain.MapDataset.range(padded).map(load), batch_size, rows)
    return _batches(local, len(rows), data, len(rows) * black.size, workers=0)


def synthetic_batches(
    *, batch_size: int, image_size: tuple[int, int], channels: int, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The same random batch for ever, at no cost: tells a slow model from a slow input.

    Returns:
      Dicts as of `train_batches`, without labels.
    """
    rows = np.arange(batch_size) if rows is None else rows
    shape = (len(rows), *image_size, channels)
    none = np.full(len(rows), -1, np.int32)
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "label": none,
        "index": rows.astype(np.int32),
        "bad": none,
    }
    while True:
        yield dict(batch)


def _read(source: Source, index: int, channels: int) -> tuple[dict[str, Any], Picture]:
    record = source[index]
    if "unreadable" in record:
        raise BadImage(record["unreadable"])
    return record, transforms.decode(record["image"], channels)


def _describe(source: Source, index: int, channels: int) -> str | None:
    """'NAME: why it cannot be read', or None if it can be read."""
    try:
        _read(source, index, channels)
        return None
    except BadImage as error:
        return f"{source[index]['name']}: {error}"


def _example(image_HWC: np.ndarray, label: int, index: int, bad: int) -> dict[str, Any]:
    numbers = {"label": label, "index": index, "bad": bad}
    return {"image": image_HWC, **{name: np.int32(value) for name, value in numbers.items()}}


class _Rows(grain.MapDataset):
    """Of every `batch_size` elements of the parent, those at `rows`."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def _batches(
    examples: grain.MapDataset, size: int, data: ConfigDict, num_bytes: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `size` examples and `num_bytes` of pixels, read ahead and kept in order."""
    if not workers:
        options = grain.ReadOptions(
            num_threads=data.threads, prefetch_buffer_size=data.prefetch * size
        )
        batches = examples.to_iter_dataset(options).batch(size)
        # Copies the examples into batches in the background, too.
        return _closing(
            grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
        )

    ahead = -(-data.prefetch // workers)
    if SHARED_MEMORY.is_dir():  # processes that run out of it die of a bus error
        needed, free = (ahead + 2) * workers * num_bytes, shutil.disk_usage(SHARED_MEMORY).free
        if needed > free:
            raise UserError(
                f"config.data.workers={workers} needs {needed / 2**20:,.0f} MiB of shared memory,"
                f" {SHARED_MEMORY} has {free / 2**20:,.0f} free: set config.data.workers=0 (threads"
                " need none), lower workers or prefetch, or give the container more (docker run"
                " --shm-size)"
            )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags when it starts processes
    # Whole batches are made in each process: what is sliced among processes is what stands before
    # to_iter_dataset, and slicing examples would mix the batches.
    batches = examples.batch(size).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    return _closing(batches.mp_prefetch(options, worker_init_fn=_follow_parent))


def _follow_parent(worker: int, workers: int) -> None:
    """In a worker: leave signals, which may reach all, to the parent, and end when it does.

    The parent saves and then stops its workers; killed, it would leave them waiting for ever.
    """
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _closing(dataset: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    """Iterate, and stop threads and processes as soon as the iterator is dropped."""
    iterator = iter(dataset)
    try:
        yield from iterator
    except Unreadable as error:  # of another process, whose traceback says less than its words
        raise Unreadable(str(error)) from error
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise WorkerLost(
            "a process that reads images was killed, perhaps for its memory: lower"
            f" config.data.workers or config.data.prefetch ({error})"
        ) from error
    finally:
        iterator.close()


@dataclasses.dataclass
class BadImageLog:
    """Counts the records that turn out unreadable, and stops a run that meets too many."""

    source: Source
    max_bad_fraction: float
    channels: int = 3
    _found: dict[int, str] = dataclasses.field(default_factory=dict, init=False)

    @property
    def count(self) -> int:
        """Distinct unreadable records that were added; nothing of an earlier start is known."""
        return len(self._found)

    def add(self, bad: np.ndarray) -> list[str]:
        """Take a batch's `bad`; returns one line for each record that was not met before.

        Raises:
          UserError: there are more than `max_bad_fraction` of the source; they are listed.
        """
        new = sorted({int(index) for index in bad if index >= 0} - self._found.keys())
        for index in new:
            reason = _describe(self.source, index, self.channels)
            name = self.source[index]["name"]
            self._found[index] = reason or f"{name}: was unreadable for a moment"
        if new and self.count > self.max_bad_fraction * len(self.source):
            self._stop()
        return [f"unreadable, replaced by another image: {self._found[index]}" for index in new]

    def _stop(self) -> None:
        rest = range(len(self.source)) if len(self.source) <= SMALL else range(0)
        for index in rest:
            if index not in self._found:
                reason = _describe(self.source, index, self.channels)
                if reason:
                    self._found[index] = reason
        lines = [self._found[index] for index in sorted(self._found)]
        if len(lines) > LISTED:
            lines[LISTED:] = [f"... and {len(lines) - LISTED:,} more"]
        fraction = self.count / len(self.source)
        raise UserError(
            f"{self.count:,} of {len(self.source):,} images"
            + ("" if rest else " so far")
            + f" ({fraction:.2%}) cannot be read, more than"
            f" config.data.max_bad_fraction={self.max_bad_fraction} allows:\n  "
            + "\n  ".join(lines)
            + "\nRemove or replace them, or train without them:"
            f" --config.data.max_bad_fraction={math.ceil(fraction * 100) / 100}"
        )
