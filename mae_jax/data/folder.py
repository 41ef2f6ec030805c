"""A folder of image files, read in place."""

import collections
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_jax.data import arrayrecord, splits
from mae_jax.errors import UserError

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2"),
    *(".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files below a folder; a `sources.Source`."""

    root: str
    files: list[str]  # relative to root, in the order of their bytes; may hold surrogate escapes
    labels: np.ndarray  # int32, -1 = none
    class_names: list[str] | None
    ranges: splits.Ranges = ()

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.files[index]
        record = {"label": int(self.labels[index]), "name": printable(name)}
        try:
            return {"image": Path(self.root, name).read_bytes(), **record}
        except OSError as error:  # a broken link, a file without permission
            return {"image": b"", **record, "unreadable": error.strerror or str(error)}


def open_folder(path: str, split: str) -> FolderSource:
    """Return every image below a folder, flat or nested.

    What counts as an image: a file with an image's extension, whatever it turns out to hold, and a
    file without extension that opens as an image. Other files, and names that start with a dot, are
    passed over. Links are followed. The parent folder is the label when every image is at
    PATH/CLASS/FILE; otherwise there are no labels.

    The one split is 'train'. Slices of it are taken from a shuffled order that depends on the names
    alone, so that 'train[:90%]' and 'train[90%:]' hold images of every sub-folder.

    Raises:
      UserError: there is no such folder, no image in it, or no such split.
    """
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"folder:{path}: there is no folder {path!r}; write folder:PATH")
    files, others = _list_images(os.fspath(root))
    if not files:
        found = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in others.most_common(5))
        raise UserError(
            f"folder:{path} holds no image ({found or 'it is empty'}); images are recognised by"
            f" their extension: {' '.join(IMAGE_EXTENSIONS)}"
        )
    parents = [os.path.dirname(name) for name in files]
    classes = sorted(set(parents), key=os.fsencode)
    labelled = all(parent and os.sep not in parent for parent in classes)
    ranges = splits.parse(split, {"train": len(files)}, f"folder:{path}")
    chosen = list(range(len(files)))
    if "[" in split or "+" in split:
        order = arrayrecord.shuffled(files)
        chosen = sorted(i for _, start, end in ranges for i in order[start:end])
    index = {name: i for i, name in enumerate(classes)}
    return FolderSource(
        os.path.abspath(root),
        [files[i] for i in chosen],
        np.array([index[parents[i]] if labelled else -1 for i in chosen], np.int32),
        [printable(name) for name in classes] if labelled else None,
        splits.locate(ranges, os.path.realpath(root)),
    )


def printable(name: str) -> str:
    """Return a file name that prints anywhere: bytes that are not UTF-8 appear as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_images(root: str) -> tuple[list[str], collections.Counter[str]]:
    """Return image files below root, relative to it and sorted, and a count of other extensions."""
    files: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    # Of each folder, which folders it is in, itself included, by device and inode.
    inside: dict[str, frozenset] = {os.path.dirname(root): frozenset()}

    def refuse(error: OSError) -> None:
        name = printable(os.fsdecode(error.filename))
        raise UserError(f"cannot list {name}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        status, parents = os.stat(folder), inside[os.path.dirname(folder)]
        if (status.st_dev, status.st_ino) in parents:  # a link to a folder above: a loop
            subfolders.clear()
            continue
        inside[folder] = parents | {(status.st_dev, status.st_ino)}
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if extension in IMAGE_EXTENSIONS or (not extension and _opens_as_image(path)):
                files.append(os.path.relpath(path, root))
            else:
                others[printable(extension)] += 1
    return sorted(files, key=os.fsencode), others


def _opens_as_image(path: str) -> bool:
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return False
        with Image.open(path):  # reads the header only
            return True
    except Exception:  # Pillow raises many kinds at files that are no images
        return False
