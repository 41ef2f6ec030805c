"""Images in one .npy file of uint8, (images, height, width, channels), read without copying it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_jax.data import splits
from mae_jax.errors import UserError


@dataclass(frozen=True)
class ArraySource:
    """A `mae_jax.data.sources.Source`: images by number, without labels."""

    path: str
    numbers: np.ndarray  # rows of the file
    ranges: splits.Ranges  # tell which sources share images
    num_classes: int | None = None
    class_names: list[str] | None = None

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        row = self.numbers[index]
        # Opened each time: threads and processes need no copy, and share the pages of the file.
        image = np.load(self.path, mmap_mode="r")[row]
        return {"image": np.array(image), "label": -1, "name": f"{self.path} #{row}"}


def open_arrays(path, split):
    """Return the images of config.data.split; `path` is what follows the colon of data.source."""
    if not Path(path).is_file():
        raise UserError(f"data source arrays:{path}: there is no such file")
    parts = splits.parse(split, {"train": len(np.load(path, mmap_mode="r"))}, path)
    numbers = np.concatenate([np.arange(first, end) for _, first, end in parts])
    return ArraySource(path, numbers, splits.locate(parts, path))
