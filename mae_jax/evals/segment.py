"""Segmentation of whole images by a trained head, at the resolution of their label maps.

An image is resized, its aspect kept, to the smallest size that covers the network's, and windows of
that size slide over it. The logits of a window are enlarged bilinearly; where windows overlap, they
are averaged; their mean is enlarged to the original size, and each pixel gets the class of the
largest. All of this but the network is linear and separable, and done by one matrix for the rows
and one for the columns of each window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import distributed
from mae_jax.data import bands, label_maps, segmentation, transforms
from mae_jax.data.labels import require_disjoint
from mae_jax.data.segmentation import Pair
from mae_jax.data.workers import usable_cores
from mae_jax.errors import UserError
from mae_jax.evals import Report, figures, iou, segment_figures
from mae_jax.evals.features import Batches

AT_A_TIME = 2**25  # the most logits that are enlarged at a time


class Axis(NamedTuple):
    """The rows or the columns of an image: where windows begin, and how their logits spread."""

    starts: list[int]  # of the windows, in pixels of the resized image
    spread: np.ndarray  # (windows, pixels of the original, patches of a window), float32


def linear(old: int, new: int) -> np.ndarray:
    """Return the matrix (new, old) that resizes `old` numbers bilinearly to `new`, without blur."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    left = np.minimum(position.astype(int), max(old - 2, 0))
    matrix = np.zeros((new, old))
    matrix[np.arange(new), left] = 1 - (position - left)
    matrix[np.arange(new), np.minimum(left + 1, old - 1)] += position - left
    return matrix


def make_axis(original: int, resized: int, window: int, patches: int, stride: float) -> Axis:
    """Return the windows along one side of an image.

    Args:
      original, resized: pixels of the side, before and after the image is resized.
      window, patches: pixels and patches of a window.
      stride: from one window to the next at most, as a share of the window.
    """
    count = -(-(resized - window) // max(int(window * stride), 1)) + 1
    starts = np.linspace(0, resized - window, count).round().astype(int).tolist()
    placed = np.zeros((count, resized, patches))
    for rows, start in zip(placed, starts, strict=True):
        rows[start : start + window] = linear(patches, window)
    windows_over = (placed.sum(-1) > 0.5).sum(0)
    spread = linear(resized, original) @ (placed / windows_over[:, None])
    return Axis(starts, spread.astype(np.float32))


def decide(logits: np.ndarray, rows: Axis, columns: Axis) -> np.ndarray:
    """Return the class of each pixel of the original image, uint8 [H, W].

    Args:
      logits: (windows down, windows across, rows, columns, Y) of their patches.
    """
    classes, width = logits.shape[-1], columns.spread.shape[1]
    # (down, rows, W, Y): the columns first, since the height is then cut into pieces.
    across = np.einsum("ijrcy,jwc->irwy", logits, columns.spread, optimize=True)
    across = across.reshape(-1, width * classes)
    height = rows.spread.shape[1]
    matrix = rows.spread.transpose(1, 0, 2).reshape(height, -1)
    piece = max(AT_A_TIME // (width * classes), 1)
    return np.concatenate(
        [
            (matrix[i : i + piece] @ across).reshape(-1, width, classes).argmax(-1)
            for i in range(0, height, piece)
        ]
    ).astype(np.uint8)


class Windows:
    """Segmentation of images by windows of a network's size that slide over them.

    Args:
      compute: (params, extra, batch) -> logits of patches (B, rows, columns, Y).
      batch_size: images at a time, over all hosts.
      stride: from one window to the next at most, as a share of the window.
    """

    def __init__(
        self, config: ConfigDict, compute: Callable, mesh: Mesh, batch_size: int, stride: float
    ):
        model = config.model
        self._channels, self._stride = model.channels, stride
        self.size, self._patch = tuple(model.image_size), tuple(model.patch_size)
        self._dtype = bands.pixel_type(config.data.get("value_range", ()))
        self.batches = Batches(config, mesh, batch_size)
        self._logits = jax.jit(compute, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, state: Any, pairs: Sequence[Pair | None]) -> list[np.ndarray | None]:
        """Return the class of each pixel of each image; there are as many as rows of this host.

        Every call of the network takes one window of each image of the batch, so that all hosts
        make the same number of calls of the same shape.
        """
        axes = [self._axes(pair) if pair else None for pair in pairs]
        windows = [
            list(self._cut(pair, *axis)) if pair and axis else []
            for pair, axis in zip(pairs, axes, strict=True)
        ]
        most = np.int32(max((len(x) for x in windows), default=0))
        blank = np.zeros((*self.size, self._channels), self._dtype)
        found = []
        for number in range(int(multihost_utils.process_allgather(most).max())):
            image = np.stack([x[number] if number < len(x) else blank for x in windows])
            arrays = self.batches.put({"image": image})
            logits = self._logits(state.params, state.extra, arrays)
            found.append(np.asarray(logits)[self.batches.rows])
        maps: list[np.ndarray | None] = []
        for i, axis in enumerate(axes):
            if axis is None:
                maps.append(None)
                continue
            down, across = (len(x.starts) for x in axis)
            logits = np.stack([x[i] for x in found[: down * across]])
            maps.append(decide(logits.reshape(down, across, *logits.shape[1:]), *axis))
        return maps

    def _axes(self, pair: Pair) -> tuple[Axis, Axis]:
        """Return the rows and the columns of an image."""
        factor = max(w / side for w, side in zip(self.size, pair.map.shape, strict=True))
        rows, columns = (
            make_axis(side, max(round(side * factor), w), w, w // p, self._stride)
            for side, w, p in zip(pair.map.shape, self.size, self._patch, strict=True)
        )
        return rows, columns

    def _cut(self, pair: Pair, rows: Axis, columns: Axis) -> Iterator[np.ndarray]:
        """Yield the windows of an image, row by row."""
        height, width = pair.map.shape
        window_h, window_w = self.size
        box = (0, 0, width, height)
        size = columns.starts[-1] + window_w, rows.starts[-1] + window_h
        image = transforms.resize_pillow(pair.image, box, *size)
        for top in rows.starts:
            for left in columns.starts:
                yield image[top : top + window_h, left : left + window_w]


class Evaluator:
    """Segmentation of every image of a split once, by the task's "segmentation".

    Every host reads and decides its own rows of a batch of images.

    Args:
      cfg: `stride` (of the windows, as a share of their size), `classes`, `ignore`, `shift` and
        `palette` where they are not those of config.data; optional `of_training_images`.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        data, model = config.data, config.model
        if "segmentation" not in predict:
            raise UserError(f"{cfg.type}: this task does not segment")
        meaning = label_maps.meaning(cfg, data)
        source = cfg.source or data.source
        self._source = segmentation.open_pairs(meaning, source, cfg.split)
        trained = segmentation.open_pairs(data, data.source, data.split)
        if self._source.class_names != trained.class_names:
            raise UserError(f"{cfg.type}: {source} has other classes than {data.source}")
        if not cfg.get("of_training_images", False):
            require_disjoint(
                f"{cfg.type}: split={cfg.split!r} and config.data.split={data.split!r}",
                self._source,
                trained,
                "it would be measured on what is trained on: give another split",
            )
        self._dtype = bands.pixel_type(data.get("value_range", ()))
        segmentation.look_at(self._source, model.channels, self._dtype)
        self._cfg, self._channels = cfg, model.channels
        compute = predict["segmentation"]
        self._windows = Windows(config, compute, mesh, cfg.batch_size, cfg.stride)
        self._about = {
            "source": source,
            "split": cfg.split,
            "label_resolution": "that of each label map",
            "window": list(self._windows.size),
            "stride": cfg.stride,
        }

    def run(self, state: Any) -> Report:
        """Return {prefix}/miou, pixel_accuracy and images, and the files of `iou.report`."""
        names = self._source.class_names
        counts, images = np.zeros((len(names), len(names) + 1), int), 0
        shown: list[tuple[np.ndarray, ...]] = []
        for pairs in self._read():
            distributed.raise_if_stopping()
            for pair, predicted_HW in zip(pairs, self._windows(state, pairs), strict=True):
                if pair is None or predicted_HW is None:
                    continue
                counts += iou.confusion(pair.map, predicted_HW, len(names))
                images += 1
                if len(shown) < figures.PICTURES:
                    shown.append(small(pair, predicted_HW, self._windows.size))
        counts, images = add_up(counts), int(add_up(np.array(images)))
        pictures = {}
        if shown and jax.process_index() == 0:
            caption = f"Step {int(state.step):,}. {self._about['source']}, {self._about['split']}."
            image, truth, predicted = (np.stack(x) for x in zip(*shown, strict=True))
            sheet = segment_figures.sheet(image, truth, predicted, names, caption)
            pictures[self._cfg.type] = sheet
        prefix, about = self._cfg.get("prefix", "eval"), self._about | {"images": images}
        report = iou.report(prefix, "", {"": counts}, about, names, pictures)
        return report._replace(scalars={**report.scalars, f"{prefix}/images": float(images)})

    def _read(self) -> Iterator[list[Pair | None]]:
        """Yield this host's rows of each batch of images; None for padding and what is unreadable.

        One batch is read while another is computed.
        """
        batches, count = self._windows.batches, len(self._source)

        def read(index: int) -> Pair | None:
            if index >= count:
                return None
            try:
                return segmentation.read(self._source, index, self._channels, self._dtype)
            except bands.BadImage:
                return None

        with ThreadPoolExecutor(usable_cores()) as pool:
            ahead = None
            for start in range(0, count, batches.size):
                futures = [pool.submit(read, int(start + row)) for row in batches.rows]
                if ahead:
                    yield [future.result() for future in ahead]
                ahead = futures
            yield [future.result() for future in ahead or ()]


def small(pair: Pair, predicted_HW: np.ndarray, size_HW: Any) -> tuple[np.ndarray, ...]:
    """Return image, truth and prediction, stretched to a size for a picture."""
    drawn = segmentation.stretch(Pair(pair.image, predicted_HW), size_HW).map
    image, truth = segmentation.stretch(pair, size_HW)
    return image, truth, drawn


def add_up(counts: np.ndarray) -> np.ndarray:
    """Return the exact sum of an int64 table over the hosts, sent as two halves of 31 bits."""
    low, high = (counts & (2**31 - 1)).astype(np.int32), (counts >> 31).astype(np.int32)
    both = multihost_utils.process_allgather(np.stack([low, high]))
    low, high = both.reshape(-1, 2, *counts.shape).astype(np.int64).sum(0)
    return low + (high << 31)
