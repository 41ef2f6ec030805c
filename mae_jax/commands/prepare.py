"""Prepare: turn a folder, ImageNet's archives or a tfds dataset into ArrayRecord, once."""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mae_jax.data import arrayrecord, pack
from mae_jax.data.sources import FolderSource, find_tfds, open_source
from mae_jax.errors import UserError

USAGE = """\
mae-jax prepare folder --source=PATH --name=my_images [--resize=256] [--data_dir=DIR] [--workers=N]
    One's own images, read once, checked, perhaps made smaller, and packed for fast random access.
    Interrupted, the same command goes on where it stopped.
mae-jax prepare imagenet2012 --manual_dir=DIR [--data_dir=DIR]
    ImageNet, from the directory of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
mae-jax prepare imagenet_v2|imagenet_a|imagenet_r|imagenet_sketch [--manual_dir=DIR]
    Other test images of ImageNet's classes, from the archive in DIR, or downloaded.
mae-jax prepare NAME[/CONFIG][:VERSION] [--data_dir=DIR] [--manual_dir=DIR]
    Any other tfds dataset. One that is there as TFRecord gets ArrayRecord files beside them.
"""


def parse(argv: list[str]) -> tuple[str, flags.FlagValues]:
    """What to prepare, and the options.

    Raises:
      UserError: nothing to prepare, an unknown option, a value of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("source", None, "folder of images", flag_values=values)
    flags.DEFINE_string("name", None, "name of the new dataset", flag_values=values)
    flags.DEFINE_integer(
        "resize", None, "pixels of the short side; none = keep", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "quality", 95, "JPEG quality of images that are encoded anew", 1, 100, flag_values=values
    )
    flags.DEFINE_string("data_dir", "", "where datasets live; '' = tfds's own", flag_values=values)
    flags.DEFINE_string("manual_dir", "", "where you put the archives", flag_values=values)
    flags.DEFINE_integer(
        "workers", None, "processes; none = CPU cores", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    try:
        what = values(["mae-jax prepare", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values.help:
        print(USAGE + values.get_help())
        raise SystemExit(0)
    if len(what) != 1:
        problem = f"unexpected argument {what[1]!r}" if what else "nothing to prepare"
        raise UserError(f"{problem}; write one of:\n{USAGE}")
    used = {"source", "name", "resize", "quality", "workers"}
    used = used if what[0] == "folder" else {"manual_dir"}
    for name in values:
        if values[name].present and name not in used | {"data_dir"}:
            raise UserError(f"--{name} means nothing to `mae-jax prepare {what[0]}`:\n{USAGE}")
    return what[0], values


def main(argv: list[str]) -> int:
    what, values = parse(argv)
    if "://" in values.data_dir:
        raise UserError(
            f"--data_dir={values.data_dir}: prepare in a local directory, then copy the result"
        )
    if what != "folder":
        prepare_tfds(what, values.data_dir, values.manual_dir)
        return 0
    if not values.source or not values.name:
        raise UserError(f"--source=PATH and --name=NAME are both needed:\n{USAGE}")
    try:
        prepare_folder(
            values.source.removeprefix("folder:"),
            values.name,
            data_dir=values.data_dir,
            resize=values.resize,
            quality=values.quality,
            workers=values.workers or len(os.sched_getaffinity(0)),
        )
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


# --- a folder ---


def prepare_folder(
    source: str,
    name: str,
    *,
    data_dir: str = "",
    resize: int | None = None,
    quality: int = 95,
    workers: int = 1,
) -> Path:
    """Write the images of a folder as the tfds dataset `name` and return its directory.

    Images keep their bytes where these are RGB or grey JPEG or PNG and nothing is resized; others
    become RGB JPEGs of `quality`, upright. With `resize`, the short side gets that many pixels, by
    Pillow's bicubic, and every image is encoded anew. Images that cannot be read are left out and
    named. The order is shuffled by the hashes of the names.

    Raises:
      UserError: no images; a bad or taken name; another `prepare` is writing the same dataset.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--name={name}: use small letters, digits and _, such as my_images")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"--name={name} is a dataset that tfds knows; choose another name")
    images = open_source(f"folder:{source}", "train")
    assert isinstance(images, FolderSource)
    listing = hashlib.sha256(b"\0".join(map(os.fsencode, images.files))).hexdigest()
    plan = {
        "source": images.root,
        "files": len(images),
        "listing": listing,
        "resize": resize,
        "quality": quality,
    }
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name
    final, work = root / arrayrecord.VERSION, root / f"{arrayrecord.VERSION}.incomplete"
    if final.exists():
        summary = read_json(final / "prepared.json")
        if summary.get("plan") != plan:
            raise UserError(
                f"--name={name}: {final} already exists, made from other images or options; choose"
                " another name, or delete that directory"
            )
        _report(summary, name, data_dir, final)
        return final
    work.mkdir(parents=True, exist_ok=True)
    with _only_writer(work):
        if (kept := read_json(work / "plan.json")) != plan:
            if kept:
                print("The images or options changed since the interruption: starting again.")
            for file in set(work.iterdir()) - {work / "lock"}:
                file.unlink()
            (work / "plan.json").write_text(json.dumps(plan))
        for file in work.glob("*.partial"):  # of a process that was killed
            file.unlink()
        shards = pack.make_shards(images, work, name, resize, quality)
        reports = _write_shards(shards, workers)
        lengths = [report["images"] for report in reports]
        bad = dict(sorted(item for report in reports for item in report["bad"].items()))
        if not sum(lengths):
            raise UserError(f"none of the {len(images)} files can be read: {few(bad)}")
        features = arrayrecord.image_features(images.class_names)
        size = sum(report["bytes"] for report in reports)
        arrayrecord.write_metadata(
            work, features, {"train": (lengths, size)}, f"Images of the folder {source!a}."
        )
        mean, std = pack.mean_std(np.sum([report["histogram"] for report in reports], axis=0))
        summary = {
            "plan": plan,
            "images": sum(lengths),
            "bytes": size,
            "mean": mean,
            "std": std,
            "bad": bad,
        }
        (work / "prepared.json").write_text(json.dumps(summary, indent=1))
        for file in [*(shard.report for shard in shards), work / "plan.json", work / "lock"]:
            file.unlink()
        work.rename(final)
    _report(summary, name, data_dir, final)
    return final


def _write_shards(shards: list[pack.Shard], workers: int) -> list[dict]:
    """Write what is not there yet, in `workers` processes; the reports of all shards in order."""
    todo = [shard for shard in shards if not shard.report.exists()]
    total = sum(len(shard.source) for shard in shards)
    with progress("images", total) as advance:
        advance(total - sum(len(shard.source) for shard in todo))
        if workers == 1 or len(todo) <= 1:
            for shard in todo:
                pack.write_shard(shard)
                advance(len(shard.source))
        else:
            context = multiprocessing.get_context("spawn")  # a fork would copy running threads
            pool = futures.ProcessPoolExecutor(
                min(workers, len(todo)), context, initializer=_follow_parent
            )
            try:
                running = {pool.submit(pack.write_shard, shard): shard for shard in todo}
                for future in futures.as_completed(running):
                    future.result()
                    advance(len(running[future].source))
            except futures.process.BrokenProcessPool:
                raise UserError(
                    "a worker process was killed, perhaps for its memory: the same command goes on"
                    " where it stopped; try it with a smaller --workers"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)
    return [read_json(shard.report) for shard in shards]


def _report(summary: dict, name: str, data_dir: str, folder: Path) -> None:
    mean, std = (tuple(round(x, 3) for x in summary[key]) for key in ("mean", "std"))
    print(f"{name}: {summary['images']:,} images, {summary['bytes'] / 1e6:,.1f} MB, in {folder}")
    if bad := summary["bad"]:
        print(f"{len(bad):,} could not be read and were left out: {few(bad)}")
        print(f"(all of them are listed in {folder / 'prepared.json'})")
    print(f"mean {mean}, std {std}")
    where = f" --config.data.data_dir={data_dir}" if data_dir else ""
    print(
        "Next: mae-jax train --config=configs/folder.py"
        f" --config.data.source={name}{where} --config.data.mean='{mean}' --config.data.std='{std}'"
    )


def few(bad: dict[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(bad.items())[:10]]
    return ", ".join(shown) + (", ..." if len(bad) > len(shown) else "")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _follow_parent() -> None:
    """In a worker: leave interrupts to the parent, and end when it does, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `mae-jax prepare` is writing {folder}") from None
        yield


@contextlib.contextmanager
def progress(unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line at every tenth."""
    if sys.stderr.isatty():
        columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(unit, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        before, done = done * 10 // total, done + n
        if done * 10 // total > before:
            print(f"{done:,} of {total:,} {unit}", flush=True)

    yield advance


# --- tfds ---


def prepare_tfds(name: str, data_dir: str = "", manual_dir: str = "") -> None:
    """Prepare a tfds dataset in ArrayRecord, or convert it if it is there as TFRecord.

    Raises:
      UserError: unknown name, missing archives, or a dataset that tfds prepares with TensorFlow
        only.
    """
    from mae_jax.data import imagenet  # imports part of tfds that others do not need

    builder = find_tfds(name, data_dir)
    info = builder.info
    if not info.splits:
        if manual_dir and not Path(manual_dir).is_dir():
            raise UserError(f"--manual_dir={manual_dir}: there is no such directory")
        kwargs = {"data_dir": data_dir or None, "file_format": "array_record"}
        if builder.name in imagenet.BUILDERS:
            builder = imagenet.BUILDERS[builder.name](
                **kwargs, config=info.config_name or None, version=str(builder.version)
            )
            if manual_dir and builder.name in imagenet.TEST_SETS:
                imagenet.require_archive(builder, Path(manual_dir))
        else:
            builder = tfds.builder(name, **kwargs)
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
    splits = ", ".join(f"{s.name} {s.num_examples:,}" for s in builder.info.splits.values())
    print(f"{name}: {splits}, in {builder.data_dir}")
    where = f" --config.data.data_dir={data_dir}" if data_dir else ""
    if "train" in builder.info.splits:
        next_step = f"configs/pretrain.py --config.data.source={name}"
    else:
        next_step = "configs/robustness.py:init=WORKDIR"
    print(f"Next: mae-jax train --config={next_step}{where}")


def _download_and_prepare(builder: tfds.core.DatasetBuilder, name: str, manual_dir: str) -> None:
    from mae_jax.data import imagenet

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
            if builder.name in imagenet.TEST_SETS:
                by_hand = f"; or {imagenet.by_hand(builder)}, and give --manual_dir=DIR"
            raise UserError(f"tfds could not prepare {name!r}: {error}{by_hand}") from error
        raise


def _needs(error: BaseException | None, package: str) -> bool:
    """Whether the lack of a package is at the root of an error."""
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == package:
            return True
        error = error.__cause__ or error.__context__
    return False
