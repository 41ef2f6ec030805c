"""Prepare: turn a folder, ImageNet's archives or a tfds dataset into ArrayRecord, once."""

import os
import re
import sys

from absl import flags

from mae_jax.commands import cli
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
    """Return what to prepare, and the options.

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
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    what = cli.parse("prepare", USAGE, argv, values)
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
        _prepare_tfds(what, values)
        return 0
    if not values.source or not values.name:
        raise UserError(f"--source=PATH and --name=NAME are both needed:\n{USAGE}")
    try:
        _prepare_folder(values)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


def _prepare_folder(values: flags.FlagValues) -> None:
    from mae_jax.data.prepare import prepare_folder

    folder, summary = prepare_folder(
        values.source.removeprefix("folder:"),
        values.name,
        data_dir=values.data_dir,
        resize=values.resize,
        quality=values.quality,
        workers=values.workers or len(os.sched_getaffinity(0)),
        progress=cli.progress,
    )
    mean, std = (tuple(round(x, 3) for x in summary[key]) for key in ("mean", "std"))
    size = f"{summary['images']:,} images, {summary['bytes'] / 1e6:,.1f} MB"
    print(f"{values.name}: {size}, in {folder}")
    if bad := list(summary["bad"].items()):
        print(f"{len(bad):,} could not be read and were left out: {cli.first_ten(bad)}")
        print(f"(all of them are listed in {folder / 'prepared.json'})")
    print(f"mean {mean}, std {std}")
    source = f"{values.name}{_data_dir(values)}"
    statistics = f"--config.data.mean='{mean}' --config.data.std='{std}'"
    print(
        f"Next: mae-jax train --config=configs/folder.py --config.data.source={source} {statistics}"
    )


def _prepare_tfds(name: str, values: flags.FlagValues) -> None:
    from mae_jax.data.prepare import prepare_tfds

    builder = prepare_tfds(
        name, data_dir=values.data_dir, manual_dir=values.manual_dir, progress=cli.progress
    )
    splits = ", ".join(f"{s.name} {s.num_examples:,}" for s in builder.info.splits.values())
    print(f"{name}: {splits}, in {builder.data_dir}")
    if "train" in builder.info.splits:
        next_step = f"configs/pretrain.py --config.data.source={name}"
    else:
        next_step = "configs/robustness.py:init=WORKDIR"
    print(f"Next: mae-jax train --config={next_step}{_data_dir(values)}")


def _data_dir(values: flags.FlagValues) -> str:
    return f" --config.data.data_dir={values.data_dir}" if values.data_dir else ""
