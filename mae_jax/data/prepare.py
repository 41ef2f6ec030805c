"""Prepare datasets in ArrayRecord, once: a folder of one's own images, or a tfds dataset."""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mae_jax import files
from mae_jax.data import arrayrecord, imagenet, pack
from mae_jax.data.folder import open_folder
from mae_jax.data.process import follow_parent
from mae_jax.data.sources import find_tfds
from mae_jax.errors import UserError

# (unit, how many there are) -> a context that yields what is called with every number of units done
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


# --- a folder ---


def prepare_folder(
    source: str,
    name: str,
    *,
    data_dir: str,
    resize: int | None,
    quality: int,
    workers: int,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Write the images of a folder as the tfds dataset `name`, or go on with it.

    RGB or grey JPEG and PNG files keep their bytes if nothing is resized; other images become RGB
    JPEGs of `quality`, upright. With `resize`, the short side gets that many pixels, by Pillow's
    bicubic filter, and every image is encoded anew. Images that cannot be read are left out. The
    order is shuffled by the hashes of the names.

    Returns:
      The directory of the dataset, and what its prepared.json says: images, bytes, mean, std, and
      bad, {name: why it cannot be read}.

    Raises:
      UserError: no images; a bad or taken name; another `prepare` is writing the same dataset.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--name={name}: use small letters, digits and _, such as my_images")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"--name={name} is a dataset that tfds knows; choose another name")
    images = open_folder(source, "train")
    plan = {
        "source": images.root,
        "files": len(images),
        "listing": hashlib.sha256(b"\0".join(map(os.fsencode, images.files))).hexdigest(),
        "resize": resize,
        "quality": quality,
    }
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name
    final, work = root / arrayrecord.VERSION, root / f"{arrayrecord.VERSION}.incomplete"
    if final.exists():
        summary = _read_json(final / "prepared.json")
        if summary.get("plan") != plan:
            raise UserError(
                f"--name={name}: {final} already exists, made from other images or options; choose"
                " another name, or delete that directory"
            )
        return final, summary
    work.mkdir(parents=True, exist_ok=True)
    with _only_writer(work):
        _remove_leftovers(work, plan)
        shards = pack.make_shards(images, work, name, resize, quality)
        summary = {"plan": plan, **_write_shards(shards, workers, progress)}
        description = f"Images of the folder {source!a}."
        features = arrayrecord.image_features(images.class_names)
        splits = {"train": (summary.pop("lengths"), summary["bytes"])}
        arrayrecord.write_metadata(work, features, splits, description)
        files.write_json(work / "prepared.json", summary)
        for file in [*(shard.report for shard in shards), work / "plan.json", work / "lock"]:
            file.unlink()
        work.rename(final)
    return final, summary


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `mae-jax prepare` is writing {folder}") from None
        yield


def _remove_leftovers(work: Path, plan: dict[str, Any]) -> None:
    """Remove what an interrupted run cannot go on with, and remember the plan of this run."""
    if (old := _read_json(work / "plan.json")) != plan:
        if old:
            print("The images or options changed since the interruption: starting again.")
        for file in set(work.iterdir()) - {work / "lock"}:
            file.unlink()
        files.write_json(work / "plan.json", plan)
    for file in work.glob("*.part-*"):  # of a process that was killed
        file.unlink()


def _write_shards(shards: list[pack.Shard], workers: int, progress: Progress) -> dict[str, Any]:
    """Write the shards that are not there yet, in `workers` processes; return what all hold."""
    todo = [shard for shard in shards if not shard.report.exists()]
    total = sum(len(shard.source) for shard in shards)
    with progress("images", total) as advance:
        advance(total - sum(len(shard.source) for shard in todo))
        if workers == 1 or len(todo) <= 1:
            for shard in todo:
                pack.write_shard(shard)
                advance(len(shard.source))
        else:
            _write_in_processes(todo, workers, advance)
    reports = [_read_json(shard.report) for shard in shards]
    bad = dict(sorted(item for report in reports for item in report["bad"].items()))
    lengths = [report["images"] for report in reports]
    if not sum(lengths):
        name, reason = next(iter(bad.items()))
        raise UserError(f"none of the {total} files can be read, such as {name} ({reason})")
    mean, std = pack.mean_std(np.sum([report["histogram"] for report in reports], axis=0))
    return {
        "lengths": lengths,
        "images": sum(lengths),
        "bytes": sum(report["bytes"] for report in reports),
        "mean": mean,
        "std": std,
        "bad": bad,
    }


def _write_in_processes(
    shards: list[pack.Shard], workers: int, advance: Callable[[int], None]
) -> None:
    pool = futures.ProcessPoolExecutor(
        min(workers, len(shards)),
        multiprocessing.get_context("spawn"),  # a fork would copy running threads
        initializer=follow_parent,
        initargs=(signal.SIGINT,),  # the pool ends its processes by SIGTERM
    )
    try:
        running = {pool.submit(pack.write_shard, shard): shard for shard in shards}
        for future in futures.as_completed(running):
            future.result()
            advance(len(running[future].source))
    except futures.process.BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for its memory: the same command goes on where"
            " it stopped; try it with a smaller --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a file, or {} if there is none or it was cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


# --- tfds ---


def prepare_tfds(
    name: str, *, data_dir: str, manual_dir: str, progress: Progress
) -> tfds.core.DatasetBuilder:
    """Prepare a tfds dataset in ArrayRecord, or convert it if it is there as TFRecord.

    Raises:
      UserError: unknown name, missing archives, or a dataset that tfds prepares with TensorFlow
        only.
    """
    builder = find_tfds(name, data_dir)
    info = builder.info
    if not info.splits:
        if manual_dir and not Path(manual_dir).is_dir():
            raise UserError(f"--manual_dir={manual_dir}: there is no such directory")
        options = {"data_dir": data_dir or None, "file_format": "array_record"}
        config, version = info.config_name or None, str(builder.version)
        ours = imagenet.make_builder(builder.name, **options, config=config, version=version)
        if manual_dir and isinstance(ours, imagenet.ReadTestSet):
            ours.require_archive(Path(manual_dir))
        builder = ours or tfds.builder(name, **options)
        _download_and_prepare(builder, name, manual_dir)
    elif not {f.value for f in info.available_file_formats()} & {"array_record"}:
        if info.file_format.value != "tfrecord":
            raise UserError(
                f"{name!r} is stored as {info.file_format.value} in {builder.data_dir}; only"
                " tfrecord can be converted: delete the directory and prepare it again"
            )
        total = sum(split.num_examples for split in info.splits.values())
        with progress("records", total) as advance:
            arrayrecord.convert_tfrecord(builder, advance)
    return builder


def _download_and_prepare(builder: Any, name: str, manual_dir: str) -> None:
    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except AssertionError as error:
        if "Manual directory" not in str(error):
            raise
        raise UserError(f"give --manual_dir=DIR. {' '.join(str(error).split())}") from None
    except (tarfile.ReadError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"an archive in {manual_dir or 'the downloads'} is damaged or cut short ({error});"
            " compare its size and MD5 with those on the download page"
        ) from error
    except Exception as error:
        if _needs(error, "tensorflow"):
            raise UserError(
                f"tfds prepares {name!r} with TensorFlow, which mae_jax does without: where"
                f" TensorFlow is installed, run `tfds build {name} --file_format=array_record`"
                " and copy the directory"
            ) from None
        if isinstance(error, OSError):  # no network, a full disk
            by_hand = ""
            if isinstance(builder, imagenet.ReadTestSet):
                by_hand = f"; or {builder.by_hand}, and give --manual_dir=DIR"
            raise UserError(f"tfds could not prepare {name!r}: {error}{by_hand}") from error
        raise


def _needs(error: BaseException | None, package: str) -> bool:
    """Return whether an error, or what caused it, is the lack of a package."""
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == package:
            return True
        error = error.__cause__ or error.__context__
    return False
