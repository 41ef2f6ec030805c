"""Prepare: turn a folder, ImageNet's archives or a tfds dataset into ArrayRecord, once."""

import math
import re
import sys
from pathlib import Path
from shlex import quote

from absl import flags

from mae_jax import files
from mae_jax.commands import cli
from mae_jax.errors import UserError

USAGE = """\
mae-jax prepare folder --source=PATH --name=my_images [--resize=256] [--data_dir=DIR] [--workers=N]
    One's own images, read once, checked, perhaps made smaller, and packed for fast random access.
    Interrupted, the same command goes on where it stopped.
mae-jax prepare folder --source=PATH --value_range=LOW,HIGH
    Print mean and standard deviation of each band of TIFF or .npy files, whose values LOW and HIGH
    become 0 and 1, and the command that trains on them; they are not packed. See docs/data.md.
mae-jax prepare imagenet2012 --manual_dir=DIR [--data_dir=DIR]
    ImageNet, from the directory of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
mae-jax prepare imagenet_v2|imagenet_a|imagenet_r|imagenet_sketch [--manual_dir=DIR]
    Other test images of ImageNet's classes, from the archive in DIR, or downloaded.
mae-jax prepare ade20k --zip=ADEChallengeData2016.zip --out=DIR
mae-jax prepare voc --tar=VOCtrainval_11-May-2012.tar --out=DIR
    Images with label maps, unpacked into DIR/SPLIT/images and DIR/SPLIT/labels. See docs/dense.md.
mae-jax prepare NAME[/CONFIG][:VERSION] [--data_dir=DIR] [--manual_dir=DIR]
    Any other tfds dataset. One that is there as TFRecord gets ArrayRecord files beside them.
"""


ARCHIVES = {"ade20k": "zip", "voc": "tar"}  # what is unpacked -> the flag that names its archive


def parse(argv: list[str]) -> tuple[str, flags.FlagValues]:
    """Return what to prepare, and the options."""
    values = flags.FlagValues()
    for name, default, text in (
        ("source", None, "folder of images"),
        ("name", None, "name of the new dataset"),
        ("data_dir", "", "where datasets live; '' = tfds's own"),
        ("manual_dir", "", "where you put the archives"),
        ("zip", None, "ADE20K's archive"),
        ("tar", None, "VOC 2012's archive"),
        ("out", None, "a new folder for images and label maps"),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, text in (
        ("resize", "pixels of the short side; none = keep"),
        ("workers", "processes; none = CPU cores"),
    ):
        flags.DEFINE_integer(name, None, text, lower_bound=1, flag_values=values)
    text = "values of TIFF or .npy that become 0 and 1: LOW,HIGH"
    flags.DEFINE(cli.Parser(cli.numbers), "value_range", None, text, flag_values=values)
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    what = cli.parse("prepare", USAGE, argv, values)
    if len(what) != 1:
        problem = f"unexpected argument {what[1]!r}" if what else "nothing to prepare"
        raise UserError(f"{problem}; write one of:\n{USAGE}")
    folder = {"source", "name", "resize", "workers", "value_range"}
    archive = ARCHIVES.get(what[0])
    used = folder if what[0] == "folder" else {archive, "out"} if archive else {"manual_dir"}
    for name in values:
        if values[name].present and name not in used | ({"data_dir"} if not archive else set()):
            raise UserError(f"--{name} means nothing to `mae-jax prepare {what[0]}`:\n{USAGE}")
    if archive and not (values[archive].value and values.out):
        raise UserError(f"--{archive}=FILE and --out=DIR are both needed:\n{USAGE}")
    if archive:
        files.require_local(values.out, "--out")
    if "://" in values.data_dir:
        raise UserError(
            f"--data_dir={values.data_dir}: prepare in a local directory, then copy the result"
        )
    if values.value_range:
        low, *high = values.value_range
        finite = len(high) == 1 and math.isfinite(high[0] - low)
        if not finite or low >= high[0] or not values.source or values.name or values.resize:
            raise UserError(
                "--value_range=LOW,HIGH goes with --source=PATH and nothing but --workers: such"
                " images are measured and not packed"
            )
    elif what[0] == "folder" and not (values.source and values.name):
        raise UserError(f"--source=PATH and --name=NAME are both needed:\n{USAGE}")
    return what[0], values


def main(argv: list[str]) -> int:
    what, values = parse(argv)
    if what in ARCHIVES:
        return _unpack(what, values)
    data_dir = f" --config.data.data_dir={quote(values.data_dir)}" if values.data_dir else ""
    try:
        recipe = _prepare_folder(values) if what == "folder" else _prepare_tfds(what, values)
    except KeyboardInterrupt:
        if what != "folder" or values.value_range:  # nothing was kept
            raise
        print("\nStopped. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    print(f"Next: mae-jax train --config={recipe}{data_dir}")
    return 0


def _unpack(what: str, values: flags.FlagValues) -> int:
    """Unpack an archive of images with label maps."""
    from mae_jax.data import dense_archives

    path, out = str(values[ARCHIVES[what]].value), Path(values.out)
    unpack, meaning = {
        "ade20k": (dense_archives.unpack_ade20k, ",shift=true"),
        "voc": (dense_archives.unpack_voc, ""),
    }[what]
    counts = unpack(path, out, cli.progress)
    print(f"{out}: " + ", ".join(f"{split} {count:,} pairs" for split, count in counts.items()))
    recipe = quote(f"segment:init=WORKDIR,source=segfolder:{out}{meaning}")
    print(f"Next: mae-jax train --config={recipe}")
    return 0


def _prepare_folder(values: flags.FlagValues) -> str:
    """Prepare a folder; return the recipe to go on with, and its flags."""
    if values.value_range:
        return _measure_folder(values)
    import tensorflow_datasets as tfds

    from mae_jax.data.pack import prepare_folder
    from mae_jax.data.workers import usable_cores

    folder, summary = prepare_folder(
        values.source.removeprefix("folder:"),
        values.name,
        data_dir=values.data_dir,
        resize=values.resize,
        workers=values.workers or usable_cores(),
        progress=cli.progress,
    )
    mean, std = (tuple(round(x, 3) for x in summary[key]) for key in ("mean", "std"))
    size = f"{summary['images']:,} images, {summary['bytes'] / 1e6:,.1f} MB"
    print(f"{values.name}: {size}, in {folder}")
    if bad := list(summary["bad"].items()):
        print(f"{len(bad):,} could not be read and were left out: {cli.first_ten(bad)}")
        print(f"(all of them are listed in {folder / 'prepared.json'})")
    statistics = f"--config.data.mean='{mean}' --config.data.std='{std}'"
    splits = tfds.builder(values.name, data_dir=values.data_dir or None).info.splits
    counts = {name: split.num_examples for name, split in splits.items()}
    if len(counts) > 1:
        print("splits: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return f"configs/folder.py {statistics} --config.data.source={values.name}{_splits(counts)}"


def _splits(counts: dict[str, int]) -> str:
    """Return flags for what is trained on and what is measured; '' = those of the recipe."""
    filled = [name for name, count in counts.items() if count]
    if filled == ["train"]:
        return ""
    trained = "train" if "train" in filled else filled[0]
    held_out = next((x for x in ("validation", "test") if x in filled and x != trained), "")
    if not held_out:
        trained, held_out = f"'{trained}[:95%]'", f"'{trained}[95%:]'"
    return f" --config.data.split={trained} --config.evals.reconstruct.split={held_out}"


def _measure_folder(values: flags.FlagValues) -> str:
    """Print the statistics of a folder's bands; return the recipe to go on with, and its flags."""
    from mae_jax.data.measure import measure_folder
    from mae_jax.data.workers import usable_cores

    path, value_range = values.source.removeprefix("folder:"), values.value_range
    workers = values.workers or usable_cores()
    summary = measure_folder(path, value_range, workers, cli.progress)
    print(f"{path}: {summary['images']:,} images of {summary['channels']} bands")
    print("band  smallest   largest      mean       std   (mean and std of scaled values)")
    rows = zip(*(summary[key] for key in ("low", "high", "mean", "std")), strict=True)
    for band, (low, high, mean, std) in enumerate(rows, 1):
        print(f"{band:4}{low:10.6g}{high:10.6g}{mean:10.4g}{std:10.4g}")
    if bad := list(summary["bad"].items()):
        print(f"{len(bad):,} cannot be read: {cli.first_ten(bad)}")
    numbers = {key: tuple(float(f"{x:.4g}") for x in summary[key]) for key in ("mean", "std")}
    ends = zip(summary["low"], summary["high"], strict=True)
    constant = [low == high for low, high in ends]
    numbers["std"] = tuple(
        1.0 if flat else x for flat, x in zip(constant, numbers["std"], strict=True)
    )
    numbers["value_range"] = tuple(int(x) if x == int(x) else x for x in value_range)
    settings = " ".join(f"--config.data.{key}='{value}'" for key, value in numbers.items())
    return (
        f"configs/folder.py --config.data.source={quote(f'folder:{path}')}"
        f" --config.model.channels={summary['channels']} {settings}"
    )


def _prepare_tfds(name: str, values: flags.FlagValues) -> str:
    """Prepare a tfds dataset; return the recipe to go on with, and its flags."""
    from mae_jax.data.prepare import prepare_tfds

    builder = prepare_tfds(
        name, data_dir=values.data_dir, manual_dir=values.manual_dir, progress=cli.progress
    )
    splits = ", ".join(f"{s.name} {s.num_examples:,}" for s in builder.info.splits.values())
    print(f"{name}: {splits}, in {builder.data_dir}")
    if "train" in builder.info.splits:
        return f"configs/pretrain.py --config.data.source={name}"
    return "configs/robustness.py:init=WORKDIR"
