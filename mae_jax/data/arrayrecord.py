"""Write tfds datasets in ArrayRecord, from images or from TFRecord shards, without TensorFlow."""

import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, file_adapters
from tensorflow_datasets.core.features import FeaturesDict

from mae_jax import files
from mae_jax.errors import UserError

VERSION = "1.0.0"  # of the datasets that mae_jax itself lays out


def image_features(class_names: Sequence[str] | None = None) -> FeaturesDict:
    """Return the features of a dataset: image, file_name, and a label if there are classes."""
    features = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    return FeaturesDict(features)


def shuffled(names: list[str]) -> list[int]:
    """Return the indices of names in the order of their hashes: random, the same everywhere."""

    def rank(i: int) -> bytes:
        return hashlib.blake2b(os.fsencode(names[i]), digest_size=16).digest()

    return sorted(range(len(names)), key=rank)


def shard_path(folder: Path, name: str, split: str, shard: int, num_shards: int) -> Path:
    """Return the path that tfds expects of a shard."""
    return folder / f"{name}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"


def write_shard(path: Path, records: Iterable[bytes]) -> tuple[int, int]:
    """Write records to a new file, or none of them; return their number and bytes."""
    sizes = []

    def counted() -> Iterator[tuple[int, bytes]]:
        for i, record in enumerate(records):
            sizes.append(len(record))
            yield i, record

    with files.replacing(path) as part:
        file_adapters.ArrayRecordFileAdapter.write_examples(part, counted())
    return len(sizes), sum(sizes)


def write_metadata(
    folder: Path, features: FeaturesDict, splits: dict[str, tuple[list[int], int]], description: str
) -> None:
    """Make the shards in `folder` a tfds dataset; splits: name -> (records per shard, bytes)."""
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=size)
            for name, (lengths, size) in splits.items()
        ],
        version=VERSION,
        check_data=False,  # tfds would read the first example through TensorFlow
        description=description,
    )


def read_tfrecord(path: Path) -> Iterator[bytes]:
    """Yield the records of a TFRecord file, without checking their CRCs.

    Raises:
      UserError: the file ends inside a record.
    """
    with path.open("rb") as file:
        while header := file.read(12):  # uint64 length, uint32 CRC of it; then the data and its CRC
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            record = file.read(length + 4)
            if len(header) < 12 or len(record) < length + 4:
                raise UserError(f"{path} ends inside a record: copy or prepare it again")
            yield record[:length]


def convert_tfrecord(builder: tfds.core.DatasetBuilder, progress: Callable[[int], None]) -> None:
    """Add ArrayRecord shards beside the TFRecord shards of a prepared dataset.

    The dataset keeps its TFRecord form too and opens by the same name. Shards that an interrupted
    conversion finished are kept. `progress` is called with the number of records of every shard.

    Raises:
      UserError: a shard is missing, cut short, or holds another number of records than it should.
    """
    folder = Path(builder.data_dir)
    for split in builder.info.splits.values():
        target = split.filename_template.replace(filetype_suffix="array_record")
        for source, path, expected in zip(
            split.filename_template.sharded_filepaths(split.num_shards),
            target.sharded_filepaths(split.num_shards),
            split.shard_lengths,
            strict=True,
        ):
            if not Path(source).exists():
                raise UserError(f"{source} is missing: copy the whole dataset again")
            if not Path(path).exists():
                if (found := sum(1 for _ in read_tfrecord(Path(source)))) != expected:
                    raise UserError(f"{source} holds {found} records, not {expected}")
                write_shard(Path(path), read_tfrecord(Path(source)))
            progress(expected)
    info = dataset_info.read_proto_from_builder_dir(folder)
    info.alternative_file_formats.append("array_record")
    text = dataset_info.get_dataset_info_json(info)
    files.write_bytes(folder / "dataset_info.json", text.encode())


def publish(work: Path, final: Path) -> None:
    """Rename a complete dataset to its final path, unless another process was faster."""
    try:
        work.rename(final)
    except OSError:
        if not (final / "dataset_info.json").exists():
            raise
        shutil.rmtree(work)
