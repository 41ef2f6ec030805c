"""Colour jitter on the host, by Pillow: for the paper's Table 1e, which gives no strengths."""

import dataclasses
import re

import numpy as np
from PIL import Image, ImageEnhance

from mae_jax.data.augment import to_array, to_picture
from mae_jax.errors import UserError

KINDS = {"b": "brightness", "c": "contrast", "s": "saturation", "h": "hue"}


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Random colours of a uint8 image [H, W, C] of 1 or 3 channels; safe to pickle.

    Brightness, contrast and saturation are multiplied by factors uniform in 1 - s .. 1 + s, the hue
    is turned by up to `hue` of the circle; in random order. Grey images have no saturation or hue.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = to_picture(image_HWC)
        kinds = ["brightness", "contrast"] + ["saturation", "hue"] * (image.mode != "L")
        for kind in rng.permutation(kinds):
            strength = getattr(self, kind)
            if strength:
                image = shift(image, kind, rng.uniform(-strength, strength))
        return to_array(image)


def shift(image: Image.Image, kind: str, amount: float) -> Image.Image:
    """Return an image with one of KINDS times 1 + amount, or its hue turned by `amount` turns."""
    if kind == "hue":
        hue, saturation, value = image.convert("HSV").split()
        turned = hue.point([(level + round(256 * amount)) % 256 for level in range(256)])
        return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    enhance: dict[str, type] = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    return enhance[kind](image).enhance(1 + amount)


def parse(name: str) -> ColourJitter:
    """Return the jitter of a name such as jitter-b0.4-c0.4-s0.4-h0.1."""
    part = r"-([bcsh])(\d+(?:\.\d+)?)"
    parts = re.findall(part, name)
    strengths = {KINDS[letter]: float(number) for letter, number in parts}
    valid = re.fullmatch(f"jitter({part})+", name) and max(strengths.values()) <= 1
    valid = valid and len(strengths) == len(parts)
    if not valid or strengths.get("hue", 0.0) > 0.5:
        raise UserError(
            f"config.data.augment={name!r}: write jitter-bB-cC-sS-hH, such as"
            " jitter-b0.4-c0.4-s0.4-h0.1, with brightness, contrast and saturation up to 1 and hue"
            " up to 0.5, each once"
        )
    return ColourJitter(**strengths)
