"""Embed: features of one's own images, of any weights, as .npy or Parquet."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
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


def parse(argv: list[str]) -> tuple[str, list[str], flags.FlagValues]:
    """Return weights, images and options.

    Raises:
      UserError: an argument is missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "a new file, .npy or .parquet", flag_values=values)
    flags.DEFINE_enum("feature", "cls", list(FEATURES), "what to write", flag_values=values)
    types = ("float32", "bfloat16")
    flags.DEFINE_enum("dtype", "float32", types, "type of matrix products", flag_values=values)
    for name, default, lowest, text in (
        ("layer", None, None, "take features after N blocks, before the norm"),
        ("batch_size", 64, 1, "images that this host computes at a time"),
        ("num_hosts", None, 1, "number of hosts, without --distributed"),
        ("host", None, 0, "number of this host, from 0"),
    ):
        flags.DEFINE_integer(name, default, text, lowest, flag_values=values)
    flags.DEFINE_bool("distributed", False, "join a TPU pod or a cluster", flag_values=values)
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


def digest(texts: Iterable[bytes]) -> str:
    """Return a hash that changes with any of the texts."""
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
                f"{', '.join(paths)}: give files, a folder or a data source, not several of these"
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
    done = feature_file.begin(out, plan, (last - first, *feature_shape), batch_size)
    if out.exists():
        print(f"{out} is complete: nothing to do")
        return 0
    if done:
        print(f"{done:,} of {last - first:,} images were done before: going on", flush=True)
    batches = embed(compute, source, range(first + done, last), batch_size, shape)
    with cli.progress("images", last - first) as advance:
        advance(done)
        times = feature_file.write(out, done, batches, advance)

    unreadable = feature_file.finish(out)
    print(f"{out}: {values.feature} of {last - first:,} images")
    if len(times) > 1:  # the first batch, which compiles, is not timed
        images, seconds = (b - a for a, b in zip(times[0], times[-1], strict=True))
        print(f"{images / seconds:,.1f} images/s, reading included, in batches of {batch_size}")
    if unreadable:
        table = f"{out}.csv" if out.suffix == ".npy" else out
        print(f"{len(unreadable):,} could not be read: {cli.first_ten(unreadable)}")
        print(f"(they have no features; the column `error` of {table} says why)")
    return 0
