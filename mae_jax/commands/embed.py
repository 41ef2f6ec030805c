"""Embed: features of one's own images, of any weights, as .npz, Parquet or ArrayRecord."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from mae_jax.commands.convert import size
from mae_jax.commands.prepare import few, progress, read_json
from mae_jax.errors import UserError

USAGE = """\
mae-jax embed WEIGHTS IMAGES ... --out=FILE.npz|FILE.parquet|FILE.array_record [FLAG ...]

WEIGHTS: whatever mae-jax convert reads. IMAGES: a folder, image files, text files (.txt) with the
path of an image in every line, or one data source such as bundled:digits or a tfds dataset.

--feature: cls, the cls token; mean, of the patches; patches, each of them (patches, width); tokens,
cls token and patches (1 + patches, width). After the encoder's final norm, or with --layer=N after
N blocks, without it. One row for each image, in their order, cropped at its centre:
    name       of the file, or the id of the example
    label      a number; -1 (Parquet: null; ArrayRecord: absent) where there is none
    features   float32; of an image that cannot be read NaN (Parquet: null; ArrayRecord: absent)
    error      why it could not be read; else empty (Parquet: null; ArrayRecord: absent)
A record of ArrayRecord is a tf.train.Example; features of several tokens stand there in one row.

Killed, the same command goes on where it stopped, with the same result. On several hosts each
writes its share, in order, as FILE-00000-of-0000N: --distributed on a pod or a cluster; elsewhere
--num_hosts=N --host=I, also one after another.
"""
FEATURES = ("cls", "mean", "patches", "tokens")
THREADS = 16  # that read images
PART_BYTES = 2**28  # of features, at most, between two saves


class Rows(NamedTuple):
    """Of N images, in their order."""

    name: np.ndarray  # str
    label: np.ndarray  # int32; -1 = none
    features: np.ndarray  # float32 [N, ...]; NaN where the image cannot be read
    error: np.ndarray  # str, '' = none


def parse(argv: list[str]) -> tuple[list[str], flags.FlagValues]:
    """Weights and images, and options.

    Raises:
      UserError: something is missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "a new file; its suffix is its format", flag_values=values)
    flags.DEFINE_enum("feature", "cls", FEATURES, "of each image", flag_values=values)
    flags.DEFINE_integer(
        "layer", None, "after so many blocks; none = after the norm", flag_values=values
    )
    flags.DEFINE_integer("batch_size", 64, "of this host", lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "dtype", "float32", ("float32", "bfloat16"), "to compute in", flag_values=values
    )
    flags.DEFINE_string("split", "train", "or slices, as in tfds", flag_values=values)
    flags.DEFINE_string("data_dir", "", "where tfds datasets live", flag_values=values)
    flags.DEFINE_string("image_size", None, "SIDE or HEIGHTxWIDTH", flag_values=values)
    flags.DEFINE_integer("heads", None, "where the file does not say", flag_values=values)
    flags.DEFINE_integer("decoder_heads", None, "where the file does not say", flag_values=values)
    flags.DEFINE_bool(
        "averaged", False, "of a run with config.ema, the averaged weights", flag_values=values
    )
    flags.DEFINE_integer(
        "save_every", 2048, "images: what a kill may cost", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool(
        "distributed", False, "one of several hosts, of a TPU pod or a cluster", flag_values=values
    )
    flags.DEFINE_integer("num_hosts", None, "elsewhere: of how many", flag_values=values)
    flags.DEFINE_integer("host", None, "which one, from 0", flag_values=values)
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    try:
        rest = values(["mae-jax embed", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values.help:
        print(USAGE)
        print(values.main_module_help() or values.get_help())
        raise SystemExit(0)
    if len(rest) < 2 or not values.out:
        raise UserError(f"WEIGHTS, IMAGES and --out=FILE are wanted\n{USAGE}")
    if Path(values.out).suffix not in WRITERS or "://" in values.out:
        raise UserError(
            f"--out={values.out}: write a local path that ends in {' or '.join(WRITERS)}"
        )
    if (values.num_hosts is None) != (values.host is None) or (
        values.num_hosts is not None and not 0 <= values.host < values.num_hosts
    ):
        raise UserError(
            f"--num_hosts={values.num_hosts} --host={values.host}: give both, with --host from 0 to"
            " num_hosts - 1"
        )
    return rest, values


def open_images(places: list[str], split: str, data_dir: str) -> Any:
    """The source of files and lists of files, of one folder, or of one dataset.

    Raises:
      UserError: they are none of these, or empty.
    """
    from mae_jax.data import sources

    if not all(Path(place).is_file() for place in places):
        if len(places) > 1:
            raise UserError(
                f"{', '.join(places)}: give files, or one folder, or one data source, and not"
                " several of these"
            )
        folder = Path(places[0]).is_dir()
        name = f"folder:{places[0]}" if folder else places[0]
        return sources.open_source(name, split, data_dir)
    files: list[str] = []
    for place in places:
        if place.endswith(".txt"):
            lines = os.fsdecode(Path(place).read_bytes()).splitlines()
            files += [os.path.join(os.path.dirname(place), line) for line in lines if line.strip()]
        else:
            files.append(place)
    if not files:
        raise UserError(f"{', '.join(places)}: no image is listed there")
    return sources.FolderSource("", files, np.full(len(files), -1, np.int32), None)


def compute(model: Any, params: Any, images: Any, feature: str, layer: int | None) -> Any:
    """(B, ...), float32: what --feature and --layer name, of images (B, H, W, C)."""
    tokens_BND = model.encode(params, images, layer)
    return {
        "cls": lambda: tokens_BND[:, 0],
        "mean": lambda: tokens_BND[:, 1:].mean(1),
        "patches": lambda: tokens_BND[:, 1:],
        "tokens": lambda: tokens_BND,
    }[feature]()


def embed(
    call: Callable, source: Any, first: int, last: int, batch_size: int, shape: tuple
) -> Iterator[Rows]:
    """Rows of the images from `first` to before `last`, in batches; the last is padded within.

    Args:
      call: uint8 [batch_size, *shape] -> features; may return before they are computed.
      shape: (H, W, C).
    """
    import grain

    from mae_jax.data import crops, transforms

    def load(index: int) -> tuple[np.ndarray, str, int, str]:
        record = source[index]
        name, label = record["name"], record["label"]
        try:
            if "unreadable" in record:
                raise transforms.BadImage(record["unreadable"])
            picture = transforms.decode(record["image"], shape[-1])
            return crops.center(picture, shape[:2]), name, label, ""
        except transforms.BadImage as error:
            return np.zeros(shape, np.uint8), name, label, str(error)

    def rows(names, labels, errors, x) -> Rows:
        features = np.array(x[: len(names)], np.float32)
        features[[bool(error) for error in errors]] = np.nan
        return Rows(np.array(names), np.array(labels, np.int32), features, np.array(errors))

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * batch_size)
    reader = grain.MapDataset.range(first, last).map(load).to_iter_dataset(options)
    before = None
    with contextlib.closing(iter(reader)) as loaded:
        while batch := list(itertools.islice(loaded, batch_size)):
            images, *about = zip(*batch, strict=True)
            padded = np.zeros((batch_size, *shape), np.uint8)
            padded[: len(images)] = images
            x = call(padded)
            if before is not None:  # while the device computes this batch
                yield rows(*before)
            before = (*about, x)
    if before is not None:
        yield rows(*before)


# --- files: all are written part after part, so that memory holds one ---


def column(part: Path, name: str) -> np.ndarray:
    with np.load(part) as rows:
        return rows[name]


def read(part: Path) -> Rows:
    return Rows(*(column(part, name) for name in Rows._fields))


def bounds(part: Path) -> tuple[int, int]:
    """The images of a part, by its name: the first, and the one after the last."""
    first, last = map(int, part.stem.split("-"))
    return first, last


def write_npz(path: Path, parts: list[Path]) -> None:
    count = bounds(parts[-1])[1] - bounds(parts[0])[0]
    shape = (count, *column(parts[0], "features").shape[1:])
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w") as archive:
        for name in Rows._fields:
            pieces = (column(part, name) for part in parts)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                if name == "features":
                    np.lib.format.write_array_header_2_0(file, header)
                    for piece in pieces:
                        file.write(piece.data.cast("B"))
                else:
                    np.lib.format.write_array(file, np.concatenate(list(pieces)))


def write_parquet(path: Path, parts: list[Path]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def lists(x: np.ndarray, missing: np.ndarray | None = None) -> Any:
        """The rows of an array, as lists of numbers or of lists."""
        flat = x.reshape(-1, *x.shape[2:])
        inner = pa.array(flat) if flat.ndim == 1 else lists(flat)
        offsets = np.arange(len(x) + 1, dtype=np.int32) * x.shape[1]
        mask = None if missing is None else pa.array(missing)
        return pa.ListArray.from_arrays(offsets, inner, mask=mask)

    def table(rows: Rows) -> Any:
        bad = rows.error != ""
        columns = {
            "name": pa.array(rows.name, pa.string()),
            "label": pa.array(rows.label, mask=rows.label < 0),
            "features": lists(rows.features, bad),
            "error": pa.array(rows.error, pa.string(), mask=~bad),
        }
        return pa.table(columns)

    with parquet.ParquetWriter(path, table(read(parts[0])).schema) as writer:
        for part in parts:
            writer.write_table(table(read(part)))


def write_arrayrecord(path: Path, parts: list[Path]) -> None:
    from tensorflow_datasets.proto import tf_example_pb2
    from tensorflow_datasets.proto import tf_feature_pb2 as proto

    from mae_jax.data import arrayrecord

    def text(x: str) -> Any:
        return proto.Feature(bytes_list=proto.BytesList(value=[x.encode()]))

    def records() -> Iterator[bytes]:
        for part in parts:
            for name, label, features, error in zip(*read(part), strict=True):
                columns = {"name": text(name)}
                if label >= 0:
                    columns["label"] = proto.Feature(int64_list=proto.Int64List(value=[label]))
                if error:
                    columns["error"] = text(error)
                else:
                    numbers = proto.FloatList(value=features.reshape(-1))
                    columns["features"] = proto.Feature(float_list=numbers)
                record = proto.Features(feature=columns)
                yield tf_example_pb2.Example(features=record).SerializeToString()

    arrayrecord.write_shard(path, records())


WRITERS = {".npz": write_npz, ".parquet": write_parquet, ".array_record": write_arrayrecord}


# --- the command ---


def digest(*texts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(texts), digest_size=12).hexdigest()


def stamp(file: str) -> bytes:
    """What changes when a file is written again: its size and time; b"" where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return b""
    return f"{found.st_size} {found.st_mtime_ns}".encode()


def resume(out: Path, plan: dict) -> tuple[Path, int] | None:
    """The folder of the parts of `out`, and the first image that is not done; None: all is done.

    Raises:
      UserError: `out` is there, and of another plan.
    """
    work = Path(f"{out}.part")
    if out.exists():
        if read_json(Path(f"{out}.json")).get("plan") != plan:
            raise UserError(f"{out} is there already: choose another name, or remove it")
        shutil.rmtree(work, ignore_errors=True)
        return None
    work.mkdir(exist_ok=True)
    if (kept := read_json(work / "plan.json")) != plan:
        if kept:
            print("The images, weights or options changed since the interruption: starting again.")
        for file in work.iterdir():
            file.unlink()
        (work / "plan.json").write_text(json.dumps(plan))
    parts = sorted(work.glob("*.npz"))
    return work, bounds(parts[-1])[1] if parts else plan["first"]


def save(work: Path, first: int, batches: list[Rows]) -> int:
    """Rows from `first` on, as a part, whole or not at all; returns the one after the last."""
    rows = Rows(*map(np.concatenate, zip(*batches, strict=True)))
    with (work / "partial").open("wb") as file:
        np.savez(file, **rows._asdict())
    last = first + len(rows.name)
    (work / "partial").replace(work / f"{first:012d}-{last:012d}.npz")
    return last


def finish(out: Path, work: Path, plan: dict) -> tuple[int, dict[str, str]]:
    """Makes `out` of its parts; returns how many images could not be read, and their names.

    Raises:
      UserError: none could be read.
    """
    parts = sorted(work.glob("*.npz"))
    unreadable = [
        (str(name), str(error))
        for part in parts
        for name, error in zip(column(part, "name"), column(part, "error"), strict=True)
        if error
    ]
    count, bad = len(unreadable), dict(unreadable)  # an image may be listed twice
    if count == plan["images"]:
        shutil.rmtree(work)
        raise UserError(f"none of the {count:,} images can be read: {few(bad)}")
    WRITERS[out.suffix](work / "whole", parts)
    Path(f"{out}.json").write_text(json.dumps({"plan": plan, "bad": bad}, indent=1))
    (work / "whole").replace(out)
    shutil.rmtree(work)
    return count, bad


def main(argv: list[str]) -> int:
    (weights, *places), values = parse(argv)
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mae_jax import distributed, pretrained
    from mae_jax.models.vit import ComputeConfig

    host, hosts = values.host or 0, values.num_hosts or 1
    if values.distributed:
        distributed.join()
        host, hosts = jax.process_index(), jax.process_count()
    elif values.num_hosts is None:
        distributed.refuse_to_run_alone(os.environ)
    out = Path(values.out)
    if hosts > 1:
        out = out.with_name(f"{out.stem}-{host:05d}-of-{hosts:05d}{out.suffix}")
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    batch_size = -(-values.batch_size // mesh.size) * mesh.size

    with distributed.agreement("images and weights") as plan:
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out={out}: there is no folder {str(out.absolute().parent)!r}")
        source = open_images(places, values.split, values.data_dir)
        if len(source) < hosts:
            raise UserError(f"{len(source)} images cannot be divided among {hosts} hosts")
        options = {name: getattr(values, name) for name in ("heads", "decoder_heads", "averaged")}
        image_size = size("image_size", values.image_size)
        model, params = pretrained.load(weights, image_size=image_size, **options)
        spec, params = model.spec, {"encoder": params["encoder"]}
        if values.layer is not None and not 1 <= values.layer <= spec.depth:
            raise UserError(f"--layer={values.layer}: the encoder has layers 1 to {spec.depth}")
        names = getattr(source, "files", [*places, values.split, values.data_dir])
        plan |= {
            "weights": digest(*(np.asarray(x).tobytes() for x in jax.tree.leaves(params))),
            "network": str(spec),
            "images": len(source),
            "names": digest(*map(os.fsencode, names)),
            "feature": values.feature,
            "layer": values.layer,
            "dtype": values.dtype,
            "batch_size": batch_size,
        }
    first, last = (len(source) * i // hosts for i in (host, host + 1))
    # Names are relative to a folder, which hosts may mount at different places, or copy.
    root = getattr(source, "root", "")
    files = [os.path.join(root, name) for name in getattr(source, "files", [])[first:last]]
    place = os.path.abspath(os.path.join(root, names[0]))
    written = digest(*map(stamp, files))
    plan = plan | {"first": first, "last": last, "from": place, "written": written}
    unfinished = resume(out, plan)
    if unfinished is None:
        print(f"{out} is complete: nothing to do")
        return 0
    work, done = unfinished
    if done > first:
        print(f"{done - first:,} of {last - first:,} images were done before: going on", flush=True)

    params = jax.device_put(params, NamedSharding(mesh, P()))
    by_row = NamedSharding(mesh, P("data"))
    model = pretrained.Model(spec, ComputeConfig(jnp.dtype(values.dtype)))
    features = functools.partial(compute, model, feature=values.feature, layer=values.layer)
    compiled = jax.jit(features, out_shardings=by_row)

    def call(images: np.ndarray) -> Any:
        return compiled(params, jax.device_put(images, by_row))

    shape = (*spec.image_size, spec.channels)
    batches: list[Rows] = []
    ends: list[tuple[int, float]] = []  # of batches: images, time
    with progress("images", last - first) as advance:
        advance(done - first)
        for rows in embed(call, source, done, last, batch_size, shape):
            batches.append(rows)
            advance(len(rows.name))
            held = sum(len(batch.name) for batch in batches)
            ends.append((done + held, time.monotonic()))
            num_bytes = sum(batch.features.nbytes for batch in batches)
            if held >= values.save_every or num_bytes >= PART_BYTES or done + held == last:
                done, batches = save(work, done, batches), []

    count, bad = finish(out, work, plan)
    print(f"{out}: {values.feature} of {last - first:,} images")
    if len(ends) > 1:  # without the first batch, which compiles
        images, seconds = (b - a for a, b in zip(ends[0], ends[-1], strict=True))
        print(f"{images / seconds:,.1f} images/s, reading included, in batches of {batch_size}")
    if bad:
        print(f"{count:,} could not be read and have no features: {few(bad)}")
        print(f"(all of them are listed in {out}.json)")
    return 0
