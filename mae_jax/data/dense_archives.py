"""Unpack the archives of ADE20K and VOC 2012 into pairs of images and label maps (segfolder).

Files are copied byte by byte: a label map stays the PNG that it was.
"""

import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from mae_jax.data.pack import Progress
from mae_jax.errors import UserError

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant"),
    *("sheep", "sofa", "train", "tv monitor"),
)


# What reading a damaged archive raises: RuntimeError at flags and versions that zipfile does not
# know, UnicodeDecodeError at a damaged list of names
DAMAGE = (
    *(OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(RuntimeError, UnicodeDecodeError),
)


class Archive(NamedTuple):
    """The files of an archive: their names, and how to open one."""

    names: list[str]
    open: Callable[..., IO[bytes]]


@contextmanager
def open_archive(path: str) -> Iterator[Archive]:
    """Open a .zip or a .tar, compressed or not.

    Raises:
      UserError: there is no archive, or it is damaged or cut short; also while its files are read.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield Archive([x for x in archive.namelist() if x[-1] != "/"], archive.open)
            return
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar if member.isfile()}

            def read(name: str) -> IO[bytes]:
                file = tar.extractfile(members[name])
                assert file is not None  # it is a plain file
                return file

            yield Archive(list(members), read)
    except DAMAGE as error:
        raise UserError(
            f"{path} cannot be read ({error}): give the archive as it was downloaded, and compare"
            " its size with that on the download page"
        ) from error


def unpack_ade20k(path: str, out: Path, progress: Progress) -> dict[str, int]:
    """Unpack ADEChallengeData2016.zip: 150 classes, written as 1 to 150, where 0 means none.

    Returns:
      How many pairs each split has.
    """
    splits = {"training": "train", "validation": "validation"}
    pattern = re.compile(r"(?:.*/)?(images|annotations)/(training|validation)/([^/]+)\.(jpg|png)")
    with open_archive(path) as archive:
        wanted = {}
        for name in archive.names:
            if match := pattern.fullmatch(name):
                folder = {"images": "images", "annotations": "labels"}[match[1]]
                wanted[name] = Path(splits[match[2]], folder, f"{match[3]}.{match[4]}")
        table = _one(archive, path, "objectInfo150.txt")
        # Idx Ratio Train Val Stuff Name
        rows = [line.split("\t") for line in archive.open(table).read().decode().splitlines()[1:]]
        classes = [row[-1].strip() for row in rows if row[-1].strip()]
        return _write(archive, path, wanted, classes, out, progress)


def unpack_voc(path: str, out: Path, progress: Progress) -> dict[str, int]:
    """Unpack VOCtrainval_11-May-2012.tar: 21 classes with the background, 255 means none.

    Returns:
      How many pairs each split has.
    """
    with open_archive(path) as archive:
        by_ending = {"/".join(PurePosixPath(name).parts[-2:]): name for name in archive.names}
        wanted = {}
        for listed, split in (("train", "train"), ("val", "validation")):
            table = _one(archive, path, f"ImageSets/Segmentation/{listed}.txt")
            for stem in archive.open(table).read().decode().split():
                for ending, folder in ((f"JPEGImages/{stem}.jpg", "images"),
                                       (f"SegmentationClass/{stem}.png", "labels")):  # fmt: skip
                    if ending not in by_ending:
                        raise UserError(f"{path} has no {ending}: it is not the whole archive")
                    target = Path(split, folder, PurePosixPath(ending).name)
                    wanted[by_ending[ending]] = target
        return _write(archive, path, wanted, list(VOC_CLASSES), out, progress)


def _one(archive: Archive, path: str, ending: str) -> str:
    """Return the name of the file in an archive whose path ends with `ending`."""
    found = [name for name in archive.names if f"/{name}".endswith(f"/{ending}")]
    if not found:
        held = ", ".join(sorted({name.partition("/")[0] for name in archive.names})[:5])
        raise UserError(f"{path} has no {ending} (it has {held}): it is another archive")
    return found[0]


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raise UserError if the body cannot write: `open_archive` would blame the archive."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written ({error.strerror or error}): choose a folder with room,"
            " in which files can be written"
        ) from error


def _write(
    archive: Archive,
    path: str,
    wanted: dict[str, Path],
    classes: list[str],
    out: Path,
    progress: Progress,
) -> dict[str, int]:
    """Write the wanted files of an archive (name -> path below `out`), and classes.txt.

    Raises:
      UserError: `out` already exists or cannot be written, or an image or a map has no counterpart.
    """
    if out.exists():
        raise UserError(f"--out={out} already exists: choose another folder, or delete that one")
    stems: dict[tuple[str, str], set[str]] = {}
    for target in wanted.values():
        split, folder, name = target.parts
        stems.setdefault((split, folder), set()).add(Path(name).stem)
    splits = sorted({split for split, _ in stems})
    if not splits:
        raise UserError(f"{path} holds no images with label maps: it is another archive")
    for split in splits:
        images, maps = (stems.get((split, folder), set()) for folder in ("images", "labels"))
        if alone := sorted(images ^ maps):
            raise UserError(
                f"{path}: {len(alone):,} images or label maps of {split} have no counterpart, such"
                f" as {alone[0]}: it is not the whole archive"
            )
    part = out.with_name(f"{out.name}.incomplete")
    shutil.rmtree(part, ignore_errors=True)
    with progress("files", len(wanted)) as advance:
        for name, target in wanted.items():
            with archive.open(name) as source:
                content = source.read()
            with _writing(out):
                (part / target).parent.mkdir(parents=True, exist_ok=True)
                (part / target).write_bytes(content)
            advance(1)
    with _writing(out):
        (part / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        os.replace(part, out)
    return {split: len(stems[split, "images"]) for split in splits}
