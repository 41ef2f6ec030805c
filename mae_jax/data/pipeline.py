"""From a source to uint8 batches of this host's rows, in an order that (seed, step) decides.

A global batch is a stretch of an endless shuffled sequence of record indices. Each host decodes
only its own rows of it, and a crop depends on the place in the sequence, not on who makes it:
batches are the same for any number of hosts and after any resume, and nothing has to be saved.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mae_jax.config import nearest
from mae_jax.data import transforms
from mae_jax.data.sources import Source
from mae_jax.data.transforms import BadImage, decode

CROPS = ("random_resized", "fixed", "center")
REPLACEMENTS = 100  # records tried in place of one that cannot be read


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the incomplete one is dropped.

    Raises:
      ValueError: there is not even one.
    """
    if num_examples < batch_size:
        raise ValueError(
            f"the dataset has {num_examples} images, fewer than one batch of {batch_size}: choose"
            f" config.batch_size of at most {num_examples}, or add images"
        )
    return num_examples // batch_size


def check(data: ConfigDict) -> None:
    """Raises ValueError for a value of config.data that cannot work."""
    if data.crop not in CROPS:
        raise ValueError(f"config.data.crop={data.crop!r} is unknown{nearest(data.crop, [*CROPS])}")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"config.data.crop_scale={(low, high)}: wants 0 < low <= high <= 1")
    low, high = data.crop_ratio
    if not 0 < low <= high:
        raise ValueError(f"config.data.crop_ratio={(low, high)}: wants 0 < low <= high")
    if not 0 <= data.flip <= 1:
        raise ValueError(f"config.data.flip={data.flip} is no probability")
    if data.threads < 1 or data.workers < 0 or data.prefetch < 1:
        raise ValueError(
            f"config.data: threads={data.threads} and prefetch={data.prefetch} must be at least 1,"
            f" workers={data.workers} at least 0"
        )


@dataclasses.dataclass(frozen=True)
class Load:
    """Record index to example: read, decode, crop; an unreadable record is replaced by the next."""

    source: Source
    image_size: tuple[int, int]
    channels: int
    crop: str
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        bad = -1
        for attempt in range(min(REPLACEMENTS, len(self.source))):
            found = (index + attempt) % len(self.source)
            record = self.source[found]
            try:
                picture = decode(record["image"], self.channels)
                break
            except BadImage:
                bad = index
        else:
            raise ValueError(
                f"{REPLACEMENTS} records from number {index} on cannot be read, such as"
                f" {record['name']}: {reason(self.source, index, self.channels)}"
            )
        if self.crop == "random_resized":
            picture = transforms.random_resized(
                picture, self.image_size, self.scale, self.ratio, rng
            )
        elif self.crop == "fixed":
            picture = transforms.fixed(picture, self.image_size, rng)
        else:
            picture = transforms.center(picture, self.image_size)
        if rng.random() < self.flip:
            picture = transforms.flip(picture)
        return {
            "image": transforms.to_array(picture),
            "label": np.int32(record["label"]),
            "index": np.int32(found),
            "bad": np.int32(bad),
        }


class Rows(grain.MapDataset):
    """The given rows of every global batch, from batch `start` on."""

    def __init__(self, parent: Any, batch_size: int, rows: np.ndarray, start: int):
        super().__init__(parent)
        self._batch_size, self._rows, self._start = batch_size, rows, start

    def __len__(self) -> int:
        return max(len(self._parent) // self._batch_size - self._start, 0) * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, len(self._rows))
        return self._parent[(self._start + batch) * self._batch_size + int(self._rows[row])]


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
    """Endless training batches; the first is that of step `start_step`.

    Every epoch is a new permutation of the source, cut to whole batches.

    Args:
      rows: the rows of the global batch of `batch_size` that this host wants; None = all.

    Yields:
      image: uint8 [rows, H, W, C]; label, index (of the record) int32 [rows]; bad int32 [rows], the
      index of an unreadable record that this row replaces, or -1.

    Raises:
      ValueError: see `check` and `steps_per_epoch`.
    """
    check(data)
    rows = np.arange(batch_size) if rows is None else rows
    load = Load(
        source,
        tuple(image_size),
        channels,
        data.crop,
        tuple(data.crop_scale),
        tuple(data.crop_ratio),
        data.flip,
    )
    epoch = steps_per_epoch(len(source), batch_size) * batch_size
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()[:epoch].repeat()
    return _read(Rows(order.random_map(load), batch_size, rows, start_step), len(rows), data)


def eval_batches(
    source: Source,
    data: ConfigDict,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    rows: np.ndarray | None = None,
    limit: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, in order: centre crop, no flip; the last batch is filled up.

    All hosts get the same number of batches. Filled-up rows repeat the last image and have
    valid=False.

    Yields:
      as `train_batches`, and valid: bool [rows].
    """
    rows = np.arange(batch_size) if rows is None else rows
    count = len(source) if limit is None else min(limit, len(source))
    padded = -(-count // batch_size) * batch_size
    load = Load(source, tuple(image_size), channels, "center")
    # The shuffled order is not asked for; the seed only satisfies random_map.
    order = grain.MapDataset.range(padded).seed(0)
    examples = order.map(lambda i: min(i, count - 1)).random_map(load)
    batches = _read(Rows(examples, batch_size, rows, 0), len(rows), data)
    for number, batch in enumerate(batches):
        yield batch | {"valid": number * batch_size + rows < count}


def _read(examples: grain.MapDataset, batch_size: int, data: ConfigDict) -> Iterator[dict]:
    """Read ahead, in threads or in processes, keeping the order."""
    ahead = data.prefetch * batch_size
    if data.workers == 0:
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead)
        return iter(examples.to_iter_dataset(options).batch(batch_size))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags
    threads = max(data.threads // data.workers, 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2))
    processes = grain.MultiprocessingOptions(
        num_workers=data.workers, per_worker_buffer_size=max(data.prefetch // data.workers, 1)
    )
    return iter(examples.to_iter_dataset(options).batch(batch_size).mp_prefetch(processes))


def reason(source: Source, index: int, channels: int) -> str:
    """Why a record cannot be read."""
    record = source[index]
    try:
        decode(record["image"], channels)
    except BadImage as error:
        return record.get("unreadable", str(error))
    return "it can be read now"


class BadImageLog:
    """Counts the records that could not be read, and stops a run that has too many."""

    def __init__(self, source: Source, max_fraction: float, channels: int = 3):
        self._source, self._channels = source, channels
        self._limit = max_fraction * len(source)
        self._max_fraction = max_fraction
        self._seen: dict[int, str] = {}

    def add(self, bad: np.ndarray) -> list[str]:
        """Take the `bad` row of a batch; returns a line for each record that is new.

        Raises:
          ValueError: more distinct records than the fraction allows; they are listed.
        """
        lines = []
        for index in sorted({int(i) for i in bad if i >= 0} - self._seen.keys()):
            name = self._source[index]["name"]
            self._seen[index] = f"{name}: {reason(self._source, index, self._channels)}"
            lines.append(f"image replaced by the next one, {self._seen[index]}")
        if len(self._seen) > self._limit:
            listed = "\n  ".join([*self._seen.values()][:20] + ["..."] * (len(self._seen) > 20))
            raise ValueError(
                f"{len(self._seen)} of {len(self._source)} images cannot be read, more than"
                f" config.data.max_bad_fraction={self._max_fraction} allows:\n  {listed}\n"
                "Remove or mend them, or allow more."
            )
        return lines

    @property
    def count(self) -> int:
        """Distinct records so far."""
        return len(self._seen)
