"""ImageNet and its other test sets from their archives to tfds, without TensorFlow.

tfds's own builders read through TensorFlow. `make_builder` gives them another reading: name,
version, features, labels and keys stay, so that `tfds.builder(name)` opens the result, whose order
is the one that tfds gives it.
"""

import contextlib
import io
import re
import tarfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from PIL import Image

from mae_jax.errors import UserError

Examples = Iterator[tuple[str, dict]]


class Archive(NamedTuple):
    """The archive of a test set, which holds TOP/LABEL/FILE, and what tfds calls its images."""

    file_name: str
    top: str
    key: str = "{label}_{file}"  # decides the order in the dataset
    name: str = "{label}/{file}"


TEST_SETS = {  # tfds's name[/config] -> what it is made of
    "imagenet_v2/matched-frequency": Archive(
        "imagenetv2-matched-frequency.tar.gz", "imagenetv2-matched-frequency-format-val"
    ),
    "imagenet_v2/threshold-0.7": Archive(
        "imagenetv2-threshold0.7.tar.gz", "imagenetv2-threshold0.7-format-val"
    ),
    "imagenet_v2/topimages": Archive(
        "imagenetv2-top-images.tar.gz", "imagenetv2-top-images-format-val"
    ),
    "imagenet_a": Archive("imagenet-a.tar", "imagenet-a", "{file}", "{file}"),
    "imagenet_r": Archive("imagenet-r.tar", "imagenet-r"),
    "imagenet_sketch": Archive("ImageNet-Sketch.zip", "sketch", "{label}/{file}"),
}


def make_builder(name: str, **options: Any) -> Any:
    """Return tfds's builder of ImageNet or of a test set, which reads without TensorFlow.

    Args:
      name: of tfds, without config and version.
      options: of `tfds.builder`.

    Returns:
      None if `name` is another dataset.
    """
    if name == "imagenet2012":
        reading: type = _ReadImagenet
    elif name in {test_set.partition("/")[0] for test_set in TEST_SETS}:
        reading = ReadTestSet
    else:
        return None
    own = tfds.builder_cls(name)
    # What tfds would look for beside the file that defines the class:
    attributes = dict(
        __module__=__name__, name=name, pkg_dir_path=own.pkg_dir_path, url_infos=own.url_infos
    )
    kind = types.new_class(
        "Builder", (reading, own), {"skip_registration": True}, lambda body: body.update(attributes)
    )
    return kind(**options)


class ReadTestSet:
    """A builder that reads a test set: every file of its archive, in the order of the archive."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "The archives, unless they shall be downloaded."
    name: str
    info: Any
    builder_config: Any
    url_infos: dict[str, Any]

    @property
    def archive(self) -> Archive:
        config = f"/{self.builder_config.name}" if self.builder_config else ""
        return TEST_SETS[self.name + config]

    @property
    def published(self) -> tuple[str, int]:
        """The URL from which tfds gets the archive, and its size in bytes."""
        infos = self.url_infos.items()
        return next((x, i.size) for x, i in infos if i.filename == self.archive.file_name)

    def require_archive(self, folder: Path) -> None:
        """Check that a folder holds the archive; print a warning if its size is not the published.

        Raises:
          UserError: the folder does not hold it.
        """
        path, (url, size) = folder / self.archive.file_name, self.published
        if not path.exists():
            raise UserError(
                f"{folder} holds no {path.name}: get {path.name} from {url}, or leave out"
                " --manual_dir and it is downloaded"
            )
        if path.stat().st_size != size:
            print(
                f"warning: {path} has {path.stat().st_size:,} bytes, the published one {size:,}:"
                " it may be cut short, or another version"
            )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        with contextlib.suppress(AssertionError):  # no manual directory, or nothing in it
            path = Path(dl_manager.manual_dir) / self.archive.file_name
            if path.exists():
                return {"test": self._generate_examples(path)}
        path = Path(dl_manager.download(self.published[0]))  # checks its checksum
        return {"test": self._generate_examples(path)}

    def _generate_examples(self, path: Path) -> Examples:
        """Yield the key and the example of every TOP/CLASS/FILE of the archive.

        Contents stay as they are, as tfds stores them: some are PNG under another name.
        """
        archive, empty, labels = self.archive, True, self.info.features["label"]
        numbered = self.name == "imagenet_v2"  # its folders have the labels' numbers as names
        classes = [str(i) for i in range(labels.num_classes)] if numbered else labels.names
        # By the published name, since a download may have lost its suffix
        read_files = _zip_files if archive.file_name.endswith(".zip") else _tar_files
        for name, data in read_files(path):
            top, *parts = PurePosixPath(name).parts
            if len(parts) <= 1 and top == archive.top:  # a README
                continue
            if len(parts) != 2 or top != archive.top or parts[0] not in classes:
                raise UserError(
                    f"{path} holds {name!r}; of this archive {archive.top}/CLASS/FILE is expected,"
                    f" with the {len(classes)} classes {classes[0]}, {classes[1]}, ..."
                )
            empty = False
            label, file = parts
            yield (
                archive.key.format(label=label, file=file),
                {
                    "image": data,
                    "label": int(label) if numbered else label,
                    "file_name": archive.name.format(label=label, file=file),
                },
            )
        if empty:
            raise UserError(f"{path} holds no image")


class _ReadImagenet:
    """A builder that reads the ILSVRC2012_img_{train,val}.tar that are in the manual dir."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        folder, splits = Path(dl_manager.manual_dir), {}
        if (path := folder / "ILSVRC2012_img_train.tar").exists():
            splits["train"] = self._train_examples(path)
        if (path := folder / "ILSVRC2012_img_val.tar").exists():
            splits["validation"] = self._validation_examples(path)
        if not splits:
            raise UserError(
                f"{folder} holds none of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; get"
                " them from image-net.org/download-images"
            )
        return splits

    def _train_examples(self, path: Path) -> Examples:
        """Read an archive of one archive per class, which has its WordNet id as a name."""
        for archive, content in _tar_files(path):
            for file, data in _tar_files(None, io.BytesIO(content)):
                yield _imagenet_example(file, data, PurePosixPath(archive).stem)

    def _validation_examples(self, path: Path) -> Examples:
        """Label images by the number in ILSVRC2012_val_00000001.JPEG."""
        listed = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
        labels = listed.read_text().split()
        for file, data in _tar_files(path):
            number = re.fullmatch(r"(.*/)?ILSVRC2012_val_(\d{8})\.JPEG", file)
            if not number or not 1 <= int(number[2]) <= len(labels):
                raise UserError(f"{path} holds {file!r}, which is no validation image")
            yield _imagenet_example(file, data, labels[int(number[2]) - 1])


def _imagenet_example(path: str, data: bytes, label: str) -> tuple[str, dict]:
    name = PurePosixPath(path).name
    try:
        return name, {"file_name": name, "image": _as_jpeg(data), "label": label}
    except OSError as error:
        raise UserError(f"{name} in the archive is not an image: {error}") from error


def _as_jpeg(data: bytes) -> bytes:
    """Return an encoded image as it is if it is an RGB or grey JPEG, else as RGB JPEG, quality 100.

    ImageNet 2012 holds 22 CMYK files and one PNG under a JPEG name; tfds mends them likewise.
    """
    with Image.open(io.BytesIO(data)) as image:  # reads the header only
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            return data
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=100)
        return buffer.getvalue()


def _tar_files(path: Path | None, content: io.BytesIO | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of every file of a tar archive, compressed or not."""
    with tarfile.open(path, fileobj=content) as tar:
        for member in tar:
            if file := tar.extractfile(member):  # None for a folder
                yield member.name, file.read()


def _zip_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.is_dir():
                yield entry.filename, archive.read(entry)
