"""ImageNet and its other test sets from their archives to tfds, without TensorFlow.

tfds's own builders read through TensorFlow. `read_archives` changes only how they read: name,
version, features, labels and keys stay, so that `tfds.builder(name)` opens the result, and its
order is the one that tfds gives it.
"""

import io
import re
import tarfile
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


TEST_SETS = {  # tfds's name[/config] -> its archive
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


def read_archives(builder: Any, manual_dir: str) -> None:
    """Let tfds's builder of ImageNet or of a test set read its archives without TensorFlow.

    Any other builder is left as it is.

    Args:
      manual_dir: where the archives are; '' = the archive of a test set is downloaded.

    Raises:
      UserError: the archive of a test set is not there.
    """
    if builder.name == "imagenet2012":
        builder._split_generators = _split_imagenet
    elif full_name(builder) in TEST_SETS:
        file_name, url = TEST_SETS[full_name(builder)].file_name, url_of(builder)
        path = Path(manual_dir, file_name) if manual_dir else None
        if path and not path.exists():
            raise UserError(
                f"{manual_dir} holds no {file_name}: get {file_name} from {url}, or leave out"
                " --manual_dir and it is downloaded"
            )

        def split_test_set(dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
            # tfds compares the checksum of a download.
            return {"test": test_examples(builder, path or Path(dl_manager.download(url)))}

        builder._split_generators = split_test_set


def full_name(builder: Any) -> str:
    """Return the name of a builder with its config."""
    return builder.name + (f"/{builder.builder_config.name}" if builder.builder_config else "")


def url_of(builder: Any) -> str:
    """Return the address from which tfds gets the archive of a test set."""
    file_name = TEST_SETS[full_name(builder)].file_name
    return next(url for url, info in builder.url_infos.items() if info.filename == file_name)


def test_examples(builder: Any, path: Path) -> Examples:
    """Yield the key and the example of every TOP/CLASS/FILE of the archive of a test set.

    Images keep their bytes, as in tfds's own dataset: some are PNG under another name.
    """
    archive, empty = TEST_SETS[full_name(builder)], True
    labels = builder.info.features["label"]
    numbered = builder.name == "imagenet_v2"  # its folders have the labels' numbers as names
    classes = [str(i) for i in range(labels.num_classes)] if numbered else labels.names
    # The published name decides, since a download may have lost its suffix
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


def _split_imagenet(dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
    folder, splits = Path(dl_manager.manual_dir), {}
    if (path := folder / "ILSVRC2012_img_train.tar").exists():
        splits["train"] = _train_examples(path)
    if (path := folder / "ILSVRC2012_img_val.tar").exists():
        splits["validation"] = _validation_examples(path)
    if not splits:
        raise UserError(
            f"{folder} holds none of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; get"
            " them from image-net.org/download-images"
        )
    return splits


def _train_examples(path: Path) -> Examples:
    """Yield the examples of an archive of archives, one per class, named by its WordNet id."""
    for archive, content in _tar_files(path):
        for file, data in _tar_files(None, io.BytesIO(content)):
            yield _imagenet_example(file, data, PurePosixPath(archive).stem)


def _validation_examples(path: Path) -> Examples:
    """Yield examples labelled by the number in ILSVRC2012_val_00000001.JPEG."""
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
