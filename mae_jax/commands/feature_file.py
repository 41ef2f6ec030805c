"""Write features batch by batch, so that a kill costs a batch and the result is the same.

While they grow, OUT.part is the .npy file of all rows, OUT.csv lists the rows that are done, and
OUT.json says what they are made from.
"""

import contextlib
import csv
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax import files
from mae_jax.commands import cli
from mae_jax.errors import UserError

COLUMNS = ["name", "label", "error"]  # of OUT.csv
# A reader ends a row at a carriage return too, which a writer of such lines does not quote alone.
LINES: dict[str, Any] = dict(lineterminator="\n", quoting=csv.QUOTE_ALL)
GROUP_BYTES = 2**26  # features of a row group of Parquet


def beside(out: Path) -> tuple[Path, Path, Path]:
    """Return the files of features, of the other columns, and of what they are made from."""
    return Path(f"{out}.part"), Path(f"{out}.csv"), Path(f"{out}.json")


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep other commands from writing `out` while the body runs.

    Raises:
      UserError: one is writing it, or nothing can be written there.
    """
    lock = Path(f"{out}.lock")
    try:
        lock.touch()
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None
    with files.locked(lock) as is_free:
        if not is_free:
            raise UserError(
                f"another `mae-jax embed` is writing {out}: wait until it ends, or give another"
                " --out"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def begin(out: Path, made_from: dict, shape: tuple[int, ...], batch_size: int) -> list[list[str]]:
    """Return the rows of COLUMNS that an interrupted run finished, and prepare to add to them.

    Args:
      made_from: what changes with the inputs; the rows are kept only if it is the same.
      shape: of all features, with one row for each image.

    Raises:
      UserError: `out` already exists, and was made from something else.
    """
    part, table, state = beside(out)
    same = state.exists() and json.loads(state.read_text()) == made_from
    if out.exists():
        if not same:
            raise UserError(f"{out} is there already: choose another name, or remove it")
        return []
    rows = []
    if part.exists() and same:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:-1]  # the last one may be cut short
        rows = rows[: len(rows) // batch_size * batch_size]
    elif part.exists():
        print("The images, weights or options changed since the interruption: starting again.")
    if not rows:
        part.unlink(missing_ok=True)  # first, since OUT.part says that the other files are valid
    with files.replacing(table) as whole, open(whole, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **LINES).writerows([COLUMNS, *rows])
    if not rows:
        files.write_json(state, made_from)
        np.lib.format.open_memmap(part, "w+", np.float32, shape=shape)
    return rows


def append(out: Path, rows: list[list[str]], batches: Iterator) -> Iterator[int]:
    """Add a row for each example to the files beside `out` and to `rows`; yield how many, by batch.

    `batches` are pairs of examples and their features, with padding at the end.
    """
    part, table, _ = beside(out)
    whole = np.load(part, mmap_mode="r")
    # Written, not mapped: on a full disk, a write raises an error and a mapped page kills.
    with part.open("r+b") as features, table.open("a", encoding="utf-8", newline="") as file:
        features.seek(whole.offset + len(rows) * whole.strides[0])
        writer = csv.writer(file, **LINES)
        # In pairs, so that the device computes a batch while the next one is read.
        for (batch, computed), _ in itertools.pairwise(itertools.chain(batches, [None])):
            block = np.array(computed)[: len(batch)]
            block[[bool(example.error) for example in batch]] = np.nan
            features.write(block.tobytes())
            features.flush()
            new = [[x.name, str(x.label) if x.label >= 0 else "", x.error] for x in batch]
            writer.writerows(new)
            file.flush()  # after the features: what is listed is done
            rows += new
            yield len(batch)


def finish(out: Path, rows: list[list[str]]) -> None:
    """Make `out` of the files beside it.

    Raises:
      UserError: none of the images can be read.
    """
    part, table, _ = beside(out)
    if all(error for *_, error in rows):
        for path in beside(out):
            path.unlink()
        unreadable = [(name, error) for name, _, error in rows]
        raise UserError(f"none of the {len(rows)} images can be read: {cli.first_ten(unreadable)}")
    if out.suffix == ".npy":
        part.replace(out)
        return
    with files.replacing(out) as whole:
        write_parquet(whole, np.load(part, mmap_mode="r"), rows)
    part.unlink()
    table.unlink()


def write_parquet(path: os.PathLike, features: np.ndarray, rows: list[list[str]]) -> None:
    """Write features and the other columns as one table."""
    import pyarrow as pa
    from pyarrow import parquet

    names, labels, errors = zip(*rows, strict=True)
    column = pa.array(features.reshape(-1))  # not copied: a file may be larger than the memory
    for size in features.shape[:1:-1]:
        column = pa.FixedSizeListArray.from_arrays(column, size)
    unreadable = pa.array([bool(error) for error in errors])
    column = pa.FixedSizeListArray.from_arrays(column, features.shape[1], mask=unreadable)
    columns = {
        "name": pa.array(names, pa.string()),
        "label": pa.array([int(label) if label else None for label in labels], pa.int32()),
        "features": column,
        "error": pa.array([error or None for error in errors], pa.string()),
    }
    group = max(1, GROUP_BYTES // features[0].nbytes)
    parquet.write_table(pa.table(columns), os.fspath(path), row_group_size=group)


def read(out: str | os.PathLike) -> dict[str, Any]:
    """Return the columns of a finished file as arrays: name, label, error and features.

    There is no label where it is -1, no error where it is '', and NaN for missing features.
    """
    path = Path(out)
    if path.suffix == ".npy":
        with open(f"{path}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        table: dict[str, list] = {name: [row[name] for row in rows] for name in COLUMNS}
        features = np.load(path, mmap_mode="r")
    else:
        from pyarrow import parquet

        whole = parquet.read_table(path)
        table = {name: whole[name].to_pylist() for name in COLUMNS}
        column = whole["features"].combine_chunks()
        shape, inner = [len(column)], column.type
        while hasattr(inner, "list_size"):
            shape.append(inner.list_size)
            inner = inner.value_type
        features = np.full(shape, np.nan, np.float32)
        flat = column.drop_null()
        for _ in shape[1:]:
            flat = flat.flatten()
        features[~np.asarray(column.is_null())] = flat.to_numpy().reshape(-1, *shape[1:])
    labels = [-1 if label in ("", None) else int(label) for label in table["label"]]
    errors = [error or "" for error in table["error"]]
    return {
        "name": np.array(table["name"], str),
        "label": np.array(labels, np.int32),
        "error": np.array(errors, str),
        "features": features,
    }
