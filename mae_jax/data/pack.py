"""Pack the images of a folder, once, into a tfds dataset in ArrayRecord."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax import files
from mae_jax.data import arrayrecord, bad_images
from mae_jax.data.bands import BadImage
from mae_jax.data.decode import ORIENTATION
from mae_jax.data.folder import FolderSource, choose, list_images
from mae_jax.data.process import follow_parent
from mae_jax.errors import UserError

IMAGES_PER_SHARD = 256  # what an interruption may cost; more beyond 1024 shards
MAX_SHARDS = 1024
JPEG_SIDE = 65_500  # pixels; the limit of libjpeg
QUALITY = 95  # of JPEGs

# (unit, how many there are) -> a context that yields a function to call with the units just done
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def prepare_folder(
    source: str,
    name: str,
    *,
    data_dir: str,
    resize: int | None,
    workers: int,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Write the images of a folder as the tfds dataset `name`, or go on where a run was stopped.

    RGB or grey JPEG and PNG files keep their bytes if nothing is resized; other images become RGB
    JPEGs, upright. With `resize`, the short side gets that many pixels, by Pillow's
    bicubic filter, and every image is encoded anew. Images that cannot be read are left out. The
    order is shuffled by the hashes of the names. A folder's splits are kept; see `folder.divide`.
    Whether an image changed since an earlier run is told by its size and time, as in `embed`.

    Returns:
      The directory of the dataset, and what its prepared.json says: images, bytes, mean, std, and
      bad, {name: why it cannot be read}.

    Raises:
      UserError: no images; a bad or taken name; the images of a finished dataset changed; no
        directory can be made; another `prepare` is writing the same dataset.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--name={name}: use small letters, digits and _, such as my_images")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"--name={name} is a dataset that tfds knows; choose another name")
    listed, parts = list_images(source)
    names = [split or "train" for split in parts]
    images = {split: choose(source, listed, parts, split) for split in names}
    bad_images.require_bands(
        images[names[0]],
        3,
        np.uint8,
        "such images are not packed, but read in place. `mae-jax prepare folder"
        f" --source={source} --value_range=LOW,HIGH` prints their means and how to train",
    )
    classes = images[names[0]].class_names or []
    for class_name in classes:  # tfds keeps a name in each line, and strips it
        if classes.count(class_name) > 1 or class_name.strip().splitlines() != [class_name]:
            raise UserError(
                f"{source}: the name of the folder {class_name!r} begins or ends with a space, has"
                " several lines or is there twice, which no dataset can keep: rename the folder"
            )
    plan = _plan(images[names[0]].root, listed, resize)
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name
    final, work = root / arrayrecord.VERSION, root / f"{arrayrecord.VERSION}.incomplete"
    if final.exists():
        return final, _read_finished(final, name, plan)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--data_dir={root.parent}: {work} cannot be made ({error.strerror or error}); give a"
            " directory in which files can be written"
        ) from None
    with files.locked(work) as is_free:
        if not is_free:
            raise UserError(f"another `mae-jax prepare` is writing {work}")
        _remove_leftovers(work, plan)
        shards = {split: _divide(images[split], work, name, split, resize) for split in names}
        every = list(itertools.chain(*shards.values()))
        _write_missing(every, workers, progress)
        splits = {split: _counts(part) for split, part in shards.items()}
        summary = _summary(every, shards[names[0]])
        features = arrayrecord.image_features(images[names[0]].class_names)
        arrayrecord.write_metadata(work, features, splits, f"Images of the folder {source!a}.")
        files.write_json(work / "prepared.json", {"plan": plan, **summary})
        for file in [*(shard.report for shard in every), work / "plan.json"]:
            file.unlink()
        work.rename(final)
    return final, summary


def _plan(root: str, listed: list[str], resize: int | None) -> dict[str, Any]:
    """Return what a dataset is made from, to be compared with that of an earlier run."""
    versions = hashlib.sha256()
    for name in listed:
        path = os.path.join(root, name)
        status = os.stat(path) if os.path.exists(path) else None  # a broken link has none
        versions.update(f"{status and (status.st_size, status.st_mtime_ns)}\0".encode())
    return {
        "source": root,
        "files": len(listed),
        "listing": hashlib.sha256(b"\0".join(map(os.fsencode, listed))).hexdigest(),
        "versions": versions.hexdigest(),
        "resize": resize,
        "quality": QUALITY,
    }


def _read_finished(final: Path, name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Return what prepared.json of a finished dataset says.

    Raises:
      UserError: the dataset was made from something else, or its images changed since.
    """
    summary = files.read_json(final / "prepared.json")
    made = summary.get("plan") or {}
    if made.keys() ^ plan.keys() == {"versions"}:  # written before that was compared
        print(
            f"{final} does not say which versions of the images it holds: if one was changed since,"
            " delete that directory and prepare it again."
        )
        made = made | {"versions": plan["versions"]}
    if made != plan:
        same = made | {"versions": plan["versions"]} == plan
        reason = "before its images changed" if same else "from other images or options"
        raise UserError(
            f"--name={name}: {final} already exists, made {reason}; choose another name, or delete"
            " that directory"
        )
    return summary


def _remove_leftovers(work: Path, plan: dict[str, Any]) -> None:
    """Remove files of an interrupted run that this one cannot use, and store this run's plan."""
    if (old := files.read_json(work / "plan.json")) != plan:
        if old:
            print("The images or options changed since the interruption: starting again.")
        for file in list(work.iterdir()):
            file.unlink()
        files.write_json(work / "plan.json", plan)
    for file in work.glob("*.part-*"):  # of a process that was killed
        file.unlink()


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a dataset: its images, its file, and the report beside a complete file."""

    source: FolderSource
    path: Path
    resize: int | None

    @property
    def report(self) -> Path:
        return self.path.with_name(self.path.name + ".json")


def _divide(
    images: FolderSource, work: Path, name: str, split: str, resize: int | None
) -> list[Shard]:
    """Divide the images, in the order of their names' hashes, into shards of `work`."""
    order = np.array(arrayrecord.shuffled(images.files))
    num_shards = min(-(-len(order) // IMAGES_PER_SHARD), MAX_SHARDS)
    shards = []
    for i, rows in enumerate(np.array_split(order, num_shards)):
        names, labels = [images.files[row] for row in rows], images.labels[rows]
        part = dataclasses.replace(images, files=names, labels=labels)
        path = arrayrecord.shard_path(work, name, split, i, num_shards)
        shards.append(Shard(part, path, resize))
    return shards


def _write_missing(shards: list[Shard], workers: int, progress: Progress) -> None:
    """Write the shards that are not there yet, in `workers` processes."""
    missing = [shard for shard in shards if not shard.report.exists()]
    total, rest = (sum(len(shard.source) for shard in x) for x in (shards, missing))
    with progress("images", total) as advance, _mapping(min(workers, len(missing))) as run:
        advance(total - rest)
        for shard, _ in zip(missing, run(write_shard, missing), strict=True):
            advance(len(shard.source))


@contextlib.contextmanager
def _mapping(workers: int) -> Iterator[Callable]:
    """Yield a `map` that works in `workers` processes, or in this one if one is enough."""
    if workers <= 1:
        yield map
        return
    pool = futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork would copy running threads
        initializer=follow_parent,
        initargs=(signal.SIGINT,),  # the pool ends its processes by SIGTERM
    )
    try:
        yield pool.map
    except futures.process.BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for its memory: the same command goes on where"
            " it stopped; try it with a smaller --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_shard(shard: Shard) -> None:
    """Write one shard, then its report; runs in a worker process."""
    features = arrayrecord.image_features(shard.source.class_names)
    histogram = np.zeros((3, 256), np.int64)
    bad = {}

    def records() -> Iterator[bytes]:
        for i in range(len(shard.source)):
            try:
                record, picture = bad_images.read(shard.source, i, channels=3)
                data, image = _encode(record["image"], Image.fromarray(picture), shard.resize)
            except BadImage as error:
                bad[shard.source[i]["name"]] = str(error)
                continue
            histogram[:] += np.reshape(image.histogram(), (3, 256))
            example = {"image": data, "file_name": record["name"]}
            if shard.source.class_names:
                example["label"] = record["label"]
            yield features.serialize_example(features.encode_example(example))

    count, size = arrayrecord.write_shard(shard.path, records())
    report = {"images": count, "bytes": size, "histogram": histogram.tolist(), "bad": bad}
    files.write_json(shard.report, report)


def _encode(data: bytes, image: Image.Image, resize: int | None) -> tuple[bytes, Image.Image]:
    """Return the bytes to store for an image file, and the stored image; `image` is the file's."""
    if resize is None and _looks_alike_everywhere(data):
        return data, image
    scale = resize / min(image.size) if resize else 1
    if max(image.size) * scale > JPEG_SIDE:
        raise BadImage(
            f"{image.width} x {image.height} pixels: too long a strip, JPEG ends at {JPEG_SIDE:,}"
        )
    if resize:
        width, height = (max(resize, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue(), image


def _looks_alike_everywhere(data: bytes) -> bool:
    """Return whether every reader shows a file alike: RGB or grey JPEG or PNG, upright, opaque."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            plain = picture.format in ("JPEG", "PNG") and picture.mode in ("RGB", "L")
            upright = picture.getexif().get(ORIENTATION, 1) == 1
            return plain and upright and "transparency" not in picture.info
    except Exception:  # .npy; metadata that are damaged, at which Pillow raises many kinds
        return False


def _counts(shards: list[Shard]) -> tuple[list[int], int]:
    """Return how many images each shard of a split holds, and the bytes of all."""
    reports = [files.read_json(shard.report) for shard in shards]
    return [report["images"] for report in reports], sum(report["bytes"] for report in reports)


def _summary(shards: list[Shard], trained: list[Shard]) -> dict[str, Any]:
    """Return what prepared.json says of all shards; mean and std are of the split trained on.

    If no image of that can be read, they are of all.
    """
    reports = [files.read_json(shard.report) for shard in shards]
    bad = dict(sorted(item for report in reports for item in report["bad"].items()))
    images = sum(report["images"] for report in reports)
    if not images:
        name, reason = next(iter(bad.items()))
        raise UserError(f"none of the {len(bad)} files can be read, such as {name} ({reason})")
    # Mean and standard deviation per channel, of pixels from 0 to 1
    histogram = np.sum([files.read_json(shard.report)["histogram"] for shard in trained], 0)
    if not histogram.any():
        histogram = np.sum([report["histogram"] for report in reports], 0)
    weights, levels = histogram / histogram.sum(1, keepdims=True), np.arange(256) / 255
    mean = weights @ levels
    std = np.sqrt(weights @ levels**2 - mean**2)
    size = sum(report["bytes"] for report in reports)
    statistics = {"mean": mean.tolist(), "std": std.tolist()}
    return {"images": images, "bytes": size, **statistics, "bad": bad}
