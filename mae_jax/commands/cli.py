"""Pieces that commands share: flags, the weights and images that flags name, and a progress bar."""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from mae_jax import files
from mae_jax.errors import UserError


def parse(command: str, usage: str, argv: list[str], values: flags.FlagValues) -> list[str]:
    """Parse a command line into `values`; return the arguments that are no flags.

    --help prints `usage` and all flags, and ends the process.
    """
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    try:
        rest = values([f"mae-jax {command}", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values.help:
        print(usage)
        print(values.get_help(include_special_flags=False))
        raise SystemExit(0)
    return rest


class Parser(flags.ArgumentParser):
    """A function that reads the text of a flag, or raises ValueError with what to write."""

    def __init__(self, read: Callable[[str], Any]):
        self._read = read

    def parse(self, argument: str) -> Any:
        return self._read(argument)


def size(text: str) -> tuple[int, int]:
    """Return (height, width) of '224' or '224x448'."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise ValueError("write SIDE or HEIGHTxWIDTH, such as 224 or 224x448")
    return int(match[1]), int(match[2] or match[1])


def numbers(text: str, kind: type = float) -> tuple[Any, ...]:
    """Return the numbers of '0.5,0.25', or, of another kind, of '3,2,1'."""
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError:
        whole = "whole " * (kind is int)
        raise ValueError(f"write {whole}numbers with commas between them") from None


SHOWN = ("test", "validation", "train")  # splits in the order in which pictures ask for them
COUNT = flags.IntegerParser(lower_bound=1)
WEIGHT_FLAGS: dict[str, tuple[flags.ArgumentParser, str]] = {  # arguments of `mae_jax.load`
    "part": (flags.EnumParser(["all", "encoder"]), "weights to read; none = all"),
    "key": (Parser(str), "where a file has its weights, such as teacher; none = found by name"),
    "image_size": (Parser(size), "images to make a model for: SIDE or HEIGHTxWIDTH"),
    "mean": (Parser(numbers), "mean of each channel, of pixels from 0 to 1"),
    "std": (Parser(numbers), "standard deviation of each channel, of pixels from 0 to 1"),
    "value_range": (Parser(numbers), "values of TIFF or .npy that become 0 and 1: LOW,HIGH"),
    "heads": (COUNT, "heads of the encoder, where the file does not say"),
    "decoder_heads": (COUNT, "heads of the decoder, where the file does not say"),
    "target": (
        flags.EnumParser(["pixels", "norm_pixels"]),
        "what the decoder predicts, where the file does not say",
    ),
}
WEIGHT_SWITCHES = {
    "averaged": "read the averaged weights of a run with config.ema",
    "allow_unused": "ignore tensors that the network does not have",
}


def define_weight_flags(values: flags.FlagValues) -> None:
    """Define the flags that say how weights are read."""
    for name, (parser, text) in WEIGHT_FLAGS.items():
        flags.DEFINE(parser, name, None, text, flag_values=values)
    for name, text in WEIGHT_SWITCHES.items():
        flags.DEFINE_bool(name, False, text, flag_values=values)


def weight_options(values: flags.FlagValues) -> dict[str, Any]:
    """Return the flags of weights that are set, as keyword arguments of `mae_jax.load`."""
    options = {name: values[name].value for name in (*WEIGHT_FLAGS, *WEIGHT_SWITCHES)}
    return {name: value for name, value in options.items() if value is not None}


def check_mfu(mfu: float) -> None:
    """Raise UserError if --mfu is no fraction."""
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu} is a fraction of the chips' peak: choose 0.3 to 0.6")


def define_image_flags(values: flags.FlagValues, default: str) -> None:
    """Define the flags that say which images of a data source are read."""
    text = f"split of a data source, or slices such as train[:90%]; none = {default}"
    flags.DEFINE_string("split", None, text, flag_values=values)
    flags.DEFINE_string("data_dir", "", "where tfds datasets live", flag_values=values)


def open_images(paths: Sequence[str], values: flags.FlagValues, *splits: str) -> list[Any]:
    """Return data sources: one for files that follow each other, one for any other path.

    A path is an image file, a text file (.txt) with the path of an image in every line, a folder,
    or a data source such as bundled:photos, of which --split is read, or the first of `splits` that
    it has.
    """
    from mae_jax.data import sources
    from mae_jax.data.folder import FolderSource

    opened: list[Any] = []
    for are_files, group in itertools.groupby(paths, os.path.isfile):
        if are_files:
            names = [name for path in group for name in _listed(path)]
            unlabelled = np.full(len(names), -1, np.int32)
            opened.append(FolderSource("", names, unlabelled, None))
            continue
        for path in group:
            name, known = (f"folder:{path}", ("train",)) if os.path.isdir(path) else (path, splits)
            open_split = partial(sources.open_source, name, data_dir=values.data_dir)
            opened.append(open_split_of(values, known, open_split))
    if not any(map(len, opened)):
        raise UserError(f"{', '.join(paths)}: no image is listed there")
    return opened


def open_split_of(
    values: flags.FlagValues, splits: Sequence[str], open_split: Callable[[str], Any]
) -> Any:
    """Return what a function opens of --split, or of the first of some splits that is there."""
    splits = (values.split,) if values.split else splits
    for split in splits[:-1]:
        with contextlib.suppress(UserError):
            return open_split(split)
    return open_split(splits[-1])


def plain_names(names: Sequence[str]) -> list[str]:
    """Return numbered file names, made of the names of images."""
    plain = [
        re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(os.path.basename(x))[0]) for x in names
    ]
    return [f"{i:02d}-{name}" for i, name in enumerate(plain)]


def _listed(path: str) -> list[str]:
    """Return the files in the lines of a .txt, relative to its folder; or the file itself."""
    if not path.endswith(".txt"):
        return [path]
    text = files.read_bytes(path).removeprefix(b"\xef\xbb\xbf")  # as Windows' editor begins a file
    lines = [line.rstrip("\r") for line in os.fsdecode(text).split("\n")]
    return [os.path.join(os.path.dirname(path), line) for line in lines if line.strip()]


class Example(NamedTuple):
    """An image as a model takes it, and what a data source says about it."""

    image_HWC: np.ndarray  # zeros if the image cannot be read
    name: str
    label: int  # -1 = none
    error: str  # why the image cannot be read; '' = it can


def read_example(source: Any, index: int, spec: Any) -> Example:
    """Return the centre crop of an image of a data source, as a ModelSpec wants it."""
    from mae_jax.data import bad_images, bands, crops

    shape, dtype = (*spec.image_size, spec.channels), bands.pixel_type(spec.value_range)
    try:
        record, picture = bad_images.read(source, index, spec.channels, dtype)
        image, error = crops.center(picture, shape[:2]), ""
    except bad_images.BadImage as reason:
        record, image, error = source[index], np.zeros(shape, dtype), str(reason)
    return Example(image, record["name"], record["label"], error)


def first_ten(unreadable: Sequence[tuple[str, str]]) -> str:
    """Return the first ten of (name of an image, why it cannot be read), as text."""
    shown = [f"{name} ({reason})" for name, reason in unreadable[:10]]
    return ", ".join(shown) + (", ..." if len(unreadable) > len(shown) else "")


@contextlib.contextmanager
def progress(unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of units just done.

    Draws a bar on a terminal, and prints a line at every tenth of `total` elsewhere.
    """
    if sys.stderr.isatty():
        from rich import progress as rich

        columns = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
        with rich.Progress(rich.TextColumn(unit), *columns) as bar:
            task = bar.add_task(unit, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done * 10 // total, done + count
        if done * 10 // total > before:
            print(f"{done:,} of {total:,} {unit}", flush=True)

    yield advance
