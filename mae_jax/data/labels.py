"""Labelled images: open them, and check their labels and that two splits do not overlap."""

import numpy as np

from mae_jax.data import sources
from mae_jax.errors import UserError


def open_labelled(name: str, split: str, data_dir: str) -> sources.Source:
    """Open a source as `sources.open_source` does; its images must have labels."""
    source = sources.open_source(name, split, data_dir)
    if not source.num_classes:
        raise UserError(
            f"{name!r} has no labels, which are needed here: a folder has them if every image lies"
            " at PATH/CLASS/FILE, a tfds dataset if it has a ClassLabel under 'label'"
        )
    return source


def names(source: sources.Source) -> list[str]:
    """Return the names of a source's classes, which are numbers where it gives none."""
    return source.class_names or [str(label) for label in range(source.num_classes or 0)]


def require_labels(label_B: np.ndarray, classes: int) -> None:
    """Raise a UserError if a label is not from 0 to classes - 1."""
    wrong = label_B[(label_B < 0) | (label_B >= classes)]
    if len(wrong):
        raise UserError(
            f"an image has label {wrong[0]}, and labels go from 0 to {classes - 1}: choose a split"
            " whose images are labelled (the public test images of ImageNet are not)"
        )


def require_disjoint(what: str, one: sources.Source, other: sources.Source, way_out: str) -> None:
    """Raise a UserError if two sources share images.

    Args:
      what: both by name, such as "the queries and the bank", for the message.
      way_out: what the user can do about it, for the end of the message.
    """
    if count := sources.shared(one, other):
        raise UserError(f"{what} have {count:,} images in common: {way_out}")
