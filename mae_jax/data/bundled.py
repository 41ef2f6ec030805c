"""Small data inside common wheels: a few photographs, and handwritten digits."""

import importlib.util
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax.data import arrayrecord
from mae_jax.errors import UserError

PHOTOS = "bundled_photos"
# Scene -> module, files inside it. Looked at one by one: colour photographs, no drawings or charts.
SCENES = {
    "astronaut": ("skimage", ["data/astronaut.png"]),
    "chelsea": ("skimage", ["data/chelsea.png"]),  # a cat
    "coffee": ("skimage", ["data/coffee.png"]),
    "motorcycle": ("skimage", ["data/motorcycle_left.png", "data/motorcycle_right.png"]),  # stereo
    "retina": ("skimage", ["data/retina.jpg"]),
    "rocket": ("skimage", ["data/rocket.jpg"]),
    "china": ("sklearn", ["datasets/images/china.jpg"]),  # a pavilion above a lake
    "flower": ("sklearn", ["datasets/images/flower.jpg"]),
    "grace_hopper": ("matplotlib", ["mpl-data/sample_data/grace_hopper.jpg"]),
}
HELD_OUT = ("chelsea", "china")
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def photos(data_dir: str = "") -> str:
    """Return the tfds name of the photographs, after preparing them in `data_dir` if need be.

    There are nine scenes on ten pictures. 'train' (1,016 images) holds seven scenes: the whole
    pictures, and overlapping square tiles with half the picture's short side, as JPEG of quality
    95. 'test' (24 images) holds two **other scenes**, photographs of a cat and of a pavilion above
    a lake, so that it asks for what natural images have in common: square tiles that do not
    overlap, with a third of the short side, as PNG. Both pictures of the stereo pair are in train.

    Raises:
      UserError: scikit-image or scikit-learn, whose wheels hold the pictures, is not installed.
    """
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / PHOTOS
    final = root / arrayrecord.VERSION
    if not (final / "dataset_info.json").exists():
        pictures = {scene: _load(*SCENES[scene]) for scene in SCENES}
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=root) as temporary:
            work = Path(temporary) / arrayrecord.VERSION
            work.mkdir()
            _write(work, pictures)
            arrayrecord.publish(work, final)
    return f"{PHOTOS}:{arrayrecord.VERSION}"


def _load(module: str, files: list[str]) -> dict[str, Image.Image]:
    spec = importlib.util.find_spec(module)  # finds the files without importing the package
    if spec is None or spec.origin is None:
        raise UserError(
            f"bundled data lives in the wheel of {PACKAGES[module]}, which is not installed:"
            " pip install scikit-image scikit-learn  (the extra 'quickstart')"
        )
    folder = Path(spec.origin).parent
    try:
        return {Path(f).stem: Image.open(folder / f).convert("RGB") for f in files}
    except OSError as error:
        raise UserError(
            f"{PACKAGES[module]} is installed without the picture {error.filename}:"
            f" pip install --force-reinstall {PACKAGES[module]}"
        ) from error


def _write(folder: Path, pictures: dict[str, dict[str, Image.Image]]) -> None:
    features = arrayrecord.image_features()

    splits = {}
    for split in ("train", "test"):
        tiles = {
            tile: image
            for scene, views in pictures.items()
            if (scene in HELD_OUT) == (split == "test")
            for name, picture in views.items()
            for tile, image in _tiles(name, picture, split)
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
    side, stride = (short // 2, short // 16) if split == "train" else (short // 3, short // 3)
    encoding = {"format": "JPEG", "quality": 95, "subsampling": 0}
    if split == "test":  # what errors are measured on keeps its exact pixels
        encoding = {"format": "PNG"}
    else:
        yield f"{name}.jpg", _encode(picture, encoding)
    for top in range(0, picture.height - side + 1, stride):
        for left in range(0, picture.width - side + 1, stride):
            tile = picture.crop((left, top, left + side, top + side))
            extension = "jpg" if split == "train" else "png"
            yield f"{name}_y{top}_x{left}_s{side}.{extension}", _encode(tile, encoding)


def _encode(image: Image.Image, encoding: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **encoding)
    return buffer.getvalue()


def digits() -> dict[str, dict[str, np.ndarray]]:
    """Return scikit-learn's 1,797 handwritten digits: split -> image, label, index.

    image: uint8 [N, 8, 8, 1]; the stored 0..16 become 0..255 (round(value * 255 / 16)).
    label: int [N]. index: place in scikit-learn's own order. 'test' is a stratified fifth (360),
    'train' the rest (1,437), drawn once with seed 0. Any ten neighbours hold ten classes (until the
    smaller ones run out, at 1,390), so that slices such as train[:1%] are fair.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError(
            "bundled:digits lives in the wheel of scikit-learn, which is not installed:"
            " pip install scikit-learn  (the extra 'quickstart')"
        ) from None
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, random_state=0, stratify=data.target
    )
    train = _in_turn(train, data.target[train], np.random.default_rng(0))
    return {
        split: {"image": images[rows], "label": data.target[rows], "index": rows}
        for split, rows in (("train", train), ("test", np.sort(test)))
    }


def _in_turn(rows_N: np.ndarray, label_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return rows in a random order, with one of each class before a second of any."""
    turn_N = np.empty(len(label_N), int)
    for label in np.unique(label_N):
        of_class = np.flatnonzero(label_N == label)
        turn_N[of_class] = rng.permutation(len(of_class))
    return rows_N[np.lexsort((label_N, turn_N))]
