"""Test sets of robustness: the classes of ImageNet-A and -R, and the parts of ImageNet-C."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_jax.data import sources
from mae_jax.errors import UserError

# The corruptions of ImageNet-C, and AlexNet's error rate on each, the mean over the severities;
# REFERENCE section 6, arXiv 1903.12261
ALEXNET = dict(
    gaussian_noise=0.886428, shot_noise=0.894468, impulse_noise=0.922640, defocus_blur=0.819880,
    glass_blur=0.826268, motion_blur=0.785948, zoom_blur=0.798360, snow=0.866816, frost=0.826572,
    fog=0.819324, brightness=0.564592, contrast=0.853204, elastic_transform=0.646056,
    pixelate=0.717840, jpeg_compression=0.606500,
)  # fmt: skip
CORRUPTIONS = tuple(ALEXNET)
# Published beside those; no mean counts them
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
HOW_TO_GET_C = (
    "unpack its archives (zenodo.org/records/2235448) into one folder, PATH/CORRUPTION/SEVERITY/"
    "CLASS/FILE, and give c=folder:PATH; or c=imagenet2012_corrupted if tfds's copy is prepared"
)

# The 200 classes each of ImageNet-A (arXiv 1907.07174) and ImageNet-R (arXiv 2006.16241), whose
# logits alone compete. tfds labels the images by all 1000 classes and has no list of the 200.
SUBSETS = json.loads(Path(__file__).with_name("imagenet_subsets.json").read_text())


def positions(names: Sequence[str], model_classes: Sequence[str], what: str) -> np.ndarray:
    """Return the index of each name among the classes of a model, int32 (len(names),).

    Args:
      what: the set whose classes the names are, for the error message.
    """
    index = {name: i for i, name in enumerate(model_classes)}
    if unknown := [name for name in names if name not in index]:
        raise UserError(
            f"{what} has {len(unknown)} of {len(names)} classes, such as {unknown[0]!r}, that the"
            f" model does not know; it knows {len(index)}: {', '.join(model_classes[:3])}, ..."
        )
    return np.array([index[name] for name in names], np.int32)


def find_corruptions(source: str, data_dir: str = "") -> tuple[list[str], list[str]]:
    """Return the complete corruptions of an ImageNet-C, and its missing parts.

    Args:
      source: "folder:PATH" of PATH/CORRUPTION/SEVERITY/CLASS/FILE (or PATH/GROUP/CORRUPTION/...,
        the groups being the published archives), or the tfds dataset imagenet2012_corrupted.

    Returns:
      Those of CORRUPTIONS and EXTRA whose five severities are there, in this order; and
      CORRUPTION/SEVERITY of each missing part, unless its corruption is one of EXTRA and no
      severity of it is there.
    """
    complete, missing = [], []
    for name in (*CORRUPTIONS, *EXTRA):
        absent = [s for s in SEVERITIES if not _exists(_part(source, name, s), data_dir)]
        if not absent:
            complete.append(name)
        elif name in CORRUPTIONS or len(absent) < len(SEVERITIES):
            missing += [f"{name}/{severity}" for severity in absent]
    return complete, missing


def open_corruption(
    source: str, corruption: str, severity: int, data_dir: str = ""
) -> sources.Source:
    """Open one part of an ImageNet-C; see `find_corruptions`."""
    part = _part(source, corruption, severity)
    return sources.open_source(part, "train" if _is_folder(part) else "validation", data_dir)


def _part(source: str, corruption: str, severity: int) -> str:
    """Return the name of the data source that holds one part of an ImageNet-C."""
    if not _is_folder(source):
        return f"{source}/{corruption}_{severity}"
    root = Path(source.removeprefix("folder:")).expanduser()
    flat = root / corruption / str(severity)
    return (
        f"folder:{flat if flat.is_dir() else next(root.glob(f'*/{corruption}/{severity}'), flat)}"
    )


def _exists(part: str, data_dir: str) -> bool:
    if _is_folder(part):
        return Path(part.removeprefix("folder:")).is_dir()
    return bool(sources.find_tfds(part, data_dir).info.splits)


def _is_folder(source: str) -> bool:
    return source.startswith("folder:")
