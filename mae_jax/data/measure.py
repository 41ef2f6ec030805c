"""Measure the bands of a folder of TIFF or .npy files: mean, deviation, smallest and largest."""

from concurrent import futures
from typing import Any

import numpy as np

from mae_jax.data import bad_images, bands
from mae_jax.data.folder import FolderSource, open_folder
from mae_jax.data.pack import Progress
from mae_jax.errors import UserError


def measure_folder(
    path: str, value_range: tuple[float, float], workers: int, progress: Progress
) -> dict[str, Any]:
    """Return images, channels, low, high, mean, std and bad of the images that would be trained on.

    low and high are the values in the files; mean and std are of values scaled by `value_range`, as
    config.data takes them. bad is {name: why it cannot be read}; all others are of readable images.

    Raises:
      UserError: there is no folder, or no image with as many channels as the first can be read.
    """
    source = open_folder(path, "train")
    channels = count_channels(source)
    bad: dict[str, str] = {}
    statistics: list[tuple[np.ndarray, ...]] = []  # of each readable image

    def read(index: int) -> tuple[np.ndarray, ...] | str | None:
        try:
            picture = bad_images.read(source, index, channels, np.float32)[1]
        except bad_images.BadImage as error:
            return str(error)
        low, high = picture.min((0, 1)), picture.max((0, 1))
        scaled = (picture.astype(float) - value_range[0]) / (value_range[1] - value_range[0])
        return scaled.mean((0, 1)), np.square(scaled).mean((0, 1)), low, high

    with progress("images", len(source)) as advance, futures.ThreadPoolExecutor(workers) as pool:
        try:
            for index, result in enumerate(pool.map(read, range(len(source)))):
                if isinstance(result, tuple):
                    statistics.append(result)
                else:
                    bad[source[index]["name"]] = str(result)
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
    if not statistics:
        name, why = next(iter(bad.items()))
        raise UserError(f"folder:{path}: none of {len(bad):,} images can be read ({name}: {why})")
    mean, square, low, high = map(np.stack, zip(*statistics, strict=True))
    mean, square = mean.mean(0), square.mean(0)
    return {
        "images": len(statistics),
        "channels": channels,
        "low": low.min(0).tolist(),
        "high": high.max(0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
        "bad": bad,
    }


def count_channels(source: FolderSource) -> int:
    """Return the channels of the first TIFF or .npy file that can be read."""
    reason = "there is none"
    for record in map(source.__getitem__, range(len(source))):
        try:
            if bands.is_npy(record["image"]) or bands.is_tiff(record["image"]):
                return bands.read(record["image"]).shape[-1]
        except Exception as error:  # tifffile raises many kinds at damaged files
            reason = f"{record['name']}: {error}"
    raise UserError(f"folder:{source.root}: no TIFF or .npy file can be read ({reason})")
