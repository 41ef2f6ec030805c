"""Crop, resize and flip decoded images on the host.

Pillow's bicubic filter (antialiased, rounded to uint8) is the reference for pixels, since the
published recipe resizes with it. Channels that are not three are resized one by one, and so are
those of float32 images, by the same filter and without rounding.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image

from mae_jax.data.decode import Picture

Box = tuple[int, int, int, int]  # left, top, width, height
Range = tuple[float, float]  # low, high

TRIES = 10  # to draw a random box that fits, before the fallback
MAX_STRETCH = 16  # how many times as long as the crop a resized picture may be


def resize_pillow(picture: Picture, box: Box, width: int, height: int) -> np.ndarray:
    """Resize a part of a picture by Pillow's bicubic filter, the reference."""
    size = (width, height)
    return _edit(_cut(picture, box), lambda part: part.resize(size, Image.Resampling.BICUBIC))


def resize_fast(picture: Picture, box: Box, width: int, height: int) -> np.ndarray:
    """Resize a part of a picture by cykooz-resizer's vector instructions: four times as fast.

    The library rounds its coefficients differently: photographs differ from Pillow's by 0.02 of 255
    levels on average. It would begin with the height; here the width is resized first, as Pillow
    mostly does.
    """
    import cykooz_resizer as fast

    resizer = fast.Resizer()
    options = fast.ResizeOptions(fast.ResizeAlg.convolution(fast.FilterType.catmull_rom))

    def resize(part: np.ndarray) -> np.ndarray:
        kind = fast.PixelType.U8x3 if part.ndim == 3 else fast.PixelType.U8
        kind = fast.PixelType.F32 if part.dtype == np.float32 else kind
        image = fast.ImageData(*box[2:], kind, part.tobytes())
        for size in ((width, box[3]), (width, height)):
            source, image = image, fast.ImageData(*size, kind)
            resizer.resize(source, image, options)
        return np.frombuffer(image.get_buffer(), part.dtype).reshape(height, width, *part.shape[2:])

    return _by_planes(_cut(picture, box), resize)


RESIZERS = {"pillow": resize_pillow, "fast": resize_fast}


def random_box(width: int, height: int, scale: Range, ratio: Range, rng: Generator) -> Box:
    """Draw a part of a picture: (left, top, width, height).

    The area is uniform in `scale` (fractions of the picture's), the aspect (width over height)
    log-uniform in `ratio`, the place uniform. If none of ten draws fits, return the largest centred
    box whose aspect is the picture's, clamped to `ratio`.
    """
    for _ in range(TRIES):
        w, h = _draw_sides(width * height, scale, ratio, rng)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    low, high = ratio
    w, h = width, height
    if width / height < low:
        h = max(round(width / low), 1)
    elif width / height > high:
        w = max(round(height * high), 1)
    return (width - w) // 2, (height - h) // 2, w, h


def probe_box(width: int, height: int, scale: Range, ratio: Range, rng: Generator) -> Box:
    """Draw a part of a picture like `random_box`, but once: cut sides that do not fit.

    The aspect of a box that was cut may lie outside `ratio`.
    """
    w, h = _draw_sides(width * height, scale, ratio, rng)
    w, h = min(max(w, 1), width), min(max(h, 1), height)
    return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h


def _draw_sides(pixels: int, scale: Range, ratio: Range, rng: Generator) -> tuple[int, int]:
    area = pixels * _uniform(*scale, rng)
    aspect = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1]), rng))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def _uniform(low: float, high: float, rng: Generator) -> float:
    """Return the number that `rng.uniform` draws, in a third of its time."""
    return low + (high - low) * rng.random()


def resized_crop(
    picture: Picture, size_HW: tuple[int, int], margin: int, offset: Callable[[int], int]
) -> np.ndarray:
    """Resize a picture to the smallest size that covers size * margin / 224, then crop it.

    Args:
      offset: the number of pixels that a side is longer than the crop -> where the crop begins.
    """
    crop_h, crop_w = size_HW
    least_w, least_h = crop_w * margin // 224, crop_h * margin // 224
    height, width = picture.shape[:2]
    # Only the middle of a very long strip is resized: all of it might not fit into memory.
    cut_w = min(width, -(-MAX_STRETCH * least_w * height // least_h))
    cut_h = min(height, -(-MAX_STRETCH * least_h * width // least_w))
    middle = _cut(picture, ((width - cut_w) // 2, (height - cut_h) // 2, cut_w, cut_h))
    if cut_w * least_h <= cut_h * least_w:
        new_w, new_h = least_w, least_w * cut_h // cut_w
    else:
        new_w, new_h = least_h * cut_w // cut_h, least_h
    x, y = offset(new_w - crop_w), offset(new_h - crop_h)

    def edit(part: Image.Image) -> Image.Image:
        part = part.resize((new_w, new_h), Image.Resampling.BICUBIC)
        return part.crop((x, y, x + crop_w, y + crop_h))

    return _edit(middle, edit)


def random_flip(image_HWC: np.ndarray, probability: float, rng: Generator) -> np.ndarray:
    """Mirror an image left and right, with this probability."""
    if rng.random() >= probability:
        return image_HWC
    mirrored = np.empty_like(image_HWC)
    for channel in range(image_HWC.shape[-1]):  # in one go it takes NumPy three times as long
        mirrored[..., channel] = image_HWC[:, ::-1, channel]
    return mirrored


def _cut(image_HWC: np.ndarray, box: Box) -> np.ndarray:
    left, top, width, height = box
    return image_HWC[top : top + height, left : left + width]


def _edit(image_HWC: np.ndarray, edit: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Return an image after an edit by Pillow."""

    def convert(part: np.ndarray) -> np.ndarray:
        mode = "F" if part.dtype == np.float32 else "RGB" if part.ndim == 3 else "L"
        image = edit(Image.frombytes(mode, part.shape[1::-1], part.tobytes()))
        shape = (image.height, image.width, *part.shape[2:])
        return np.frombuffer(image.tobytes(), part.dtype).reshape(shape)

    return _by_planes(image_HWC, convert)


def _by_planes(image_HWC: np.ndarray, edit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Edit an 8-bit RGB image as a whole, and any other image plane [H, W] by plane."""
    if image_HWC.shape[-1] == 3 and image_HWC.dtype == np.uint8:
        return edit(image_HWC)
    return np.stack([edit(plane) for plane in np.moveaxis(image_HWC, -1, 0)], -1)
