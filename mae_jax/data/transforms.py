"""Decoding, cropping and resizing on the host: Pillow in, uint8 arrays out.

Pillow's bicubic filter (antialiased, rounded to uint8) is the reference for pixels: the published
recipe resizes with it. An image here is a PIL image, or, when it has neither one nor three
channels, a uint8 array (H, W, C) whose channels are resized one by one.
"""

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Picture = Image.Image | np.ndarray

MAX_PIXELS = 178_956_970  # Pillow's own limit for what may be a decompression bomb, twice over
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
TRIES = 10  # of a random crop, before the fallback
EVAL_RATIO = 224 / 256  # of the crop to the resized short side, for images up to 224 pixels


class BadImage(ValueError):
    """Bytes that are no image a person would recognise; the message says why."""


def decode(image: bytes | np.ndarray, channels: int = 3) -> Picture:
    """Decode an image as a person would see it.

    Turned upright by its EXIF tag; transparency on white; 16 bits scaled to 8; of an animation the
    first frame; CMYK, grey and palettes converted. (The official loader does not turn images.)

    Args:
      image: an encoded file, or a uint8 array (H, W) or (H, W, C).
      channels: 1 converts to grey, 3 to RGB; any other number must be that of the array.

    Raises:
      BadImage: it cannot be read, has no pixels, or more than MAX_PIXELS.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, channels)
    if not image:
        raise BadImage("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # a warning about each odd tag of each file helps no one
            with Image.open(io.BytesIO(image)) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise BadImage(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
                opened.load()
                picture = ImageOps.exif_transpose(opened)
                return _convert(picture, channels)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("it is not an image") from error
    except Exception as error:  # Pillow raises many kinds at broken files
        raise BadImage(str(error) or type(error).__name__) from error


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    if channels not in (1, 3):
        raise BadImage(f"an encoded image has 1 or 3 channels here, not {channels}")
    if picture.mode in WIDE_MODES:
        values = np.asarray(picture).astype(np.float64)
        if picture.mode == "F":
            low, high = min(values.min(), 0.0), max(values.max(), 1.0)
            values = (values - low) / (high - low) * 255
        else:
            values = values / (65535 if values.max() > 255 or picture.mode != "I" else 255) * 255
        picture = Image.fromarray(np.round(values).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


def _from_array(array: np.ndarray, channels: int) -> Picture:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise BadImage(f"an array {array.dtype}{[*array.shape]} is no uint8 image (H, W, C)")
    if array.shape[2] == channels and channels not in (1, 3):
        return array
    if array.shape[2] not in (1, 3) or channels not in (1, 3):
        raise BadImage(f"it has {array.shape[2]} channels, the model wants {channels}")
    return _convert(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array), channels)


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width)"""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]


def crop(picture: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """A rectangle; what lies outside of the picture is black."""
    if isinstance(picture, np.ndarray):
        return picture[top : top + height, left : left + width]
    return picture.crop((left, top, left + width, top + height))


def resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """Pillow's bicubic to (height, width), antialiased."""
    if isinstance(picture, np.ndarray):
        planes = [Image.fromarray(plane) for plane in np.moveaxis(picture, 2, 0)]
        return np.stack([np.asarray(resize(plane, size)) for plane in planes], -1)
    if picture.size == size[::-1]:
        return picture
    return picture.resize(size[::-1], Image.Resampling.BICUBIC)


def to_array(picture: Picture) -> np.ndarray:
    """uint8 (H, W, C)"""
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def sample_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of a picture of (height, width).

    Area uniform in `scale`, aspect (width over height) log-uniform in `ratio`, sides rounded to
    pixels; ten tries to fit, then the largest centred crop whose aspect is in `ratio`.
    """
    height, width = size
    log_ratio = np.log(ratio)
    for _ in range(TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            return top, int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = min(round(width / ratio[0]), height)
    elif width / height > ratio[1]:
        w = min(round(height * ratio[1]), width)
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized(
    picture: Picture,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Picture:
    """The crop of pre-training: cut first, then resize, so that nothing outside leaks in."""
    return resize(crop(picture, *sample_box(size_of(picture), scale, ratio, rng)), size)


def fixed(picture: Picture, size: tuple[int, int], rng: np.random.Generator) -> Picture:
    """A random crop without scaling, of the picture resized as for evaluation (Table 1e).

    The paper names the variant and gives no sizes; these are ours.
    """
    picture = resize(picture, _covering(size_of(picture), size))
    height, width = size_of(picture)
    top = int(rng.integers(0, height - size[0] + 1))
    left = int(rng.integers(0, width - size[1] + 1))
    return crop(picture, top, left, *size)


def center(picture: Picture, size: tuple[int, int]) -> Picture:
    """The crop of evaluation: resize so that the short side is size * 256 / 224, cut the centre.

    Sizes over 224 are cut without a margin, as in the official evaluation.
    """
    picture = resize(picture, _covering(size_of(picture), size))
    height, width = size_of(picture)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return crop(picture, top, left, *size)


def _covering(old: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The size, of the old aspect, whose shorter side (beside `size`) leaves the margin."""
    margin = EVAL_RATIO if max(size) <= 224 else 1.0
    target = int(size[0] / margin), int(size[1] / margin)
    if old[0] * target[1] <= old[1] * target[0]:  # relative to the target, height is the shorter
        return target[0], max(int(target[0] * old[1] / old[0]), size[1])
    return max(int(target[1] * old[0] / old[1]), size[0]), target[1]


def flip(picture: Picture) -> Picture:
    """Mirror left and right."""
    if isinstance(picture, np.ndarray):
        return picture[:, ::-1]
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
