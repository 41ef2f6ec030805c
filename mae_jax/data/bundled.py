"""Small data inside common wheels: a few photographs, and handwritten digits."""

import importlib.util
import io
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax.data import arrayrecord
from mae_jax.errors import UserError

PHOTOS = "bundled_photos"
# Looked at one by one: colour photographs, no drawings or charts. The motorcycle is a stereo pair,
# chelsea a cat, china a pavilion above a lake.
PICTURES = {
    "skimage": [
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/motorcycle_left.png"),
        *("data/motorcycle_right.png", "data/retina.jpg", "data/rocket.jpg"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}
HELD_OUT = ("chelsea", "china")


def photos(data_dir: str = "") -> str:
    """Return the tfds name of the photographs, after preparing them in `data_dir` if need be.

    There are nine scenes on ten pictures. 'train' (1,016 images) holds seven scenes: the whole
    pictures, and overlapping square tiles with half the picture's short side, as JPEG of quality
    95. 'test' (24 images) holds the **two other scenes**, a cat and a pavilion above a lake, so
    that it tests what natural images have in common: square tiles that do not overlap, with a third
    of the short side, as PNG.
    """
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / PHOTOS
    final = root / arrayrecord.VERSION
    if not (final / "dataset_info.json").exists():
        paths = [folder_of(module) / file for module in PICTURES for file in PICTURES[module]]
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=root) as temporary:
            work = Path(temporary) / arrayrecord.VERSION
            work.mkdir()
            _write(work, paths)
            try:
                work.rename(final)
            except OSError:  # another process may have been faster
                if not (final / "dataset_info.json").exists():
                    raise
    return f"{PHOTOS}:{arrayrecord.VERSION}"


def folder_of(module: str) -> Path:
    """Return the folder of a package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"bundled data lives in the wheel of {module}, which is not installed:"
            " pip install scikit-image scikit-learn  (the extra 'quickstart')"
        )
    return Path(spec.origin).parent


def _write(folder: Path, paths: list[Path]) -> None:
    features = arrayrecord.image_features()
    splits = {}
    for split in ("train", "test"):
        tiles = {
            tile: image
            for path in paths
            if (path.stem in HELD_OUT) == (split == "test")
            for tile, image in _tiles(path.stem, Image.open(path).convert("RGB"), split)
        }
        names = list(tiles)
        records = (
            features.serialize_example(
                features.encode_example({"image": tiles[names[i]], "file_name": names[i]})
            )
            for i in arrayrecord.shuffled(names)  # so that a slice shows every scene
        )
        path = arrayrecord.shard_path(folder, PHOTOS, split, 0, 1)
        count, size = arrayrecord.write_shard(path, records)
        splits[split] = ([count], size)
    arrayrecord.write_metadata(
        folder, features, splits, "Tiles of the colour photographs inside Python wheels."
    )


def _tiles(name: str, picture: Image.Image, split: str) -> Iterator[tuple[str, bytes]]:
    """Yield file name and encoded image of each tile of a picture."""
    short = min(picture.size)
    if short > 640:  # only the retina; its large tiles would be slow to decode and show no more
        width, height = (round(side * 512 / short) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        short = 512
    if split == "train":
        side, stride, extension = short // 2, short // 16, "jpg"
        yield f"{name}.jpg", _encode(picture, extension)
    else:
        side, stride, extension = short // 3, short // 3, "png"
    for top in range(0, picture.height - side + 1, stride):
        for left in range(0, picture.width - side + 1, stride):
            tile = picture.crop((left, top, left + side, top + side))
            yield f"{name}_y{top}_x{left}_s{side}.{extension}", _encode(tile, extension)


def _encode(image: Image.Image, extension: str) -> bytes:
    buffer = io.BytesIO()
    if extension == "png":  # what errors are measured on keeps its exact pixels
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


@cache
def digits() -> dict[str, list[dict[str, Any]]]:
    """Return scikit-learn's 1,797 handwritten digits: split -> records of a `sources.Source`.

    Images are uint8 [8, 8, 1]; the stored 0..16 become 0..255 (round(value * 255 / 16)). Names hold
    the place in scikit-learn's own order. 'test' is a stratified fifth (360), 'train' the rest
    (1,437), drawn once with seed 0. Any ten neighbours hold ten classes (until the smaller ones run
    out, at 1,390), so that slices such as train[:1%] are fair. Every call returns the same records.
    """
    folder_of("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, random_state=0, stratify=data.target
    )
    # Train rows in a random order, with one of each class before a second of any
    rng, label_N = np.random.default_rng(0), data.target[train]
    turn_N = np.empty(len(train), int)
    for label in range(10):
        of_class = np.flatnonzero(label_N == label)
        turn_N[of_class] = rng.permutation(len(of_class))
    train = train[np.lexsort((label_N, turn_N))]
    return {
        split: [
            {"image": images[i], "label": int(data.target[i]), "name": f"digit_{i:04d}"}
            for i in rows
        ]
        for split, rows in (("train", train), ("test", np.sort(test)))
    }
