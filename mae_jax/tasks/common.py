"""Pieces that several tasks share: batches for training, AdamW with its schedule, checks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import optim, optimizers, sharding
from mae_jax.config import steps
from mae_jax.data import bad_images, bands, pipeline
from mae_jax.data.labels import open_labelled, require_labels
from mae_jax.data.sources import Source, open_source
from mae_jax.errors import UserError
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.spec import ModelSpec


@dataclass(frozen=True)
class TrainImages:
    """The images that are trained on, and how they are read.

    Args:
      data: config.data.
      classes: how many classes their labels have; 0 = labels are not read.
    """

    source: Source
    data: ConfigDict
    spec: ModelSpec
    batch_size: int
    seed: int
    classes: int = 0

    @classmethod
    def from_config(cls, config: ConfigDict, spec: ModelSpec, labelled: bool) -> "TrainImages":
        """Open the source that config.data names.

        Raises:
          UserError: it cannot be opened or has no labels, or a value of config.data cannot work.
        """
        data = config.data
        pipeline.check(data)
        if config.batch_size % data.get("repeat", 1):
            raise UserError(
                f"batch_size={config.batch_size} is not divisible by config.data.repeat="
                f"{data.repeat}, the masks of each image: choose a multiple"
            )
        source = (open_labelled if labelled else open_source)(
            data.source, data.split, data.data_dir
        )
        bad_images.require_bands(source, spec.channels, bands.pixel_type(spec.value_range))
        classes = (source.num_classes or 0) if labelled else 0
        return cls(source, data, spec, config.batch_size, config.seed, classes)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of what a task reads of one example."""
        shape = (*self.spec.image_size, self.spec.channels)
        dtype = bands.pixel_type(self.spec.value_range)
        inputs = {"image": jax.ShapeDtypeStruct(shape, dtype)}
        if self.classes:
            inputs["label"] = jax.ShapeDtypeStruct((), np.int32)
        return inputs

    def batches(self, start_step: int, rows: np.ndarray) -> Iterator[tuple[dict, dict, list[str]]]:
        """Yield (these rows of a batch, scalars to report, lines to log) from `start_step` on.

        With data.repeat=M, which saves reading, an image that is read fills M rows of a batch.

        The scalar data/bad_images counts the unreadable images of this host since this start; of
        several hosts, the first reports its own count.
        """
        data, channels = self.data, self.spec.channels
        repeat = data.get("repeat", 1)
        images, copies = np.unique(rows // repeat, return_inverse=True)
        unreadable = bad_images.BadImageLog(
            self.source, data.max_bad_fraction, channels, bands.pixel_type(self.spec.value_range)
        )
        for batch in pipeline.train_batches(
            self.source,
            data,
            batch_size=self.batch_size // repeat,
            image_size=self.spec.image_size,
            channels=channels,
            seed=self.seed,
            start_step=start_step,
            rows=images,
        ):
            if self.classes and not data.get("synthetic"):
                require_labels(batch["label"], self.classes)
            lines = unreadable.add(batch["bad"])
            if repeat > 1:
                batch = {name: x[copies] for name, x in batch.items()}
            yield batch, {"data/bad_images": unreadable.count}, lines


def compute(model: ConfigDict, mesh: Mesh | None) -> ComputeConfig:
    """Return how config.model says that a network is run on a mesh; None = on JAX's first device.

    Raises:
      UserError: a value of config.model cannot work there.
    """
    if mesh is None:
        return ComputeConfig.from_config(model)
    constrain = sharding.constrain_batch(mesh)
    split_heads = mesh.shape["tensor"] > 1
    return ComputeConfig.from_config(model, constrain, mesh.devices.flat[0], split_heads)


def learning_rate(
    o: Mapping[str, Any], batch_size: int, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Return the schedule of config.optim: linear warm-up, then half a cosine, or `schedule`.

    Raises:
      UserError: there is no schedule of that name.
    """
    warmup = steps(o["warmup"], batch_size, steps_per_epoch)
    shape = optim.peak_lr(o["blr"], batch_size), total_steps, warmup, o["min_lr"]
    name = o.get("schedule", "cosine")
    if name == "cosine":
        return optim.cosine_schedule(*shape)
    if name != "wsd":
        raise UserError(f"config.optim.schedule={name!r}: give cosine or wsd")
    return optimizers.stable_decay(*shape, o.get("cooldown", 0.2))


def adamw(
    o: Mapping[str, Any],
    schedule: optax.Schedule,
    **rules: Any,
) -> optax.GradientTransformation:
    """Return the AdamW of config.optim; `rules` are `decayed` and `scales` of `optim.adamw`."""
    return optim.adamw(
        schedule,
        b1=o["b1"],
        b2=o["b2"],
        eps=o.get("eps", 1e-8),
        weight_decay=o["weight_decay"],
        **rules,
    )


def optimizer(
    o: Mapping[str, Any], schedule: optax.Schedule, **rules: Any
) -> optax.GradientTransformation:
    """Return the optimizer of config.optim: AdamW, or what `name` and `clip_norm` ask for.

    Args:
      rules: see `adamw`.

    Raises:
      UserError: there is no optimizer of that name.
    """
    if o.get("name", "adamw") == "adamw" and not o.get("clip_norm"):
        return adamw(o, schedule, **rules)
    return optimizers.by_name(o, schedule, **rules)


def refuse(key: str, value: Any, way_out: str) -> None:
    """Raise a UserError about config.KEY."""
    raise UserError(f"config.{key}={value!r}: {way_out}")
