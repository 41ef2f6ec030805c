"""ImageNet from its official archives to tfds, without TensorFlow.

tfds's own builders read through TensorFlow. Each class here is such a builder with the reading
replaced: name, version, features and labels stay, so that `tfds.builder(name)` opens the result.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

Examples = Iterator[tuple[str, dict]]


class Imagenet2012(  # type: ignore[call-arg]
    imagenet2012_dataset_builder.Builder, skip_registration=True
):
    """ILSVRC 2012, from those of ILSVRC2012_img_{train,val,test}.tar that the manual dir holds."""

    name = "imagenet2012"

    @classmethod
    def get_metadata(cls):
        return imagenet2012_dataset_builder.Builder.get_metadata()

    def _split_generators(self, dl_manager):
        archives = {
            "train": (self._train_examples, "ILSVRC2012_img_train.tar"),
            "validation": (self._validation_examples, "ILSVRC2012_img_val.tar"),
            "test": (self._test_examples, "ILSVRC2012_img_test.tar"),
        }
        folder = Path(dl_manager.manual_dir)
        splits = {
            split: generate(folder / name)
            for split, (generate, name) in archives.items()
            if (folder / name).exists()
        }
        if not splits:
            raise ValueError(
                f"{folder} holds none of {', '.join(name for _, name in archives.values())}; get"
                " them from image-net.org/download-images"
            )
        return splits

    def _train_examples(self, archive: Path) -> Examples:
        """An archive of one archive per class, named by its WordNet id."""
        with tarfile.open(archive) as outer:
            for member in outer:
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    for name, data in _files(inner):
                        label = PurePosixPath(member.name).stem
                        yield name, {"file_name": name, "image": data, "label": label}

    def _validation_examples(self, archive: Path) -> Examples:
        """Labels by the number in ILSVRC2012_val_00000001.JPEG."""
        path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
        labels = path.read_text().split()
        with tarfile.open(archive) as tar:
            for name, data in _files(tar):
                number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
                if not number or not 1 <= int(number[1]) <= len(labels):
                    raise ValueError(f"{archive} holds {name!r}, which is no validation image")
                label = labels[int(number[1]) - 1]
                yield name, {"file_name": name, "image": data, "label": label}

    def _test_examples(self, archive: Path) -> Examples:
        """No labels."""
        with tarfile.open(archive) as tar:
            for name, data in _files(tar):
                yield name, {"file_name": name, "image": data, "label": -1}


BUILDERS = {"imagenet2012": Imagenet2012}


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """File name and image of every file in an archive, as RGB or grey JPEG."""
    for member in tar:
        if file := tar.extractfile(member):  # None for folders
            name = PurePosixPath(member.name).name
            yield name, as_jpeg(file.read(), name)


def as_jpeg(data: bytes, name: str) -> bytes:
    """An encoded image unchanged if it is an RGB or grey JPEG, else as an RGB JPEG of quality 100.

    ImageNet 2012 holds 22 CMYK files and one PNG under a JPEG name; tfds mends them likewise.

    Raises:
      ValueError: not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return data
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=100)
            return buffer.getvalue()
    except OSError as error:
        raise ValueError(f"{name} in the archive is not an image: {error}") from error
