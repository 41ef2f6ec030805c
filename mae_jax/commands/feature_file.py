"""Write features row by row, so that a kill costs a batch and the result is the same.

While they grow, OUT.part is the .npy file of all rows, OUT.csv lists the rows that are done, and
OUT.json says what they are made from.
"""

import csv
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mae_jax import files
from mae_jax.commands import cli
from mae_jax.errors import UserError

GROUP_BYTES = 2**26  # features of a row group of Parquet


def beside(out: Path) -> tuple[Path, Path, Path]:
    """Return the files of features, of the other columns, and of the plan."""
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
        if hasattr(os, "posix_fallocate"):  # Linux
            with part.open("r+b") as file:  # or a full disk would kill who writes to a mapped file
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return len(rows)


def read_columns(path: Path) -> list[list[str]]:
    """Return name, label and error of each image."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def write_columns(path: Path, rows: list[list[str]]) -> None:
    """Write a CSV file with name, label and error of each image."""
    with files.replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["name", "label", "error"], *rows])


def write(out: Path, done: int, batches: Iterator, advance: Callable) -> list[tuple[int, float]]:
    """Add the rows of all batches; return how many are done, and the time, after each batch.

    Args:
      out: the file to make in the end.
      done: rows that are there already.
      batches: pairs of examples and their features, with padding at the end.
      advance: is called with the number of examples of every batch.
    """
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
