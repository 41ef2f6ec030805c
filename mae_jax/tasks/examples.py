"""The images that most tasks are trained on, with or without labels, and how they are read."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import bad_images, bands, pipeline, settings
from mae_jax.data.labels import open_labelled, require_labels
from mae_jax.data.sources import Source, open_source
from mae_jax.errors import UserError
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
        settings.check(data, spec.channels)
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
