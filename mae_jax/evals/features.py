"""Features of labelled images: computed in batches on the mesh, and kept there."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import sharding
from mae_jax.data import crops, pipeline, sources, transforms
from mae_jax.data.labels import open_labelled, require_disjoint, require_labels  # noqa: F401
from mae_jax.errors import UserError, nearest


class Features(NamedTuple):
    """Of a batch (B, ...) or of T batches (T, B, ...); B is split over the mesh."""

    x: Array  # (..., B, D) float32, or whatever is computed of each image
    label: Array  # (..., B) int32
    counted: Array  # (..., B) bool; False: padding, or an image that cannot be read


def feature_of(predict: Mapping[str, Callable], name: str) -> Callable[[Any, Any, dict], Array]:
    """The function that computes one of a task's features, (B, D): cls or mean."""

    def compute(params: Any, extra: Any, batch: dict) -> Array:
        found = predict["features"](params, extra, batch)
        if name not in found:
            raise UserError(f"there is no feature {name!r}{nearest(name, list(found))}")
        return found[name].astype(jnp.float32)

    return compute


class Extractor:
    """Computes features of sources on a mesh, each image once and whatever the batch size.

    Args:
      config: the whole config: what images look like and how they are read.
      compute: (params, extra, batch) -> (B, ...), such as `feature_of` gives.
      mesh: where the state lives.
      batch_size: of the global batch, rounded up to what the mesh divides.
      crop: of `pipeline.eval_batches`.

    Raises:
      UserError: batch_size is not positive; while running: a label is out of range.
    """

    def __init__(
        self,
        config: ConfigDict,
        compute: Callable[[Any, Any, dict], Array],
        mesh: Mesh,
        *,
        batch_size: int,
        crop: Callable[[transforms.Picture, tuple[int, int]], np.ndarray] = crops.center,
    ):
        if batch_size < 1:
            raise UserError(f"evaluation with batch_size={batch_size}: it must be at least 1")
        ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
        self.batch_size = -(-batch_size // ways) * ways
        self._config, self._mesh, self._crop = config, mesh, crop
        self._rows = sharding.host_rows(mesh, self.batch_size)

        self._compute = jax.jit(compute, out_shardings=sharding.batch_sharding(mesh))
        by_row: Any = NamedSharding(mesh, P(None, sharding.BATCH))
        self._stack = jax.jit(
            lambda *x: jax.tree.map(lambda *y: jnp.stack(y), *x),
            out_shardings=Features(by_row, by_row, by_row),
        )
        self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))

    def batches(self, state: Any, source: sources.Source) -> Iterator[Features]:
        """Of each batch of a source, in its order."""
        model, classes = self._config.model, source.num_classes or 0
        for batch in pipeline.eval_batches(
            source,
            batch_size=self.batch_size,
            image_size=tuple(model.image_size),
            channels=model.channels,
            rows=self._rows,
            crop=self._crop,
        ):
            local = {
                "image": batch["image"],
                "label": batch["label"],
                "counted": batch["valid"] & (batch["bad"] < 0),
            }
            require_labels(local["label"][local["counted"]], classes)
            arrays = sharding.put_batch(self._mesh, local, self.batch_size)
            x_BD = self._compute(state.params, state.extra, {"image": arrays["image"]})
            yield Features(x_BD, arrays["label"], arrays["counted"])

    def bank(self, state: Any, source: sources.Source) -> Features:
        """Of a whole source, (T, B, ...): every device keeps its rows of each batch."""
        return self._stack(*self.batches(state, source))

    def fetch(self, tree: Any) -> Any:
        """Global arrays as numpy arrays, on every host."""
        return jax.device_get(self._gather(tree))

    def table(self, state: Any, source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) and labels (N,) of the images that can be read, on every host."""
        batches = [self.fetch(batch) for batch in self.batches(state, source)]
        return (
            np.concatenate([batch.x[batch.counted] for batch in batches]),
            np.concatenate([batch.label[batch.counted] for batch in batches]),
        )


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some records of a source."""

    source: sources.Source
    indices: np.ndarray

    @property
    def num_classes(self) -> int | None:
        return self.source.num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self.source.class_names

    @property
    def ranges(self) -> sources.Ranges:
        return self.source.ranges

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]


def draw_per_class(source: sources.Source, count: int, channels: int, seed: int) -> Subset:
    """`count` readable images of each class, drawn at random, class by class.

    Reads records in a random order until it has them, and not all.

    Raises:
      UserError: a class has fewer; it is named.
    """
    classes, names = source.num_classes or 0, source.class_names or []
    chosen: list[list[int]] = [[] for _ in range(classes)]
    missing = classes * count
    for index in np.random.default_rng(seed).permutation(len(source)):
        if not missing:
            break
        record = source[int(index)]
        label = record["label"]
        if not 0 <= label < classes or len(chosen[label]) == count or "unreadable" in record:
            continue
        try:
            transforms.decode(record["image"], channels)
        except transforms.BadImage:
            continue
        chosen[label].append(int(index))
        missing -= 1
    short = [
        f"{names[y]!r} has {len(found)}" for y, found in enumerate(chosen) if len(found) < count
    ]
    if short:
        raise UserError(
            f"{count} images of each class are wanted, and class {', '.join(short[:5])}"
            f"{', ...' if len(short) > 5 else ''} ({len(short)} of {classes} classes have too few):"
            " ask for fewer, or use a larger split"
        )
    return Subset(source, np.array([index for found in chosen for index in found]))
