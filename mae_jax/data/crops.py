"""The crops that config.data.crop can name: (picture, size, rng) -> [height, width, C].

A crop keeps the type of the picture, uint8 or float32. `size_HW` is (height, width). A crop that
has the keyword-only arguments `scale`, `ratio` or `resizer` is given config.data.crop_scale,
crop_ratio and resizer.
"""

import numpy as np
from numpy.random import Generator

from mae_jax.data import transforms
from mae_jax.data.decode import Picture
from mae_jax.data.transforms import Range

Size = tuple[int, int]


def random_resized(
    picture: Picture, size_HW: Size, rng: Generator, *, scale: Range, ratio: Range, resizer: str
) -> np.ndarray:
    """Cut out a random box and resize it; pixels around the box have no influence.

    REFERENCE section 2; see `transforms.random_box`.
    """
    height, width = picture.shape[:2]
    box = transforms.random_box(width, height, scale, ratio, rng)
    return transforms.RESIZERS[resizer](picture, box, *size_HW[::-1])


def probe(
    picture: Picture, size_HW: Size, rng: Generator, *, scale: Range, ratio: Range, resizer: str
) -> np.ndarray:
    """Make the linear probe's own random resized crop (REFERENCE section 4)."""
    height, width = picture.shape[:2]
    box = transforms.probe_box(width, height, scale, ratio, rng)
    return transforms.RESIZERS[resizer](picture, box, *size_HW[::-1])


def fixed(picture: Picture, size_HW: Size, rng: Generator) -> np.ndarray:
    """Resize the shorter side to size * 256 / 224, then crop at a random place.

    This is "crop, fixed size" of the paper's Table 1e, which gives no numbers: the margin is ours.
    """
    return transforms.resized_crop(
        picture, size_HW, 256, lambda slack: int(rng.integers(slack + 1))
    )


def center(picture: Picture, size_HW: Size, rng: object = None) -> np.ndarray:
    """Resize the shorter side, then crop the centre, as in evaluation (REFERENCE section 3).

    Up to size 224 the shorter side becomes size * 256 / 224, rounded down; above, it becomes size.
    """
    margin = 256 if max(size_HW) <= 224 else 224
    return transforms.resized_crop(picture, size_HW, margin, lambda slack: round(slack / 2))


def full(picture: Picture, size_HW: Size, rng: object = None) -> np.ndarray:
    """Resize the shorter side to the size itself, then crop the centre.

    This is for images that were cropped before, such as those of ImageNet-C: an image that already
    has the size is not changed.
    """
    return transforms.resized_crop(picture, size_HW, 224, lambda slack: round(slack / 2))
