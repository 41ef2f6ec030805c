"""Photometric distortion: random brightness, contrast, saturation and hue of an image.

The ranges are those that segmentation recipes share since SSD (Liu et al. 2016, arXiv 1512.02325).
"""

import numpy as np
from numpy.random import Generator
from PIL import Image

BRIGHTNESS = 32  # levels of 255, added
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 18 / 180  # of a turn
PROBABILITY = 0.5  # of each


def photometric(image_HWC: np.ndarray, rng: Generator) -> np.ndarray:
    """Distort a uint8 image of 1 or 3 channels; a grey one has neither saturation nor hue.

    Each change is made with probability 1/2. The contrast changes before the colours or after.
    """
    brighten, first, contrast, saturate, turn = rng.random(5) < PROBABILITY
    shift, factor = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(*CONTRAST)
    saturation, hue = rng.uniform(*SATURATION), rng.uniform(-HUE, HUE)
    levels = image_HWC.astype(np.float32)
    if brighten:
        levels = np.clip(levels + shift, 0, 255)
    if contrast and first:
        levels = np.clip(levels * factor, 0, 255)
    if image_HWC.shape[-1] == 3 and (saturate or turn):
        levels = _colours(levels, saturation if saturate else 1.0, hue if turn else 0.0)
    if contrast and not first:
        levels = np.clip(levels * factor, 0, 255)
    return levels.round().astype(np.uint8)


def _colours(levels_HWC: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Return RGB levels with their saturation multiplied, and their hue turned by `hue` turns."""
    picture = Image.fromarray(levels_HWC.round().astype(np.uint8)).convert("HSV")
    hsv = np.asarray(picture).astype(np.float32)
    hsv[..., 0] = np.mod(hsv[..., 0] + 256 * hue, 256)
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
    turned = np.floor(hsv).astype(np.uint8)
    return np.asarray(Image.fromarray(turned, "HSV").convert("RGB")).astype(np.float32)
