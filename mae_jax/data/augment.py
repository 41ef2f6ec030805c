"""RandAugment on the host, by Pillow: the 15 operations of the fine-tuning recipe, and their draw.

Operations and sampling rules: REFERENCE section 3 (timm's `rand-m9-mstd0.5-inc1`); the operations
are pinned by tests/data/randaug_ops.npz.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.errors import UserError

FILL = (124, 116, 104)  # the mean colour, where a turned, sheared or moved image leaves a gap
PROBABILITY = 0.5  # that an operation which was drawn is applied
HIGHEST = 10.0  # magnitude


class Operation(NamedTuple):
    """An operation of RandAugment: its function and its range of strengths."""

    edit: Callable[[Image.Image, float], Image.Image]  # (image, strength)
    strength: Callable[[float], float]  # of a magnitude from 0 to 10
    signed: bool = False  # whether the sign of the strength is drawn


def _up_to(highest: float) -> Callable[[float], float]:
    return lambda magnitude: highest * magnitude / HIGHEST


def _fill(image: Image.Image) -> tuple[int, ...] | int:
    return FILL if image.mode == "RGB" else round(float(np.mean(FILL)))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=_fill(image))


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    bicubic, fill = Image.Resampling.BICUBIC, _fill(image)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, bicubic, fillcolor=fill)


def _map_levels(image: Image.Image, level: Callable[[int], int]) -> Image.Image:
    return image.point([level(value) for value in range(256)] * len(image.getbands()))


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keep the upper bits; no bit at magnitude 10, which newer versions of Pillow refuse."""
    lost = 8 - int(bits)
    return _map_levels(image, lambda value: value >> lost << lost)


def _solarize_add(image: Image.Image, added: float) -> Image.Image:
    return _map_levels(image, lambda v: min(v + int(added), 255) if v < 128 else v)


def _enhance(kind: Callable) -> Operation:
    """Return an operation with a factor around 1, which leaves the image as it is."""
    return Operation(lambda image, v: kind(image).enhance(1 + v), _up_to(0.9), True)


OPERATIONS = {
    "auto_contrast": Operation(lambda image, _: ImageOps.autocontrast(image), _up_to(0)),
    "equalize": Operation(lambda image, _: ImageOps.equalize(image), _up_to(0)),
    "invert": Operation(lambda image, _: ImageOps.invert(image), _up_to(0)),
    "rotate": Operation(_rotate, _up_to(30), True),
    "posterize": Operation(_posterize, lambda m: 4 - math.trunc(4 * m / HIGHEST)),
    # The strength is the lowest level that is inverted
    "solarize": Operation(
        lambda image, v: ImageOps.solarize(image, int(v)),
        lambda m: 256 - math.trunc(256 * m / HIGHEST),
    ),
    # The strength is added to the levels below 128
    "solarize_add": Operation(_solarize_add, lambda m: math.trunc(110 * m / HIGHEST)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": Operation(lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), _up_to(0.3), True),
    "shear_y": Operation(lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), _up_to(0.3), True),
    # The strength is a share of the width or height
    "translate_x": Operation(
        lambda image, v: _affine(image, 1, 0, v * image.width, 0, 1, 0), _up_to(0.45), True
    ),
    "translate_y": Operation(
        lambda image, v: _affine(image, 1, 0, 0, 0, 1, v * image.height), _up_to(0.45), True
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
        image = to_picture(image_HWC)
        for name in rng.choice(list(OPERATIONS), self.number):
            if rng.random() < PROBABILITY:
                level = float(np.clip(rng.normal(self.magnitude, self.deviation), 0, HIGHEST))
                image = apply(image, name, level, negative=rng.random() < 0.5)
        return to_array(image)


def to_picture(image_HWC: np.ndarray) -> Image.Image:
    """Return a uint8 image of 1 or 3 channels as Pillow's, grey or RGB."""
    grey = image_HWC.shape[-1] == 1
    return Image.fromarray(np.ascontiguousarray(image_HWC[..., 0] if grey else image_HWC))


def to_array(image: Image.Image) -> np.ndarray:
    """Return a Pillow image as a uint8 array [H, W, C]: the inverse of `to_picture`."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def apply(image: Image.Image, name: str, magnitude: float, negative: bool) -> Image.Image:
    """Return a grey or RGB image after one of OPERATIONS; `negative` is for those with a sign."""
    operation = OPERATIONS[name]
    strength = operation.strength(magnitude)
    return operation.edit(image, -strength if operation.signed and negative else strength)


def parse(name: str) -> RandAugment:
    """Return the RandAugment of a name such as rand-m9-mstd0.5-inc1.

    m: magnitude, 0 to 10; mstd: its deviation; n: number of operations, 2 by default; inc: the
    strength grows with the magnitude. inc is required, since the other kind is not offered.
    """
    part = r"-(mstd|m|n|inc)(\d+(?:\.\d+)?)"
    settings = re.findall(part, name)
    numbers = {key: float(number) for key, number in settings}
    magnitude, number = numbers.get("m", 99.0), numbers.get("n", 2.0)
    valid = re.fullmatch(f"rand({part})+", name) and len(numbers) == len(settings)
    if not valid or "inc" not in numbers or magnitude > HIGHEST or number < 1 or number % 1:
        raise UserError(
            f"config.data.augment={name!r}: write rand-mM-mstdS-inc1, such as rand-m9-mstd0.5-inc1,"
            " with a magnitude M from 0 to 10, its deviation S, and -nN for N operations per image"
            " instead of 2; or '' for none"
        )
    return RandAugment(magnitude, numbers.get("mstd", 0.0), int(number))
