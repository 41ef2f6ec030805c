"""Pairs of an image and its label map, in ROOT/SPLIT/images and ROOT/SPLIT/labels."""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_jax import files as disk
from mae_jax.data import arrayrecord, splits
from mae_jax.data.bands import BadImage
from mae_jax.data.folder import SPLITS, FolderSource, list_images, printable
from mae_jax.data.label_maps import IGNORED, Legend
from mae_jax.errors import UserError

IMAGES, MAPS = "images", "labels"  # folders of a split


@dataclass(frozen=True)
class PairSource:
    """Images with label maps; a `sources.Source`.

    A record has "image" and "name" as elsewhere, no label, and "map", uint8 [H, W] as
    `Legend.read` returns it. A record is unreadable if its map is, or if no pixel has a class.
    """

    images: Any  # a Source
    maps: list[str]  # path of each image's map
    legend: Legend

    @property
    def num_classes(self) -> int:
        return len(self.legend.names)

    @property
    def class_names(self) -> list[str]:
        return list(self.legend.names)

    @property
    def ranges(self) -> splits.Ranges:
        return self.images.ranges

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.images[index]
        try:
            map_HW = self.legend.read(disk.read_regular(self.maps[index]), record["name"])
        except OSError as error:
            return record | {"unreadable": f"its label map: {error.strerror or error}"}
        except BadImage as error:
            return record | {"unreadable": str(error)}
        if (map_HW == IGNORED).all():
            record = record | {"unreadable": "no pixel of its label map has a class"}
        return record | {"map": map_HW}


def open_images(path: str, split: str) -> FolderSource:
    """Return the images of a split, or of slices of some, without their maps."""
    return _choose(path, split)[0]


def open_pairs(path: str, split: str, data: Any) -> PairSource:
    """Return the pairs of a split, or of slices of some, whose labels mean what config.data says.

    Raises:
      UserError: there are no such folders, an image or a map has no counterpart, or the meaning of
        the labels is not known.
    """
    images, maps = _choose(path, split)
    return PairSource(images, maps, Legend.from_config(data, images.root))


def _choose(path: str, split: str) -> tuple[FolderSource, list[str]]:
    """Return the images of a split, and the path of the map of each.

    Slices are taken from an order that the names alone shuffle, as in `folder.choose`.
    """
    root = os.path.abspath(os.path.expanduser(path))
    parts = _list_splits(path, root)
    lengths = {name: len(pairs) for name, pairs in parts.items()}
    ranges = splits.parse(splits.canonical(split, lengths), lengths, f"segfolder:{path}")
    chosen: list[tuple[str, str]] = []
    for name, start, end in ranges:
        pairs = parts[name]
        if end - start < len(pairs):
            order = arrayrecord.shuffled([image for image, _ in pairs])
            pairs = [pairs[i] for i in sorted(order[start:end])]
        chosen += pairs
    images = FolderSource(
        root,
        [image for image, _ in chosen],
        np.full(len(chosen), -1, np.int32),
        None,
        splits.locate(ranges, os.path.realpath(root)),
    )
    return images, [os.path.join(root, label_map) for _, label_map in chosen]


def _list_splits(path: str, root: str) -> dict[str, list[tuple[str, str]]]:
    """Return (image, map), both relative to the root, of each split.

    Raises:
      UserError: there are no such folders, or an image or a map has no counterpart.
    """
    if not os.path.isdir(root):
        raise UserError(f"segfolder:{path}: there is no folder {path!r}; write segfolder:PATH")
    names = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and os.path.isdir(os.path.join(entry.path, IMAGES))
    )
    if not names:
        raise UserError(
            f"segfolder:{path} has no folder SPLIT/{IMAGES}, such as train/{IMAGES} with the label"
            f" maps in train/{MAPS}"
        )
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in names:  # val/ and validation/ are one split, as in `folder.divide`
        parts.setdefault(SPLITS.get(name.lower(), name), []).extend(_pair(path, root, name))
    return parts


def _pair(path: str, root: str, split: str) -> list[tuple[str, str]]:
    """Return (image, map) of a split, which have the same name but for the extension."""
    where = os.path.join(path, split)
    if not os.path.isdir(os.path.join(root, split, MAPS)):
        raise UserError(f"segfolder:{path} has {split}/{IMAGES} without {split}/{MAPS}: add it")
    found = {}
    for folder in (IMAGES, MAPS):
        names = list_images(os.path.join(root, split, folder))[0]
        by_stem = {os.path.splitext(name)[0]: os.path.join(split, folder, name) for name in names}
        if len(by_stem) < len(names):
            twice = Counter(os.path.splitext(name)[0] for name in names).most_common(1)[0][0]
            raise UserError(f"{where}/{folder} has two files {printable(twice)}.*: remove one")
        found[folder] = by_stem
    images, maps = found[IMAGES], found[MAPS]
    for one, other, these, those in (
        (images, maps, "images", f"label map of the same name in {split}/{MAPS}"),
        (maps, images, "label maps", f"image of the same name in {split}/{IMAGES}"),
    ):
        if alone := sorted(one.keys() - other.keys(), key=os.fsencode):
            raise UserError(
                f"{where}: {len(alone):,} of {len(one):,} {these} have no {those}, such as"
                f" {printable(os.path.basename(one[alone[0]]))}: add or remove them"
            )
    if wrong := [name for name in maps.values() if not name.lower().endswith(".png")]:
        raise UserError(
            f"{where}/{MAPS} has {len(wrong):,} files that are no PNG, such as"
            f" {printable(os.path.basename(wrong[0]))}: convert them, without loss"
        )
    return [(images[stem], maps[stem]) for stem in sorted(images, key=os.fsencode)]
