"""A folder of image files, read in place."""

import collections
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mae_jax import files as disk
from mae_jax.data import arrayrecord, splits
from mae_jax.distributed import announce
from mae_jax.errors import UserError

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2"),
    *(".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
ARRAYS = ".npy"  # an image only in a folder without other images; beside them it may be anything


# Names of folders, in small letters -> the split that they hold.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


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
            return {"image": disk.read_regular(os.path.join(self.root, name)), **record}
        except OSError as error:  # a broken link, a pipe, a file without permission
            return {"image": b"", **record, "unreadable": error.strerror or str(error)}


def open_folder(path: str, split: str) -> FolderSource:
    """Return the images below a folder, flat or nested.

    An image is a file with an image's extension, whatever it turns out to hold, or a file without
    extension that opens as an image; in a folder without any of these, it is a .npy file. Other
    files, and names that start with a dot, are passed over. Links are followed. The parent folder
    is the label when every image is at PATH/CLASS/FILE, or at PATH/SPLIT/CLASS/FILE; otherwise
    there are no labels.

    Splits are those of `divide`; see `splits.canonical` for their other names. Slices are
    taken from a shuffled order that depends on the names alone, so that 'train[:90%]' and
    'train[90%:]' hold images of every sub-folder.
    """
    return choose(path, *list_images(path), split)


def choose(path: str, files: list[str], parts: dict[str, list[int]], split: str) -> FolderSource:
    """Return the images of a split, from what `list_images` returned for the folder."""
    root = os.path.expanduser(path)
    parents = [os.path.dirname(name) for name in files]
    if list(parts) != [""]:
        parents = [parent.partition(os.sep)[2] for parent in parents]
    classes = sorted(set(parents), key=os.fsencode)
    labelled = all(parent and os.sep not in parent for parent in classes)
    if labelled:
        _announce_unknown_classes(path, parents, parts)
    lengths = {name or "train": len(part) for name, part in parts.items()}
    ranges = splits.parse(splits.canonical(split, lengths), lengths, f"folder:{path}")
    chosen: list[int] = []
    for name, start, end in ranges:
        part = parts.get(name) or parts[""]
        if end - start < len(part):
            order = arrayrecord.shuffled([files[i] for i in part])
            part = [part[i] for i in order[start:end]]
        chosen += part
    chosen.sort()
    index = {name: i for i, name in enumerate(classes)}
    return FolderSource(
        os.path.abspath(root),
        [files[i] for i in chosen],
        np.array([index[parents[i]] if labelled else -1 for i in chosen], np.int32),
        [printable(name) for name in classes] if labelled else None,
        splits.locate(ranges, os.path.realpath(root)),
    )


def list_images(path: str) -> tuple[list[str], dict[str, list[int]]]:
    """Return the images below a folder, relative to it, and which of them each split has.

    Raises:
      UserError: there is no such folder, no image, or splits beside other folders.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise UserError(f"folder:{path}: there is no folder {path!r}; write folder:PATH")
    try:
        paths = list(_walk(root, frozenset()))
    except OSError as error:
        name = printable(os.fsdecode(error.filename))
        raise UserError(f"cannot list {name}: {error.strerror}") from error
    images = [x for x in paths if _is_image(x)]
    arrays = [x for x in paths if _extension(x) == ARRAYS]
    if images and arrays:
        announce(f"folder:{path}: {len(arrays):,} .npy beside {len(images):,} images are not read")
    files = sorted((os.path.relpath(x, root) for x in images or arrays), key=os.fsencode)
    if not files:
        others = collections.Counter(printable(_extension(x)) for x in paths).most_common(5)
        held = ", ".join(f"{count} {ext or 'without extension'}" for ext, count in others)
        raise UserError(
            f"folder:{path} holds no image ({held or 'it is empty'}); images are recognised by"
            f" their extension: {' '.join(IMAGE_EXTENSIONS)} {ARRAYS}"
        )
    return files, divide(path, files)


def divide(path: str, files: list[str]) -> dict[str, list[int]]:
    """Return which images each split has; {"": all} where the folders name no splits.

    PATH/train beside PATH/val or PATH/test are splits, and so is PATH/train alone if it has folders
    of classes. The names in SPLITS count in any case.

    Raises:
      UserError: such folders stand beside other images, so that it is unclear what is meant.
    """
    tops = [name.partition(os.sep)[0] if os.sep in name else "" for name in files]
    named = {top: SPLITS.get(top.lower()) for top in set(tops)}
    found = {split for split in named.values() if split}
    nested = all(name.count(os.sep) >= 2 for name in files)
    if len(found) < 2 and not (found == {"train"} and len(named) == 1 and nested):
        return {"": list(range(len(files)))}
    others = sorted(printable(top) or "images of its own" for top in named if not named[top])
    folders = ", ".join(sorted(printable(top) for top in named if named[top]))
    if others:
        raise UserError(
            f"folder:{path} has the splits {folders} beside {', '.join(others)[:200]}: move those"
            " elsewhere, or name one folder, such as folder:"
            + os.path.join(path, next(top for top in sorted(named) if named[top]))
        )
    announce(f"folder:{path}: its folders {folders} are splits")
    parts: dict[str, list[int]] = {}
    for i, top in enumerate(tops):
        parts.setdefault(str(named[top]), []).append(i)
    return {name: parts[name] for name in ("train", "validation", "test") if name in parts}


def _announce_unknown_classes(path: str, parents: list[str], parts: dict[str, list[int]]) -> None:
    """Print the classes of other splits that train does not have."""
    trained = {parents[i] for i in parts.get("train", [])}
    for name, part in parts.items():
        unknown = sorted({parents[i] for i in part} - trained)
        if trained and unknown:
            listed = ", ".join(map(printable, unknown))[:200]
            announce(f"folder:{path}: {name} has classes that train has no image of: {listed}")


def printable(name: str) -> str:
    """Return a file name that prints anywhere: bytes that are not UTF-8 appear as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _walk(folder: str, parents: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the files below a folder; `parents`, (device, inode) each, end loops of links."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in parents:  # a link to a folder above
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself; like other broken links it is no image
            is_folder = False
        if is_folder:
            yield from _walk(entry.path, parents | {identity})
        else:
            yield entry.path


def _is_image(path: str) -> bool:
    if extension := _extension(path):
        return extension in IMAGE_EXTENSIONS
    try:
        with open(path, "rb", opener=disk.open_regular) as file, Image.open(file):
            return True  # the header was read, and no more
    except Exception:  # Pillow raises many kinds at files that are no images
        return False


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()
