"""Where images come from: tfds datasets, folders, and what is bundled in wheels."""

import collections
import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax.data import arrayrecord, bundled
from mae_jax.errors import UserError

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2"),
    *(".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
LABEL, IMAGE = "label", "image"
NAME_FEATURES = ("file_name", "filename", "image_name", "id", "image_id")


class Unreadable(UserError):
    """Data that cannot be read, and which."""


class NotPrepared(UserError):
    """A dataset that tfds knows and of which nothing is there; the message says what to do."""


Ranges = tuple[tuple[str, int, int], ...]


class Source(Protocol):
    """Images by random access, in an order that never changes; safe to pickle and to share.

    source[i] is {"image": bytes of an encoded file, or a uint8 array HWC; "label": int, -1 = none;
    "name": str to tell people which image it is}. A file that cannot be read is an empty image, and
    the reason stands under "unreadable".
    """

    @property
    def num_classes(self) -> int | None: ...

    @property
    def class_names(self) -> list[str] | None: ...

    @property
    def ranges(self) -> Ranges: ...  # what it has: (whole split, first, one after the last)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_source(source: str, split: str, data_dir: str = "") -> Source:
    """Open a data source for reading.

    Args:
      source: a tfds dataset "name[/config][:version]" in ArrayRecord, "folder:PATH",
        "bundled:photos" or "bundled:digits".
      split: a split, or slices of some as in tfds: "train", "train[:90%]", "train[:100]+test".
      data_dir: where tfds datasets live; "" = the tfds default.

    Raises:
      UserError: there is no such source or split, it is empty, or not prepared for random access.
    """
    if source.startswith("folder:"):
        return _open_folder(source.removeprefix("folder:"), split)
    if source == "bundled:digits":
        splits = bundled.digits()
        ranges = _ranges(split, {name: len(x["image"]) for name, x in splits.items()}, source)
        rows = [(splits[name], index) for name, lo, hi in ranges for index in range(lo, hi)]
        return ArraySource(
            np.stack([x["image"][i] for x, i in rows]),
            np.array([x["label"][i] for x, i in rows], np.int32),
            [f"digit_{x['index'][i]:04d}" for x, i in rows],
            [str(digit) for digit in range(10)],
            _located(ranges, source),
        )
    if source == "bundled:photos":
        return _open_tfds(bundled.photos(data_dir), split, data_dir)
    if counted := re.fullmatch(r"counted:(\d+):(\d+)", source):
        return CountedSource(int(counted[1]), int(counted[2]) or None)
    if not re.fullmatch(r"\w+(/[^:]+)?(:([\d*]+(\.[\d*]+){2}|experimental_latest))?", source):
        near = difflib.get_close_matches(source, ["bundled:photos", "bundled:digits"], 2, 0.5)
        if source and Path(source).expanduser().is_dir():
            near = [f"folder:{source}"]
        raise UserError(
            f"data source {source!r} is none of: a tfds dataset name[/config][:version],"
            " folder:PATH, bundled:photos, bundled:digits" + _did_you_mean(near)
        )
    return _open_tfds(source, split, data_dir)


def printable(name: str) -> str:
    """A file name that prints anywhere: bytes that are not UTF-8 appear as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@dataclasses.dataclass(frozen=True)
class CountedSource:
    """counted:EXAMPLES:CLASSES, a length without images: for what plans a run and reads none."""

    examples: int
    num_classes: int | None
    class_names: list[str] | None = None
    ranges: Ranges = ()

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise UserError(f"data source counted:{self.examples} holds no images: name a real one")


# --- tfds ---


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Encoded images of a tfds dataset in ArrayRecord; shards are opened on first use."""

    records: Any  # tfds's data source: random access, picklable, safe in threads
    split: str
    name_feature: str | None
    class_names: list[str] | None
    ranges: Ranges = ()
    folder: str = ""  # of the shards

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = self.records[index]
        except IndexError:
            raise
        except Exception as error:  # ArrayRecord's reader raises several kinds
            raise Unreadable(
                f"example {index} of {self.split!r} in {self.folder} cannot be read: its shard may"
                f" be damaged, copy or prepare it again ({error})"
            ) from error
        name = example[self.name_feature] if self.name_feature else f"{self.split} #{index}"
        if isinstance(name, bytes):
            name = name.decode("utf-8", "backslashreplace")
        return {
            IMAGE: example[IMAGE],
            LABEL: int(example[LABEL]) if self.class_names else -1,
            "name": str(name),
        }


def _open_tfds(name: str, split: str, data_dir: str) -> TfdsSource:
    builder = find_tfds(name, data_dir)
    prepare = f"mae-jax prepare {name}" + (f" --data-dir={data_dir}" if data_dir else "")
    if not builder.info.splits:
        manual = " --manual-dir=DIR" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
        raise NotPrepared(
            f"{name!r} is not prepared in {builder.data_dir}{_other_versions(builder)};"
            f" prepare it: {prepare}{manual}"
        )
    if "array_record" not in {str(f.value) for f in builder.info.available_file_formats()}:
        raise UserError(
            f"{name!r} is stored as {builder.info.file_format.value} in {builder.data_dir}, which"
            f" allows no random access; convert it: {prepare}"
        )
    features = dict(builder.info.features)
    if not isinstance(features.get(IMAGE), tfds.features.Image):
        raise UserError(f"{name!r} has no image under 'image'; it has {', '.join(features)}")
    ranges = _ranges(split, {s.name: s.num_examples for s in builder.info.splits.values()}, name)
    records = builder.as_data_source(
        split, decoders={IMAGE: tfds.decode.SkipDecoding()}, file_format="array_record"
    )
    stored = {path.name for path in builder.data_path.iterdir()}
    needed = [Path(shard).name for shard in builder.info.splits[split].filepaths]
    if missing := [shard for shard in needed if shard not in stored]:
        raise UserError(
            f"{name!r}: {len(missing)} of {len(needed)} shards of {split!r} are missing from"
            f" {builder.data_dir}, such as {missing[0]}: copy or prepare it again"
        )
    label = features.get(LABEL)
    return TfdsSource(
        records,
        split,
        next((key for key in NAME_FEATURES if key in features), None),
        list(label.names) if isinstance(label, tfds.features.ClassLabel) else None,
        _located(ranges, builder.data_path),
        str(builder.data_path),
    )


def find_tfds(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a tfds dataset, prepared or not.

    Raises:
      UserError: nothing of that name is known to tfds or stored in `data_dir`, or not that version
        or config of it.
    """
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        stored = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
        known = [*tfds.list_builders(with_community_datasets=False), *stored]
        short = re.split("[/:]", name)[0]
        near = difflib.get_close_matches(short, known, 3)
        if Path(name).expanduser().is_dir():
            near = [f"folder:{name}"]
        raise UserError(
            f"there is no tfds dataset {name!r}, and none of that name in {root}"
            + _did_you_mean(near)
        ) from None
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).partition('}": ')[2] or str(error)
        raise UserError(f"tfds cannot open {name!r}: {reason}") from None


def _other_versions(builder: tfds.core.DatasetBuilder) -> str:
    parent = builder.data_path.parent
    found = [p.name for p in parent.iterdir()] if parent.exists() else []
    found = [version for version in found if tfds.core.Version.is_valid(version)]
    return f" (there is version {', '.join(sorted(found))}: add ':VERSION')" if found else ""


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _ranges(split: str, lengths: dict[str, int], source: str) -> list[tuple[str, int, int]]:
    """'train[:50%]+test' -> [('train', 0, 50), ('test', 0, 20)], by tfds's own rules."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)
        for name, length in lengths.items()
    }
    have = ", ".join(f"{name} ({length:,})" for name, length in lengths.items())
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"split {split!r} of {source!r} is neither one of {have} nor a slice of them such as"
            f" 'train[:90%]': {reason}"
        ) from None
    ranges = [
        (p.splitname, p.from_ or 0, lengths[p.splitname] if p.to is None else p.to) for p in parts
    ]
    for _, lo, hi in ranges:
        if lo >= hi:
            raise UserError(f"split {split!r} of {source!r} is empty; the source has {have}")
    return ranges


def _located(ranges: list[tuple[str, int, int]], where: Any) -> Ranges:
    return tuple((f"{where} {split}", lo, hi) for split, lo, hi in ranges)


def shared(one: Source, other: Source) -> int:
    """How many images two sources have in common, as slices of the same splits."""
    return sum(
        max(0, min(end, other_end) - max(start, other_start))
        for split, start, end in one.ranges
        for other_split, other_start, other_end in other.ranges
        if split == other_split
    )


# --- arrays in memory ---


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images already in memory, uint8 [N, H, W, C]."""

    images: np.ndarray
    labels: np.ndarray
    names: list[str]
    class_names: list[str] | None
    ranges: Ranges = ()

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            IMAGE: self.images[index],
            LABEL: int(self.labels[index]),
            "name": self.names[index],
        }


# --- folders ---


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files read in place."""

    root: str
    files: list[str]  # relative to root, in the order of their bytes; may hold surrogate escapes
    labels: np.ndarray  # int32, -1 = none
    class_names: list[str] | None
    ranges: Ranges = ()

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.files[index]
        record = {LABEL: int(self.labels[index]), "name": printable(name)}
        try:
            return {IMAGE: Path(self.root, name).read_bytes(), **record}
        except OSError as error:  # a broken link, a file without permission
            return {IMAGE: b"", **record, "unreadable": error.strerror or str(error)}


def _open_folder(path: str, split: str) -> FolderSource:
    """Every image below a folder, flat or nested.

    What counts as an image: a file with an image's extension, whatever it turns out to hold, and a
    file without extension that opens as an image. Other files, and names that start with a dot, are
    passed over. Links are followed. The parent folder is the label when every image is at
    PATH/CLASS/FILE; otherwise there are no labels.

    The one split is 'train'. Slices of it are taken from a shuffled order that depends on the names
    alone, so that 'train[:90%]' and 'train[90%:]' hold images of every sub-folder.
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
    ranges = _ranges(split, {"train": len(files)}, f"folder:{path}")
    chosen = list(range(len(files)))
    if "[" in split or "+" in split:
        order = arrayrecord.shuffled(files)
        chosen = sorted(i for _, lo, hi in ranges for i in order[lo:hi])
    index = {name: i for i, name in enumerate(classes)}
    return FolderSource(
        os.path.abspath(root),
        [files[i] for i in chosen],
        np.array([index[parents[i]] if labelled else -1 for i in chosen], np.int32),
        [printable(name) for name in classes] if labelled else None,
        _located(ranges, os.path.realpath(root)),
    )


def _list_images(root: str) -> tuple[list[str], collections.Counter[str]]:
    """Image files below root, relative to it and sorted; and a count of other files' extensions."""
    files: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    above: dict[str, frozenset] = {os.path.dirname(root): frozenset()}  # itself and its parents

    def refuse(error: OSError) -> None:
        name = printable(os.fsdecode(error.filename))
        raise UserError(f"cannot list {name}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        status, parents = os.stat(folder), above[os.path.dirname(folder)]
        if (status.st_dev, status.st_ino) in parents:  # a link to a folder above: a loop
            subfolders.clear()
            continue
        above[folder] = parents | {(status.st_dev, status.st_ino)}
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
