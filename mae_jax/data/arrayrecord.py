"""Write tfds datasets in ArrayRecord, without TensorFlow."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters
from tensorflow_datasets.core.features import FeaturesDict

from mae_jax import files

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
    """Return the path at which tfds expects a shard."""
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
