"""ImageNet and its other test sets from their archives to tfds, without TensorFlow.

tfds's own builders read through TensorFlow. Each class here is such a builder with the reading
replaced: name, version, features, labels and keys stay, so that `tfds.builder(name)` opens the
result, which has the order that tfds gives it.
"""

import contextlib
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.datasets.imagenet_a import imagenet_a_dataset_builder
from tensorflow_datasets.datasets.imagenet_r import imagenet_r_dataset_builder
from tensorflow_datasets.datasets.imagenet_sketch import imagenet_sketch_dataset_builder
from tensorflow_datasets.datasets.imagenet_v2 import imagenet_v2_dataset_builder

from mae_jax.errors import UserError

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
            raise UserError(
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
                    raise UserError(f"{archive} holds {name!r}, which is no validation image")
                label = labels[int(number[1]) - 1]
                yield name, {"file_name": name, "image": data, "label": label}

    def _test_examples(self, archive: Path) -> Examples:
        """No labels."""
        with tarfile.open(archive) as tar:
            for name, data in _files(tar):
                yield name, {"file_name": name, "image": data, "label": -1}


class ImagenetV2(  # type: ignore[call-arg]
    imagenet_v2_dataset_builder.Builder, skip_registration=True
):
    """ImageNet-V2, whose class folders are numbered from 0 as the labels are."""

    name = "imagenet_v2"
    url_infos = imagenet_v2_dataset_builder.Builder.url_infos
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The archives, unless they shall be downloaded."

    @classmethod
    def get_metadata(cls):
        return imagenet_v2_dataset_builder.Builder.get_metadata()

    @property
    def archive(self) -> str:
        kind = self.builder_config.name.replace("threshold-", "threshold")
        return f"imagenetv2-{kind.replace('topimages', 'top-images')}.tar.gz"

    @property
    def top(self) -> str:
        return self.archive.replace(".tar.gz", "-format-val")

    def _split_generators(self, dl_manager):
        return {"test": self._generate(find_archive(self, dl_manager))}

    def _generate(self, archive: Path) -> Examples:
        numbers = [str(i) for i in range(self.info.features["label"].num_classes)]
        for number, file, data in _classified(archive, self.top, numbers):
            label, path = int(number), f"{number}/{file}"
            yield f"{number}_{file}", {"image": data, "label": label, "file_name": path}


class ImagenetA(  # type: ignore[call-arg]
    imagenet_a_dataset_builder.Builder, skip_registration=True
):
    """ImageNet-A."""

    name = "imagenet_a"
    url_infos = imagenet_a_dataset_builder.Builder.url_infos
    MANUAL_DOWNLOAD_INSTRUCTIONS = ImagenetV2.MANUAL_DOWNLOAD_INSTRUCTIONS
    archive = "imagenet-a.tar"

    @classmethod
    def get_metadata(cls):
        return imagenet_a_dataset_builder.Builder.get_metadata()

    def _split_generators(self, dl_manager):
        return {"test": self._generate(find_archive(self, dl_manager))}

    def _generate(self, archive: Path) -> Examples:
        names = self.info.features["label"].names
        for wordnet_id, file, data in _classified(archive, "imagenet-a", names):
            yield file, {"image": data, "label": wordnet_id, "file_name": file}


class ImagenetR(  # type: ignore[call-arg]
    imagenet_r_dataset_builder.Builder, skip_registration=True
):
    """ImageNet-R."""

    name = "imagenet_r"
    url_infos = imagenet_r_dataset_builder.Builder.url_infos
    MANUAL_DOWNLOAD_INSTRUCTIONS = ImagenetV2.MANUAL_DOWNLOAD_INSTRUCTIONS
    archive = "imagenet-r.tar"

    @classmethod
    def get_metadata(cls):
        return imagenet_r_dataset_builder.Builder.get_metadata()

    def _split_generators(self, dl_manager):
        return {"test": self._generate(find_archive(self, dl_manager))}

    def _generate(self, archive: Path) -> Examples:
        names = self.info.features["label"].names
        for wordnet_id, file, data in _classified(archive, "imagenet-r", names):
            path = f"{wordnet_id}/{file}"
            yield f"{wordnet_id}_{file}", {"image": data, "label": wordnet_id, "file_name": path}


class ImagenetSketch(  # type: ignore[call-arg]
    imagenet_sketch_dataset_builder.Builder, skip_registration=True
):
    """ImageNet-Sketch."""

    name = "imagenet_sketch"
    url_infos = imagenet_sketch_dataset_builder.Builder.url_infos
    MANUAL_DOWNLOAD_INSTRUCTIONS = ImagenetV2.MANUAL_DOWNLOAD_INSTRUCTIONS
    archive = "ImageNet-Sketch.zip"

    @classmethod
    def get_metadata(cls):
        return imagenet_sketch_dataset_builder.Builder.get_metadata()

    def _split_generators(self, dl_manager):
        return {"test": self._generate(find_archive(self, dl_manager))}

    def _generate(self, archive: Path) -> Examples:
        names = self.info.features["label"].names
        for wordnet_id, file, data in _classified(archive, "sketch", names):
            path = f"{wordnet_id}/{file}"
            yield path, {"image": data, "label": wordnet_id, "file_name": path}


TEST_SETS: dict[str, Any] = {
    "imagenet_v2": ImagenetV2,
    "imagenet_a": ImagenetA,
    "imagenet_r": ImagenetR,
    "imagenet_sketch": ImagenetSketch,
}
BUILDERS: dict[str, Any] = {"imagenet2012": Imagenet2012, **TEST_SETS}


# --- archives ---


def published(builder: Any) -> tuple[str, int]:
    """Where tfds gets the archive of a test set, and its size in bytes."""
    infos = builder.url_infos.items()
    return next((url, info.size) for url, info in infos if info.filename == builder.archive)


def by_hand(builder: Any) -> str:
    """What a user can do about an archive that is not there."""
    return f"get {builder.archive} from {published(builder)[0]}"


def require_archive(builder: Any, folder: Path) -> None:
    """Looks for the archive of a test set; a line says if it has another size than the published.

    Raises:
      UserError: it is not in the folder.
    """
    path, (_, size) = folder / builder.archive, published(builder)
    if not path.exists():
        raise UserError(
            f"{folder} holds no {builder.archive}: {by_hand(builder)}, or leave out --manual_dir"
            " and it is downloaded"
        )
    if path.stat().st_size != size:
        print(
            f"warning: {path} has {path.stat().st_size:,} bytes, the published one {size:,}: it"
            " may be cut short, or another version"
        )


def find_archive(builder: Any, dl_manager: tfds.download.DownloadManager) -> Path:
    """The archive of a test set: in the manual directory, or downloaded, with its checksum."""
    with contextlib.suppress(AssertionError):  # no such directory, or nothing in it
        if (path := Path(dl_manager.manual_dir) / builder.archive).exists():
            return path
    return Path(dl_manager.download(published(builder)[0]))


def _classified(archive: Path, top: str, classes: list[str]) -> Iterator[tuple[str, str, bytes]]:
    """Class, file name and content of every TOP/CLASS/FILE of an archive.

    Contents stay as they are, as tfds stores them: some are PNG under another name.

    Raises:
      UserError: the archive holds other folders or classes.
    """
    found = False
    for name, data in _members(archive):
        parts = PurePosixPath(name).parts
        if len(parts) <= 2 and parts[0] == top:  # a README
            continue
        if len(parts) != 3 or parts[0] != top or parts[1] not in classes:
            raise UserError(
                f"{archive} holds {name!r}; of this archive {top}/CLASS/FILE is expected, with the"
                f" {len(classes)} classes {classes[0]}, {classes[1]}, ..."
            )
        found = True
        yield parts[1], parts[2], data
    if not found:
        raise UserError(f"{archive} holds no image")


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file of a tar (compressed or not) or zip archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zip:
            for entry in zip.infolist():
                if not entry.is_dir():
                    yield entry.filename, zip.read(entry)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if file := tar.extractfile(member):
                yield member.name, file.read()


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
      UserError: not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return data
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=100)
            return buffer.getvalue()
    except OSError as error:
        raise UserError(f"{name} in the archive is not an image: {error}") from error
