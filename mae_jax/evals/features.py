"""Read images in global batches on a mesh, and compute features of each image once.

The numbers do not depend on the batch size, the devices and the hosts.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import distributed, sharding
from mae_jax.data import bad_images, bands, crops, eval_pipeline, labels, pipeline, segmentation
from mae_jax.data.decode import Picture
from mae_jax.data.segfolder import PairSource
from mae_jax.data.sources import Source
from mae_jax.errors import UserError, nearest

Compute = Callable[[Any, Any, dict], Any]  # (params, extra, batch) -> (B, ...), or a tree of such
Crop = Callable[[Picture, tuple[int, int]], np.ndarray]


def open_split(cfg: ConfigDict, config: ConfigDict, key: str = "split") -> Source:
    """Open the labelled images of cfg[key], a split of cfg.source ('' = the training source)."""
    return labels.open_labelled(cfg.source or config.data.source, cfg[key], config.data.data_dir)


def open_bank(cfg: ConfigDict, config: ConfigDict) -> tuple[Source, Source]:
    """Open the images of cfg.split and those of cfg.bank_split; none may be in both."""
    queries, bank = open_split(cfg, config), open_split(cfg, config, "bank_split")
    require_other_images(cfg, queries, bank)
    return queries, bank


def require_other_images(cfg: ConfigDict, queries: Source, bank: Source) -> None:
    """Raise UserError if an image of cfg.split is in cfg.bank_split too."""
    labels.require_disjoint(
        f"{cfg.type}: split={cfg.split!r} and bank_split={cfg.bank_split!r}",
        queries,
        bank,
        "images would be compared with themselves. Give other splits, such as 'train[80%:]' and"
        " 'train[:80%]'",
    )


def stacker(mesh: Mesh) -> Callable[..., Any]:
    """Return a function that stacks T batches (T, ...); each device keeps its own rows."""
    return jax.jit(
        lambda *batches: jax.tree.map(lambda *x: jnp.stack(x), *batches),
        out_shardings=NamedSharding(mesh, P(None, sharding.BATCH)),
    )


def fetch(tree: Any) -> Any:
    """Return global arrays as numpy arrays, on every host."""
    return multihost_utils.process_allgather(tree, tiled=True)


class Batches:
    """Batches of images in the size that config.model says.

    Args:
      batch_size: of the global batch, rounded up to what the mesh divides.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, batch_size: int):
        if batch_size < 1:
            raise UserError(f"evaluation with batch_size={batch_size}: it must be at least 1")
        ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
        self.size = -(-batch_size // ways) * ways
        self.rows = sharding.host_rows(mesh, self.size)
        self._mesh, self._channels = mesh, config.model.channels
        self._dtype = bands.pixel_type(config.data.get("value_range", ()))
        self._sizes: dict[str, Any] = dict(
            batch_size=self.size,
            image_size=tuple(config.model.image_size),
            channels=self._channels,
            rows=self.rows,
            workers=config.data.get("workers", -1),
            dtype=self._dtype,
        )

    def read(
        self, source: Source, crop: Crop = crops.center, limit: int | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Array]]]:
        """Yield each batch of a source twice: this host's rows, and all rows as global arrays.

        Both hold image, label, index and counted, which is False for padding and for an image that
        cannot be read. `crop` and `limit` are those of `eval_pipeline.eval_batches`.

        Raises:
          UserError: no image can be read; after the last batch, on every host.
        """
        batches = eval_pipeline.eval_batches(source, limit=limit, crop=crop, **self._sizes)
        return self._both(source, batches)

    def read_pairs(
        self, source: PairSource
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Array]]]:
        """Yield each batch of pairs twice, as `read` does; `map` takes the place of `label`."""
        return self._both(source, segmentation.eval_batches(source, **self._sizes))

    def _both(
        self, source: Source, batches: Iterator[pipeline.Batch]
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Array]]]:
        readable = 0
        for batch in batches:
            distributed.raise_if_stopping()
            local = {name: x for name, x in batch.items() if name not in ("valid", "bad")}
            local["counted"] = batch["valid"] & (batch["bad"] < 0)
            readable += int(local["counted"].sum())
            yield local, self.put(local)
        if not multihost_utils.process_allgather(np.int32(readable)).sum():
            first = bad_images.describe(source, 0, self._channels, self._dtype)
            raise UserError(f"no image can be read, nothing can be measured; the first is {first}")

    def put(self, local: dict[str, np.ndarray]) -> dict[str, Array]:
        """Return this host's rows as global arrays."""
        return sharding.put_batch(self._mesh, local, self.size)


class Features(NamedTuple):
    """Features of a batch (B, ...) or of T batches (T, B, ...); B is split over the mesh."""

    x: Any  # (..., B, D) float32, or whatever is computed of each image
    label: Array  # (..., B) int32
    counted: Array  # (..., B) bool; False: padding, or an image that cannot be read


def feature_of(predict: Mapping[str, Callable], name: str) -> Compute:
    """Return the function that computes one of a task's features, cls or mean, as (B, D)."""

    def compute(params: Any, extra: Any, batch: dict) -> Array:
        return predict["features"](params, extra, batch)[name].astype(jnp.float32)

    return compute


def block_numbers(cfg: ConfigDict, depth: int) -> tuple[int, ...]:
    """Return the blocks that cfg.layers names, from 1 to the last one, which is always among them.

    Raises:
      UserError: there are no such blocks.
    """
    layers = cfg.get("layers", "last")
    asked = list(range(1, depth + 1)) if layers == "all" else [depth]
    if layers not in ("all", "last"):
        asked = [int(x) if x.strip().isdecimal() else 0 for x in str(layers).split(",")]
    if not 1 <= min(asked) <= max(asked) <= depth:
        raise UserError(
            f"{cfg.type} with layers={layers!r}: give 'last', 'all', or numbers of blocks from"
            f" 1 to {depth}, such as '{depth // 2 or 1},{depth}'"
        )
    return tuple(sorted({*asked, depth}))


class Blocks(NamedTuple):
    """The blocks of an encoder whose features an evaluator measures, by cfg.layers.

    cfg.layers is "last" (also where the key is missing), "all", or numbers such as "4,8"; blocks
    count from 1, and the last is always among them.
    """

    numbers: tuple[int, ...]
    compute: Compute  # -> a list with the features (B, D) of each of them, all from one pass

    @classmethod
    def of(cls, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable]) -> "Blocks":
        """Return the blocks that config.evals.NAME asks for.

        Raises:
          UserError: there are no such blocks, or the task does not give features of blocks.
        """
        depth, layers = config.model.depth, cfg.get("layers", "last")
        if layers == "last":
            last = feature_of(predict, cfg.feature)
            return cls((depth,), lambda *args: [last(*args)])
        numbers = block_numbers(cfg, depth)
        if "block_features" not in predict:
            raise UserError(
                f"{cfg.type} with layers={layers!r}: there are no features of blocks here (pixels"
                " and classifiers have none): give layers='last'"
            )

        def compute(params: Any, extra: Any, batch: dict) -> list[Array]:
            x_MBD = predict["block_features"](params, extra, batch)[cfg.feature]
            return [x_MBD[number - 1].astype(jnp.float32) for number in numbers]

        return cls(numbers, compute)

    def metrics(self, name: str, values: Mapping[int, float]) -> dict[str, float]:
        """Return the last block's value as NAME, and with several blocks each as NAME_blockN."""
        several = {f"{name}_block{number}": values[number] for number in self.numbers}
        return {name: values[self.numbers[-1]]} | (several if len(several) > 1 else {})


def require_known(cfg: ConfigDict, source: Source, label: np.ndarray, classes: np.ndarray) -> None:
    """Raise UserError if a query has a class that is not among those of the bank."""
    if len(unknown := np.setdiff1d(label, classes)):
        raise UserError(
            f"{cfg.type}: no image of class {labels.names(source)[unknown[0]]!r} is in the"
            f" bank ({cfg.bank_split}), and some are among the queries ({cfg.split}): take a larger"
            " bank_split"
        )


def require_features(config: ConfigDict, task: Any) -> None:
    """Raise UserError if an evaluator wants a feature that the task does not give."""
    wanted = {name: cfg.feature for name, cfg in config.evals.items() if "feature" in cfg}
    if not wanted:
        return
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
        for name, x in task.examples.inputs.items()
    }
    features = jax.eval_shape(task.predict()["features"], *shapes, batch)
    for name, feature in wanted.items():
        if feature not in features:
            there = nearest(feature, features)
            raise UserError(f"config.evals.{name}.feature={feature!r}: there is no such{there}")


class Extractor:
    """The computation of features, or of anything else, for each image of a labelled source."""

    def __init__(self, config: ConfigDict, compute: Compute, mesh: Mesh, batch_size: int):
        self._batches = Batches(config, mesh, batch_size)
        self._compute = jax.jit(compute, out_shardings=sharding.batch_sharding(mesh))
        self._stack = stacker(mesh)

    def batches(self, state: Any, source: Source, crop: Crop = crops.center) -> Iterator[Features]:
        """Yield the features of each batch of a source, in its order."""
        for local, arrays in self._batches.read(source, crop):
            labels.require_labels(local["label"][local["counted"]], source.num_classes or 0)
            x_BD = self._compute(state.params, state.extra, {"image": arrays["image"]})
            yield Features(x_BD, arrays["label"], arrays["counted"])

    def bank(self, state: Any, source: Source) -> Features:
        """Return the features of a whole source (T, B, ...); each device keeps its own rows."""
        return self._stack(*self.batches(state, source))

    def rows(
        self, state: Any, source: Source, crop: Crop = crops.center
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the features and labels of each batch's readable images, on every host."""
        for batch in self.batches(state, source, crop):
            x, label, counted = fetch(batch)
            yield x[counted], label[counted]

    def table(self, state: Any, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Return features (N, D) and labels (N,) of the readable images, on every host."""
        x, label = zip(*self.rows(state, source), strict=True)
        return np.concatenate(x), np.concatenate(label)
