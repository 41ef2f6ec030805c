"""Embed: features of one's own images, of any weights, as .npy or Parquet."""

import dataclasses
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mae_jax.commands import cli, feature_file
from mae_jax.errors import UserError

USAGE = """\
mae-jax embed WEIGHTS IMAGES ... --out=FILE.npy|FILE.parquet [FLAG ...]

WEIGHTS: whatever mae-jax convert reads. IMAGES: a folder, image files, text files (.txt) with the
path of an image in every line, or one data source such as bundled:digits or a tfds dataset.

--feature: cls, the cls token, of several their mean; mean, the mean of the patches; patches, each
of them, (patches, width); tokens, the cls token and the patches, (1 + patches, width). They are
taken after the encoder's final norm, or with --layer=N after N blocks, without the norm. There is
one row for each image, in their order, cropped at the centre:
    name       of the file, or the id of the example
    label      a number; empty where there is none
    error      why the image cannot be read; else empty
    features   float32; if the image cannot be read, NaN in a .npy and empty in a .parquet
FILE.npy holds the features, and FILE.npy.csv the other columns. FILE.parquet holds all columns.

After a kill the same command goes on where it stopped, with the same result. To share the work of
one dataset among machines, give each its own part, such as --split=train[:50%], and its own --out.
"""
FEATURES: dict[str, Callable] = {
    "cls": lambda tokens_BND: tokens_BND[:, 0],
    "mean": lambda tokens_BND: tokens_BND[:, 1:].mean(1),
    "patches": lambda tokens_BND: tokens_BND[:, 1:],
    "tokens": lambda tokens_BND: tokens_BND,
}


def parse(argv: list[str]) -> tuple[str, list[str], flags.FlagValues]:
    """Return weights, images and options."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "a new file, .npy or .parquet", flag_values=values)
    flags.DEFINE_enum("feature", "cls", list(FEATURES), "what to write", flag_values=values)
    types = ("float32", "bfloat16")
    flags.DEFINE_enum("dtype", "float32", types, "type of matrix products", flag_values=values)
    text = "take features after N blocks, before the norm"
    flags.DEFINE_integer("layer", None, text, flag_values=values)
    text = "images that are computed at a time"
    flags.DEFINE_integer("batch_size", 64, text, lower_bound=1, flag_values=values)
    text = "processes that read; -1 = as the cores allow, 0 = threads"
    flags.DEFINE_integer("workers", -1, text, lower_bound=-1, flag_values=values)
    cli.define_image_flags(values, "train")
    cli.define_weight_flags(values)
    rest = cli.parse("embed", USAGE, argv, values)
    if len(rest) < 2 or not values.out:
        raise UserError(f"WEIGHTS, IMAGES and --out=FILE are wanted\n{USAGE}")
    out = Path(values.out)
    if out.suffix not in (".npy", ".parquet") or "://" in values.out:
        raise UserError(
            f"--out={out}: write a local path that ends in .npy or .parquet (.npy replaces .npz,"
            " and .parquet replaces .array_record)"
        )
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {str(out.absolute().parent)!r}")
    return rest[0], rest[1:], values


def compile_features(model: Any, params: Any, values: flags.FlagValues) -> Callable:
    """Return the function of images (B, H, W, C) that computes --feature, float32.

    A batch is split over all devices.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mae_jax.models.compute import ComputeConfig

    mesh = Mesh(np.array(jax.devices()), ("data",))
    by_row = NamedSharding(mesh, P("data"))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    model = dataclasses.replace(model, compute=ComputeConfig(jnp.dtype(values.dtype)))

    @functools.partial(jax.jit, out_shardings=by_row)
    def compute(params: Any, images_BHWC: Any) -> Any:
        return FEATURES[values.feature](model.encode(params, images_BHWC, values.layer))

    return lambda images_BHWC: compute(params, jax.device_put(images_BHWC, by_row))


# Fields that older versions of this code did not have, as they are printed with their defaults.
ADDED = ("value_range=()", "block=None", "cls_tokens=1", "channel_groups=()", "eps=1e-06")


def described(spec: Any) -> str:
    """Return a network as text without ADDED, so that what older versions began can be finished."""
    text = str(spec)
    for words in ADDED:
        text = text.replace(f", {words}", "")
    return text


def embed(
    compute: Callable,
    source: Any,
    start: int,
    batch_size: int,
    spec: Any,
    workers: int,
) -> Iterator[tuple[list[cli.Example], Any]]:
    """Yield batches of images from `start` on, and their features, which may still be computed.

    The last batch is padded to `batch_size` for `compute`, and its features with it.
    """
    import grain

    from mae_jax.data.bands import pixel_type
    from mae_jax.data.workers import read_ahead

    shape, dtype = (*spec.image_size, spec.channels), pixel_type(spec.value_range)
    padding = cli.Example(np.zeros(shape, dtype), "", -1, "")

    def read(index: int) -> dict[str, Any]:
        example = cli.read_example(source, index, spec) if index < len(source) else padding
        return dict(zip(("image", *feature_file.COLUMNS), example, strict=True))

    total = len(source) - start
    examples = grain.MapDataset.range(start, start + -(-total // batch_size) * batch_size).map(read)
    rows = np.arange(batch_size)
    batches = read_ahead(examples, batch_size, rows, shape, workers, total, dtype)
    for done, batch in zip(range(0, total, batch_size), batches, strict=True):
        columns = (batch[name].tolist() for name in feature_file.COLUMNS)
        found = itertools.starmap(cli.Example, zip(batch["image"], *columns, strict=True))
        yield list(itertools.islice(found, total - done)), compute(batch["image"])


def digest(texts: Iterable[bytes]) -> str:
    """Return a hash that changes with any of the texts."""
    return hashlib.blake2b(b"\0".join(texts), digest_size=12).hexdigest()


def describe_images(source: Any, paths: list[str], values: flags.FlagValues) -> Iterator[str]:
    """Yield texts that change with the images: names, and for files their sizes and times."""
    yield f"{len(source)} images"
    if not hasattr(source, "files"):
        yield f"{paths} {values.split} {values.data_dir}"
        return
    for file in source.files:
        path = os.path.abspath(os.path.join(source.root, file))
        status = os.stat(path) if os.path.exists(path) else None
        yield f"{path} {status and (status.st_size, status.st_mtime_ns)}"


def main(argv: list[str]) -> int:
    weights, paths, values = parse(argv)
    with feature_file.only_writer(Path(values.out)):
        return write(weights, paths, values)


def write(weights: str, paths: list[str], values: flags.FlagValues) -> int:
    """Write the features that a command line asks for; return the exit status."""
    import jax

    from mae_jax import distributed, pretrained
    from mae_jax.data.bands import pixel_type

    way_out = "run embed alone; see `mae-jax embed --help` for several machines"
    distributed.refuse_to_run_alone(os.environ, way_out)
    out = Path(values.out)
    source, *others = cli.open_images(paths, values, "train")
    if others:
        raise UserError(
            f"{', '.join(paths)}: give files, a folder or a data source, not several of these"
        )
    model, params = pretrained.load(weights, **cli.weight_options(values))
    params = {"encoder": params["encoder"]}
    compute = compile_features(model, params, values)
    devices = jax.device_count()
    batch_size = -(-values.batch_size // devices) * devices
    shape = (*model.spec.image_size, model.spec.channels)
    batch = jax.ShapeDtypeStruct((batch_size, *shape), pixel_type(model.spec.value_range))
    feature_shape = jax.eval_shape(compute, batch).shape[1:]
    made_from = {
        "weights": digest(np.asarray(x).tobytes() for x in jax.tree.leaves(params)),
        "network": described(model.spec),
        "images": digest(map(os.fsencode, describe_images(source, paths, values))),
        "feature": values.feature,
        "layer": values.layer,
        "dtype": values.dtype,
        "batch_size": batch_size,
    }
    total = len(source)
    rows = feature_file.begin(out, made_from, (total, *feature_shape), batch_size)
    if out.exists():
        print(f"{out} is complete: nothing to do")
        return 0
    if rows:
        print(f"{len(rows):,} of {total:,} images were done before: going on", flush=True)
    with cli.progress("images", total) as advance:
        advance(len(rows))
        batches = embed(compute, source, len(rows), batch_size, model.spec, values.workers)
        times = []  # after each batch
        for count in feature_file.append(out, rows, batches):
            times.append((len(rows), time.monotonic()))
            advance(count)

    feature_file.finish(out, rows)
    print(f"{out}: {values.feature} of {total:,} images")
    if len(times) > 1:  # the first batch, which compiles, is not timed
        images, seconds = (b - a for a, b in zip(times[0], times[-1], strict=True))
        print(f"{images / seconds:,.1f} images/s, reading included, in batches of {batch_size}")
    if unreadable := [(name, error) for name, _, error in rows if error]:
        table = f"{out}.csv" if out.suffix == ".npy" else out
        print(f"{len(unreadable):,} could not be read: {cli.first_ten(unreadable)}")
        print(f"(they have no features; the column `error` of {table} says why)")
    return 0
