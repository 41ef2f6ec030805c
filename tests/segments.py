"""Small folders of images with label maps, for the tests of segmentation."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("sky", "wall", "road")
LEVELS = (220, 120, 30)  # of the images' pixels of each class: what is to be learned
IGNORE = 9  # in the files


def write_pairs(root: Path, split: str, count: int, size=(24, 32), seed: int = 0) -> list[str]:
    """Write pairs in which each class has a grey of its own; return their names."""
    rng = np.random.default_rng(seed)
    names = [f"{split}{i:02d}" for i in range(count)]
    for folder in ("images", "labels"):
        (root / split / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        coarse = rng.integers(0, 3, (size[0] // 8, size[1] // 8))
        map_HW = coarse.repeat(8, 0).repeat(8, 1).astype(np.uint8)
        noise = rng.integers(-45, 46, coarse.shape).repeat(8, 0).repeat(8, 1)
        image = np.array(LEVELS)[map_HW] + rng.integers(-30, 31, map_HW.shape) + noise
        map_HW[rng.random(map_HW.shape) < 0.05] = IGNORE
        rgb = image.clip(0, 255).astype(np.uint8)[..., None].repeat(3, -1)
        Image.fromarray(rgb).save(root / split / "images" / f"{name}.png")
        Image.fromarray(map_HW).save(root / split / "labels" / f"{name}.png")
    return names


def write_folder(root: Path, train: int = 12, test: int = 5, **kwargs) -> Path:
    """Write ROOT/train, ROOT/test and ROOT/classes.txt."""
    write_pairs(root, "train", train, seed=1, **kwargs)
    write_pairs(root, "test", test, seed=2, **kwargs)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


GREY_MODEL = dict(width=32, depth=2, heads=4, patch_size=(8, 8), channels=1, dtype="float32")


def small(config, root: Path):
    """Return a recipe of segmentation with a small grey network, on such a folder."""
    config.model.update(GREY_MODEL, image_size=(24, 32))
    config.data.update(mean=(0.5,), std=(0.5,), ignore=IGNORE, source=f"segfolder:{root}")
    config.features, config.init_from = "random", ""
    for cfg in config.evals.values():
        cfg.update(split="test", batch_size=8)
    return config
