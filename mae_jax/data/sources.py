"""Sources of images: tfds datasets, folders, and what is bundled in wheels."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds

from mae_jax.config import resolve
from mae_jax.data import bundled, segfolder, splits
from mae_jax.data.folder import open_folder
from mae_jax.data.splits import Ranges
from mae_jax.errors import UserError

NAME_FEATURES = ("file_name", "filename", "image_name", "id", "image_id")


class Unreadable(UserError):
    """Data that cannot be read; the message says which."""


class NotPrepared(UserError):
    """A dataset that tfds knows and that is not prepared here; the message says what to do."""


class Source(Protocol):
    """Images by random access, in an order that never changes; threads and processes can share it.

    source[i] is {"image": bytes of an encoded file, or a uint8 array HWC; "label": int, -1 = none;
    "name": str to tell people which image it is}. A file that cannot be read is an empty image, and
    "unreadable" says why.
    """

    @property
    def num_classes(self) -> int | None: ...

    @property
    def class_names(self) -> list[str] | None: ...

    @property
    def ranges(self) -> Ranges: ...  # which slices of whole splits it holds

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_source(source: str, split: str, data_dir: str = "") -> Source:
    """Open a data source for reading.

    Args:
      source: a tfds dataset "name[/config][:version]" in ArrayRecord, "folder:PATH",
        "segfolder:PATH" (the images of pairs, without their label maps), "bundled:photos",
        "bundled:digits", or "my_fork.sources.open_it:ARGUMENT", a fork's function
        (argument, split) -> Source.
      split: a split, or slices of some as in tfds: "train", "train[:90%]", "train[:100]+test".
      data_dir: where tfds datasets live; "" = the tfds default.

    Raises:
      UserError: there is no such source or split, it is empty, or not prepared for random access.
    """
    if source.startswith("folder:"):
        return open_folder(source.removeprefix("folder:"), split)
    if source.startswith("segfolder:"):
        return segfolder.open_images(source.removeprefix("segfolder:"), split)
    if source == "bundled:digits":
        return _open_digits(split)
    if source == "bundled:photos":
        return _open_tfds(bundled.photos(data_dir), split, data_dir)
    if counted := re.fullmatch(r"counted:(\d+):(\d+)", source):
        return CountedSource(int(counted[1]), int(counted[2]) or None)
    if fork := re.fullmatch(r"((?:\w+\.)+\w+):(.*)", source):
        return resolve(fork[1])(fork[2], split)
    if not re.fullmatch(r"\w+(/[^:]+)?(:([\d*]+(\.[\d*]+){2}|experimental_latest))?", source):
        raise UserError(
            f"data source {source!r} is none of: a tfds dataset name[/config][:version],"
            " folder:PATH, bundled:photos, bundled:digits, segfolder:PATH"
            + _did_you_mean(source, [])
        )
    return _open_tfds(source, split, data_dir)


def shared(one: Source, other: Source) -> int:
    """Return how many images two sources have in common, as slices of the same splits."""
    return sum(
        max(0, min(end, other_end) - max(start, other_start))
        for split, start, end in one.ranges
        for other_split, other_start, other_end in other.ranges
        if split == other_split
    )


@dataclasses.dataclass(frozen=True)
class CountedSource:
    """A number of examples without images, counted:EXAMPLES:CLASSES, to plan a run by."""

    examples: int
    num_classes: int | None
    class_names: list[str] | None = None
    ranges: Ranges = ()

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise UserError(f"data source counted:{self.examples} holds no images: name a real one")


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
                f" be damaged: copy it again, or delete that folder and prepare it ({error})"
            ) from error
        name = example[self.name_feature] if self.name_feature else f"{self.split} #{index}"
        if isinstance(name, bytes):
            name = name.decode("utf-8", "backslashreplace")
        return {
            "image": example["image"],
            "label": int(example["label"]) if self.class_names else -1,
            "name": str(name),
        }


def _open_tfds(name: str, split: str, data_dir: str) -> TfdsSource:
    builder = find_tfds(name, data_dir)
    prepare = f"mae-jax prepare {name}" + (f" --data_dir={data_dir}" if data_dir else "")
    if not builder.info.splits:
        manual = " --manual_dir=DIR" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
        raise NotPrepared(
            f"{name!r} is not prepared in {builder.data_dir}; prepare it: {prepare}{manual}"
        )
    if "array_record" not in {str(f.value) for f in builder.info.available_file_formats()}:
        raise UserError(
            f"{name!r} is stored as {builder.info.file_format.value} in {builder.data_dir}, which"
            f" allows no random access; convert it: {prepare}"
        )
    features = dict(builder.info.features)
    if not isinstance(features.get("image"), tfds.features.Image):
        raise UserError(f"{name!r} has no image under 'image'; it has {', '.join(features)}")
    lengths = {s.name: s.num_examples for s in builder.info.splits.values()}
    split = splits.canonical(split, lengths)
    ranges = splits.parse(split, lengths, name)
    records = builder.as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record"
    )
    stored = {path.name for path in builder.data_path.iterdir()}
    needed = [Path(shard).name for shard in builder.info.splits[split].filepaths]
    if missing := [shard for shard in needed if shard not in stored]:
        raise UserError(
            f"{name!r}: {len(missing)} of {len(needed)} shards of {split!r} are missing from"
            f" {builder.data_dir}, such as {missing[0]}: copy it again, or delete that folder and"
            " prepare it"
        )
    label = features.get("label")
    return TfdsSource(
        records,
        split,
        next((key for key in NAME_FEATURES if key in features), None),
        list(label.names) if isinstance(label, tfds.features.ClassLabel) else None,
        splits.locate(ranges, builder.data_path),
        str(builder.data_path),
    )


def find_tfds(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Return the builder of a tfds dataset, prepared or not.

    Raises:
      UserError: neither tfds nor `data_dir` has a dataset of that name, version and config.
    """
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        stored = [path.name for path in root.glob("*/")]
        names = [*tfds.list_builders(with_community_datasets=False), *stored]
        raise UserError(
            f"there is no tfds dataset {name!r}, and none of that name in {root}"
            + _did_you_mean(name, names)
        ) from None
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"tfds cannot open {name!r}: {' '.join(str(error).split())}") from None


def _did_you_mean(source: str, names: list[str]) -> str:
    """Return the end of an error message: the folder, or the nearest names, that were meant."""
    near = difflib.get_close_matches(re.split("[/:]", source)[0], names, 3)
    if source and Path(source).expanduser().is_dir():
        near = [f"folder:{source}"]
    return f"; did you mean {' or '.join(near)}?" if near else ""


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """Records that are in memory already."""

    records: list[dict[str, Any]]
    class_names: list[str] | None
    ranges: Ranges = ()

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]


def _open_digits(split: str) -> MemorySource:
    digits, source = bundled.digits(), "bundled:digits"
    ranges = splits.parse(split, {name: len(records) for name, records in digits.items()}, source)
    records = [record for name, start, end in ranges for record in digits[name][start:end]]
    return MemorySource(records, [str(i) for i in range(10)], splits.locate(ranges, source))
