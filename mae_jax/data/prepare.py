"""Prepare a tfds dataset in ArrayRecord without TensorFlow, or convert its TFRecord files."""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info

from mae_jax import files
from mae_jax.data import arrayrecord, imagenet
from mae_jax.data.pack import Progress
from mae_jax.data.sources import find_tfds
from mae_jax.errors import UserError


def prepare_tfds(
    name: str, *, data_dir: str, manual_dir: str, progress: Progress
) -> tfds.core.DatasetBuilder:
    """Prepare a tfds dataset in ArrayRecord, or convert it if it is there as TFRecord.

    Raises:
      UserError: unknown name, missing archives, or a dataset that tfds prepares with TensorFlow
        only.
    """
    builder = find_tfds(name, data_dir)
    info = builder.info
    if not info.splits:
        if manual_dir and not Path(manual_dir).is_dir():
            raise UserError(f"--manual_dir={manual_dir}: there is no such directory")
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        imagenet.read_archives(builder, manual_dir)
        _download_and_prepare(builder, name, manual_dir)
    elif not {f.value for f in info.available_file_formats()} & {"array_record"}:
        if info.file_format.value != "tfrecord":
            raise UserError(
                f"{name!r} is stored as {info.file_format.value} in {builder.data_dir}; only"
                " tfrecord can be converted: delete the directory and prepare it again"
            )
        total = sum(split.num_examples for split in info.splits.values())
        with progress("records", total) as advance:
            _convert_tfrecord(builder, advance)
    return builder


def _download_and_prepare(builder: Any, name: str, manual_dir: str) -> None:
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
    except ImportError as error:
        if "tensorflow" not in str(error):
            raise
        raise UserError(
            f"tfds prepares {name!r} with TensorFlow, which mae_jax does without: where TensorFlow"
            f" is installed, run `tfds build {name} --file_format=array_record` and copy the"
            " directory"
        ) from None
    except OSError as error:  # no network, a full disk
        raise UserError(f"tfds could not prepare {name!r}: {error}") from error


def _convert_tfrecord(builder: tfds.core.DatasetBuilder, progress: Callable[[int], None]) -> None:
    """Add ArrayRecord shards beside the TFRecord shards of a prepared dataset.

    The dataset keeps its TFRecord form too and opens by the same name. Shards that an interrupted
    conversion finished are kept. `progress` is called with the number of records of every shard.
    """
    folder = Path(builder.data_dir)
    for split in builder.info.splits.values():
        target = split.filename_template.replace(filetype_suffix="array_record")
        for source, path, expected in zip(
            map(Path, split.filename_template.sharded_filepaths(split.num_shards)),
            map(Path, target.sharded_filepaths(split.num_shards)),
            split.shard_lengths,
            strict=True,
        ):
            if not source.exists():
                raise UserError(f"{source} is missing: copy the whole dataset again")
            if not path.exists():
                if (count := sum(1 for _ in _read_tfrecord(source))) != expected:
                    raise UserError(f"{source} holds {count} records, not {expected}")
                arrayrecord.write_shard(path, _read_tfrecord(source))
            progress(expected)
    info = dataset_info.read_proto_from_builder_dir(folder)
    info.alternative_file_formats.append("array_record")
    text = dataset_info.get_dataset_info_json(info)
    files.write_bytes(folder / "dataset_info.json", text.encode())


def _read_tfrecord(path: Path) -> Iterator[bytes]:
    """Yield the records of a TFRecord file, without checking their CRCs."""
    with path.open("rb") as file:
        while header := file.read(12):  # uint64 length, uint32 CRC of it; then the data and its CRC
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            record = file.read(length + 4)
            if len(header) < 12 or len(record) < length + 4:
                raise UserError(f"{path} ends inside a record: copy or prepare it again")
            yield record[:length]
