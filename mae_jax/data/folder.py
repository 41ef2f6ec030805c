"""A folder of image files, read in place."""

import collections
import dataclasses
import os
from collections.abc import Iterator
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
            with open(os.path.join(self.root, name), "rb", buffering=0) as file:
                return {"image": file.readall(), **record}
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
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise UserError(f"folder:{path}: there is no folder {path!r}; write folder:PATH")
    try:
        paths = list(_walk(root, frozenset()))
    except OSError as error:
        name = printable(os.fsdecode(error.filename))
        raise UserError(f"cannot list {name}: {error.strerror}") from error
    files = sorted((os.path.relpath(x, root) for x in paths if _is_image(x)), key=os.fsencode)
    if not files:
        others = collections.Counter(printable(_extension(x)) for x in paths).most_common(5)
        held = ", ".join(f"{count} {ext or 'without extension'}" for ext, count in others)
        raise UserError(
            f"folder:{path} holds no image ({held or 'it is empty'}); images are recognised by"
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


def _walk(folder: str, parents: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the files below a folder, whose `parents` (device, inode) end the loops of links."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in parents:  # a link to a folder above
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, parents | {identity})
        else:
            yield entry.path


def _is_image(path: str) -> bool:
    if extension := _extension(path):
        return extension in IMAGE_EXTENSIONS
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return False
        with Image.open(path):  # reads the header only
            return True
    except Exception:  # Pillow raises many kinds at files that are no images
        return False


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()
