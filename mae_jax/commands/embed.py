"""Embed: features of one's own images, of any weights, as .npy or Parquet."""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mae_jax import files
from mae_jax.commands import cli
from mae_jax.errors import UserError

USAGE = """\
mae-jax embed WEIGHTS IMAGES ... --out=FILE.npy|FILE.parquet [FLAG ...]

WEIGHTS: whatever mae-jax convert reads. IMAGES: a folder, image files, text files (.txt) with the
path of an image in every line, or one data source such as bundled:digits or a tfds dataset.

--feature: cls, the cls token; mean, the mean of the patches; patches, each of them, (patches,
width); tokens, the cls token and the patches, (1 + patches, width). They are taken after the
encoder's final norm, or with --layer=N after N blocks, without the norm. There is one row for each
image, in their order, cropped at the centre:
    name       of the file, or the id of the example
    label      a number; empty where there is none
    error      why the image cannot be read; else empty
    features   float32; if the image cannot be read, NaN in a .npy and empty in a .parquet
FILE.npy holds the features, and FILE.npy.csv the other columns. FILE.parquet holds all columns.

After a kill the same command goes on where it stopped, with the same result. On several hosts each
writes its share, in order, as FILE-00000-of-0000N: --distributed on a pod or a cluster; elsewhere
--num_hosts=N --host=I, also one after another.
"""
FEATURES: dict[str, Callable] = {
    "cls": lambda tokens_BND: tokens_BND[:, 0],
    "mean": lambda tokens_BND: tokens_BND[:, 1:].mean(1),
    "patches": lambda tokens_BND: tokens_BND[:, 1:],
    "tokens": lambda tokens_BND: tokens_BND,
}
REPLACEMENTS = {".npz": ".npy", ".array_record": ".parquet"}  # of formats that are gone
THREADS = 16  # that read images
GROUP_BYTES = 2**26  # features of a row group of Parquet


def parse(argv: list[str]) -> tuple[str, list[str], flags.FlagValues]:
    """Return weights, images and options.

    Raises:
      UserError: an argument is missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    types = ("float32", "bfloat16")
    flags.DEFINE_string("out", None, "a new file, .npy or .parquet", flag_values=values)
    flags.DEFINE_enum("feature", "cls", list(FEATURES), "of each image", flag_values=values)
    flags.DEFINE_integer("layer", None, "after N blocks, not after the norm", flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "of this host", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("dtype", "float32", types, "of matrix products", flag_values=values)
    flags.DEFINE_bool("distributed", False, "join a TPU pod or a cluster", flag_values=values)
    flags.DEFINE_integer("num_hosts", None, "elsewhere, how many", flag_values=values)
    flags.DEFINE_integer("host", None, "which of them, from 0", flag_values=values)
    cli.define_image_flags(values, split="train")
    cli.define_weight_flags(values)
    rest = cli.parse("embed", USAGE, argv, values)
    if len(rest) < 2 or not values.out:
        raise UserError(f"WEIGHTS, IMAGES and --out=FILE are wanted\n{USAGE}")
    out, hosts = Path(values.out), values.num_hosts
    if new := REPLACEMENTS.get(out.suffix):
        raise UserError(
            f"--out={out}: {out.suffix} is no longer written; {new} replaces it, such as"
            f" --out={out.with_suffix(new)}"
        )
    if out.suffix not in REPLACEMENTS.values() or "://" in values.out:
        raise UserError(f"--out={out}: write a local path that ends in .npy or .parquet")
    if (hosts is None) != (values.host is None) or (hosts and not 0 <= values.host < hosts):
        raise UserError(
            f"--num_hosts={hosts} --host={values.host}: give both, with --host from 0 to"
            " num_hosts - 1"
        )
    return rest[0], rest[1:], values


def compile_features(model: Any, params: Any, values: flags.FlagValues) -> Callable:
    """Return the function of uint8 images (B, H, W, C) that computes --feature, float32.

    A batch is split over this host's devices.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mae_jax.models.spec import ComputeConfig

    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    by_row = NamedSharding(mesh, P("data"))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    model = dataclasses.replace(model, compute=ComputeConfig(jnp.dtype(values.dtype)))

    @functools.partial(jax.jit, out_shardings=by_row)
    def compute(params: Any, images_BHWC: Any) -> Any:
        return FEATURES[values.feature](model.encode(params, images_BHWC, values.layer))

    return lambda images_BHWC: compute(params, jax.device_put(images_BHWC, by_row))


def embed(
    compute: Callable, source: Any, indices: range, batch_size: int, shape: tuple[int, int, int]
) -> Iterator[tuple[list[cli.Example], Any]]:
    """Yield batches of images, and their features, which may still be computed.

    The last batch is padded to `batch_size` for `compute`, and its features with it.
    """
    import grain

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * batch_size)
    read = functools.partial(cli.read_example, source, shape=shape)
    dataset = grain.MapDataset.range(indices.start, indices.stop).map(read)
    with contextlib.closing(iter(dataset.to_iter_dataset(options))) as examples:
        while batch := list(itertools.islice(examples, batch_size)):
            images_BHWC = np.zeros((batch_size, *shape), np.uint8)
            images_BHWC[: len(batch)] = [example.image_HWC for example in batch]
            yield batch, compute(images_BHWC)


# --- the output, and the files beside it ---


def beside(out: Path) -> tuple[Path, Path, Path]:
    """Return where features and where the other columns grow, and what says of which plan."""
    return Path(f"{out}.part"), Path(f"{out}.csv"), Path(f"{out}.json")


def begin(out: Path, plan: dict, shape: tuple[int, ...], batch_size: int) -> int:
    """Make the files beside `out`, or find those of an interruption; return the rows done.

    Args:
      shape: of all features, with one row for each image.

    Raises:
      UserError: `out` is there, and was made by another plan.
    """
    part, columns, plan_file = beside(out)
    same = plan_file.exists() and json.loads(plan_file.read_text()) == plan
    if out.exists():
        if not same:
            raise UserError(f"{out} is there already: choose another name, or remove it")
        return shape[0]
    rows = []
    if part.exists() and same:
        rows = read_columns(columns)[:-1]  # the last one may be cut short
    elif part.exists():
        print("The images, weights or options changed since the interruption: starting again.")
    rows = rows[: len(rows) // batch_size * batch_size]
    write_columns(columns, rows)
    if not rows:
        part.unlink(missing_ok=True)
        files.write_json(plan_file, plan)
        np.lib.format.open_memmap(part, "w+", np.float32, shape=shape)
        with part.open("r+b") as file:  # a full disk would kill whoever writes to a mapped file
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return len(rows)


def read_columns(path: Path) -> list[list[str]]:
    """Return name, label and error of each image."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def write_columns(path: Path, rows: list[list[str]]) -> None:
    with files.replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["name", "label", "error"], *rows])


def write(out: Path, done: int, batches: Iterator, advance: Callable) -> list[tuple[int, float]]:
    """Add the rows of all batches to the files beside `out`; return when how many were done."""
    part, columns, _ = beside(out)
    features = np.lib.format.open_memmap(part, "r+")
    times = []
    with columns.open("a", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        # In pairs, so that the device computes a batch while the next one is read.
        for (batch, computed), _ in itertools.pairwise(itertools.chain(batches, [None])):
            rows = slice(done, done := done + len(batch))
            features[rows] = np.asarray(computed)[: len(batch)]
            features[rows][[bool(example.error) for example in batch]] = np.nan
            table.writerows((x.name, x.label if x.label >= 0 else "", x.error) for x in batch)
            file.flush()  # after the features: what is listed is done
            times.append((done, time.monotonic()))
            advance(len(batch))
    return times


def finish(out: Path) -> list[tuple[str, str]]:
    """Make `out` of the files beside it; return the images that cannot be read, and why.

    Raises:
      UserError: none of the images can be read.
    """
    part, columns, _ = beside(out)
    rows = read_columns(columns)
    unreadable = [(name, error) for name, _, error in rows if error]
    if len(unreadable) == len(rows):
        for path in beside(out):
            path.unlink()
        raise UserError(f"none of the {len(rows)} images can be read: {cli.first_ten(unreadable)}")
    if out.suffix == ".npy":
        part.replace(out)
    else:
        with files.replacing(out) as whole:
            write_parquet(whole, np.load(part, mmap_mode="r"), rows)
        part.unlink()
        columns.unlink()
    return unreadable


def write_parquet(path: os.PathLike, features: np.ndarray, rows: list[list[str]]) -> None:
    """Write features and the other columns as one table, a group of rows at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.float32()
    for _ in features.shape[1:]:
        kind = pa.list_(kind)
    text = pa.string()
    schema = pa.schema({"name": text, "label": pa.int32(), "features": kind, "error": text})
    group = max(1, GROUP_BYTES // features[0].nbytes)
    with parquet.ParquetWriter(os.fspath(path), schema) as writer:
        for start in range(0, len(rows), group):
            names, labels, errors = zip(*rows[start : start + group], strict=True)
            good = [
                None if error else x if x.ndim == 1 else list(x)
                for x, error in zip(features[start : start + group], errors, strict=True)
            ]
            columns = {
                "name": names,
                "label": [int(label) if label else None for label in labels],
                "features": good,
                "error": [error or None for error in errors],
            }
            writer.write_table(pa.Table.from_pydict(columns, schema))


# --- the command ---


def digest(texts: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"\0".join(texts), digest_size=12).hexdigest()


def images_of_host(source: Any, paths: list[str], indices: range) -> dict[str, Any]:
    """Return what changes with the images of one host, whose folder others may have elsewhere."""
    root, names = getattr(source, "root", ""), getattr(source, "files", [])

    def stamp(file: str) -> bytes:
        """Return what changes when a file is written again; b"" without a file."""
        try:
            status = os.stat(os.path.join(root, file))
        except OSError:
            return b""
        return f"{status.st_size} {status.st_mtime_ns}".encode()

    return {
        "first": indices.start,
        "last": indices.stop,
        "from": os.path.abspath(os.path.join(root, (names or paths)[0])),
        "written": digest(map(stamp, names[indices.start : indices.stop])),
    }


def main(argv: list[str]) -> int:
    weights, paths, values = parse(argv)
    import jax

    from mae_jax import distributed, pretrained

    host, hosts = values.host or 0, values.num_hosts or 1
    if values.distributed:
        distributed.join()
        host, hosts = jax.process_index(), jax.process_count()
    elif values.num_hosts is None:
        distributed.refuse_to_run_alone(os.environ)
    out = Path(values.out)
    if hosts > 1:
        out = out.with_name(f"{out.stem}-{host:05d}-of-{hosts:05d}{out.suffix}")
    devices = jax.local_device_count()
    batch_size = -(-values.batch_size // devices) * devices

    with distributed.agreement("images and weights") as plan:
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out={out}: there is no folder {str(out.absolute().parent)!r}")
        source, *others = cli.open_images(paths, values.split, values.data_dir, values.split)
        if others:
            raise UserError(
                f"{', '.join(paths)}: give files, or one folder, or one data source, and not"
                " several of these"
            )
        if len(source) < hosts:
            raise UserError(f"{len(source)} images cannot be divided among {hosts} hosts")
        model, params = pretrained.load(weights, **cli.weight_options(values))
        params = {"encoder": params["encoder"]}
        compute = compile_features(model, params, values)
        shape = (*model.spec.image_size, model.spec.channels)
        batch = jax.ShapeDtypeStruct((batch_size, *shape), np.uint8)
        feature_shape = jax.eval_shape(compute, batch).shape[1:]
        names = getattr(source, "files", [*paths, values.split, values.data_dir])
        plan |= {
            "weights": digest(np.asarray(x).tobytes() for x in jax.tree.leaves(params)),
            "network": str(model.spec),
            "images": len(source),
            "names": digest(map(os.fsencode, names)),
            "feature": values.feature,
            "layer": values.layer,
            "dtype": values.dtype,
            "batch_size": batch_size,
        }
    first, last = (len(source) * i // hosts for i in (host, host + 1))
    plan = plan | images_of_host(source, paths, range(first, last))
    done = begin(out, plan, (last - first, *feature_shape), batch_size)
    if out.exists():
        print(f"{out} is complete: nothing to do")
        return 0
    if done:
        print(f"{done:,} of {last - first:,} images were done before: going on", flush=True)
    batches = embed(compute, source, range(first + done, last), batch_size, shape)
    with cli.progress("images", last - first) as advance:
        advance(done)
        times = write(out, done, batches, advance)

    unreadable = finish(out)
    print(f"{out}: {values.feature} of {last - first:,} images")
    if len(times) > 1:  # the first batch, which compiles, is not timed
        images, seconds = (b - a for a, b in zip(times[0], times[-1], strict=True))
        print(f"{images / seconds:,.1f} images/s, reading included, in batches of {batch_size}")
    if unreadable:
        print(
            f"{len(unreadable):,} could not be read and have no features:"
            f" {cli.first_ten(unreadable)}\n(the column `error` of"
            f" {out if out.suffix == '.parquet' else f'{out}.csv'} has all of them)"
        )
    return 0
