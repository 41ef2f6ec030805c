"""RandAugment on the host, by Pillow: the 15 operations of the fine-tuning recipe, and their draw.

Operations and sampling rules: REFERENCE section 3 (timm's `rand-m9-mstd0.5-inc1`); the operations
are pinned by tests/data/randaug_ops.npz.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.errors import UserError

FILL = (124, 116, 104)  # where a turned, sheared or moved image leaves a gap: the mean colour
PROBABILITY = 0.5  # that an operation which was drawn is applied
HIGHEST = 10.0  # magnitude


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_fill(image)
    )


def _fill(image: Image.Image) -> tuple[int, ...] | int:
    return FILL if image.mode == "RGB" else round(float(np.mean(FILL)))


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    table = [min(value + add, 255) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the upper bits; none, at magnitude 10, which newer versions of Pillow refuse."""
    return image.point(
        [value >> 8 - bits << 8 - bits for value in range(256)] * len(image.getbands())
    )


# Name -> (strength of a magnitude, is its sign drawn, what is done to the image at that strength).
Operation = tuple[Callable[[float], float], bool, Callable[[Image.Image, float], Image.Image]]
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": (lambda m: 0, False, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": (lambda m: 0, False, lambda image, _: ImageOps.equalize(image)),
    "invert": (lambda m: 0, False, lambda image, _: ImageOps.invert(image)),
    "rotate": (
        lambda m: 30 * m / 10,  # degrees
        True,
        lambda image, v: image.rotate(v, Image.Resampling.BICUBIC, fillcolor=_fill(image)),
    ),
    "posterize": (
        lambda m: 4 - math.trunc(4 * m / 10),  # bits that stay
        False,
        lambda image, v: _posterize(image, int(v)),
    ),
    "solarize": (
        lambda m: 256 - math.trunc(256 * m / 10),  # from this value on, inverted
        False,
        lambda image, v: ImageOps.solarize(image, int(v)),
    ),
    "solarize_add": (
        lambda m: math.trunc(110 * m / 10),  # added to the dark half
        False,
        lambda image, v: _solarize_add(image, int(v)),
    ),
    "color": (
        lambda m: 0.9 * m / 10,  # from here on: the distance from 1, the unchanged image
        True,
        lambda image, v: ImageEnhance.Color(image).enhance(1 + v),
    ),
    "contrast": (
        lambda m: 0.9 * m / 10,
        True,
        lambda image, v: ImageEnhance.Contrast(image).enhance(1 + v),
    ),
    "brightness": (
        lambda m: 0.9 * m / 10,
        True,
        lambda image, v: ImageEnhance.Brightness(image).enhance(1 + v),
    ),
    "sharpness": (
        lambda m: 0.9 * m / 10,
        True,
        lambda image, v: ImageEnhance.Sharpness(image).enhance(1 + v),
    ),
    "shear_x": (
        lambda m: 0.3 * m / 10,
        True,
        lambda image, v: _affine(image, (1, v, 0, 0, 1, 0)),
    ),
    "shear_y": (
        lambda m: 0.3 * m / 10,
        True,
        lambda image, v: _affine(image, (1, 0, 0, v, 1, 0)),
    ),
    "translate_x": (
        lambda m: 0.45 * m / 10,  # of the width
        True,
        lambda image, v: _affine(image, (1, 0, v * image.width, 0, 1, 0)),
    ),
    "translate_y": (
        lambda m: 0.45 * m / 10,  # of the height
        True,
        lambda image, v: _affine(image, (1, 0, 0, 0, 1, v * image.height)),
    ),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Random operations on a uint8 image [H, W, C] of 1 or 3 channels; safe to pickle.

    `number` operations are drawn uniformly, with replacement; each is applied with probability 0.5,
    at a magnitude drawn from N(magnitude, deviation) and clipped to 0..10, with a fair sign.
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    number: int = 2

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        grey = image_HWC.shape[-1] == 1
        image = Image.fromarray(np.ascontiguousarray(image_HWC[..., 0] if grey else image_HWC))
        for name in rng.choice(list(OPERATIONS), self.number):
            if rng.random() < PROBABILITY:
                level = float(np.clip(rng.normal(self.magnitude, self.deviation), 0, HIGHEST))
                image = apply(image, name, level, negative=rng.random() < 0.5)
        array = np.asarray(image)
        return array[..., None] if grey else array


def apply(image: Image.Image, name: str, magnitude: float, negative: bool) -> Image.Image:
    """One of OPERATIONS on a grey or RGB image; `negative` where its sign is drawn."""
    strength, signed, operation = OPERATIONS[name]
    value = strength(magnitude)
    return operation(image, -value if signed and negative else value)


def parse(name: str) -> RandAugment:
    """The RandAugment of a name such as rand-m9-mstd0.5-inc1.

    m: magnitude, 0 to 10; mstd: its deviation; n: number of operations, 2 unless said; inc: the
    strength grows with the magnitude, which must be said, as the other kind is not offered.

    Raises:
      UserError: another name.
    """
    kind, *parts = name.split("-")
    found: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|m|n|inc)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] in found:
            found = {}
            break
        found[match[1]] = float(match[2])
    number = found.get("n", 2.0)
    wrong = found.get("m", 99) > HIGHEST or number < 1 or number % 1
    if kind != "rand" or wrong or "inc" not in found:
        raise UserError(
            f"config.data.augment={name!r}: write rand-mM-mstdS-inc1, such as rand-m9-mstd0.5-inc1,"
            " with a magnitude M from 0 to 10, its deviation S, and -nN for N operations per image"
            " instead of 2; or '' for none"
        )
    return RandAugment(found["m"], found.get("mstd", 0.0), int(number))
