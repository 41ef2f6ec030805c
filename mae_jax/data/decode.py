"""Decode images on the host: files in, uint8 or float32 arrays of their size out."""

import contextlib
import io
import struct

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mae_jax.data import bands
from mae_jax.data.bands import BadImage, WrongBands

Picture = np.ndarray  # uint8 or float32 [H, W, C], of the size of its file

# Pillow opens more formats: some run other programs (EPS), and none holds photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # Pillow, too, takes a larger image for a decompression bomb

ORIENTATION = 0x0112  # the EXIF tag
SAMPLES, BITS, PLANAR = 277, 258, 284  # TIFF tags: bands, their bits, 2 = one after the other
UPRIGHT = {  # value of the EXIF tag -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    image: bytes | np.ndarray, channels: int = 3, *, dtype: type[np.number] = np.uint8
) -> Picture:
    """Return an image as a person would see it, or as float32 with the numbers that its file has.

    CMYK, grey and palettes are converted. 16-bit pixels keep their upper 8 bits. An animation gives
    its first frame. Transparent parts become white, since what a file stores there is arbitrary.
    Photographs are turned upright by their EXIF tag; the official loader does not turn them, which
    concerns a handful of ImageNet's images.

    Args:
      image: an encoded file, or a uint8 array [H, W] or [H, W, C].
      channels: 1 makes grey, 3 RGB. For any other number nothing is converted: the image must have
        as many.
      dtype: np.float32 reads TIFF, .npy and arrays alone, and converts no channels.

    Raises:
      BadImage: the image cannot be read, has no pixels, or more than MAX_PIXELS.
    """
    try:
        if dtype == np.float32:
            return bands.read_numbers(image, channels)
        if isinstance(image, np.ndarray):
            return _convert(_from_array(image, channels), channels)
        return _convert(_from_file(image, channels), channels)
    except (BadImage, MemoryError):  # lack of memory is no property of the image
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image, or of a format that is not read") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises many kinds at broken files
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _from_file(data: bytes, channels: int) -> Image.Image | np.ndarray:
    if not data:
        raise BadImage("empty")
    if bands.is_npy(data) or (bands.is_tiff(data) and not _pillow_reads(data, channels)):
        return _from_array(bands.eight_bits(bands.read(data), channels), channels)
    if channels == 3 and _is_plain_jpeg(data):
        # The same pixels as Pillow's in half the time, and without its 15 microseconds to read a
        # header. What simplejpeg refuses is left to Pillow.
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB")
    picture: Image.Image = Image.open(io.BytesIO(data), formats=_readable_formats())
    width, height = picture.size  # from the header; nothing is allocated yet
    if not 0 < width * height <= MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels (from 1 to {MAX_PIXELS:,} can be read)")
    if (picture.format, picture.mode, channels) == ("JPEG", "RGB", 3) and _turn(picture) is None:
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB")
    picture.load()
    turn = _turn(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        # Pillow scales 12 bits to 16 from a JPEG 2000, but not from a TIFF
        picture = Image.fromarray((np.asarray(picture) >> _bits(picture, 16) - 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        bits = _bits(picture, 32)
        raise WrongBands(
            f"{'signed ' if bits == 16 else ''}pixels of {bits} bits, whose range is unknown:"
            " convert it to 8 or 16 bits without sign, or give config.data.value_range"
        )
    return picture.transpose(turn) if turn is not None else picture


def _pillow_reads(data: bytes, channels: int) -> bool:
    """Return whether a TIFF is a photograph, of up to 4 bands, that Pillow knows."""
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as picture:
            tags = picture.tag_v2  # type: ignore[attr-defined]
            samples = tags.get(SAMPLES, 1)
            if tags.get(PLANAR, 1) == 2 and max(tags.get(BITS, (1,))) > 8:
                return False  # Pillow 13 gives noise
            if samples > 4 or channels in (1, 3):
                return samples <= 4
            if len(picture.getbands()) != samples:
                return False
            # Several pages without enough bands may be bands themselves
            return samples == channels or getattr(picture, "n_frames", 1) == 1
    except UnidentifiedImageError:  # 16 bits of colour, many bands
        return False


def _bits(picture: Image.Image, default: int) -> int:
    """Return how many bits a pixel has by the tags of a TIFF, or the default without them."""
    return max(getattr(picture, "tag_v2", {}).get(BITS, (default,)))


def _is_plain_jpeg(data: bytes) -> bool:
    """Return whether a file is a JPEG of three channels that no metadata can turn.

    Walk over the segments of the header (0xFF, a marker, a length); in doubt, return False.
    """
    start = 2 if data.startswith(b"\xff\xd8") else len(data)
    try:
        while True:
            begin, marker, length = struct.unpack_from(">BBH", data, start)
            if begin != 0xFF or marker == 0xE1:  # no header; EXIF or XMP
                return False
            if marker in (0xC0, 0xC1, 0xC2):  # the frame: bits, height, width, channels
                bits, height, width, channels = struct.unpack_from(">BHHB", data, start + 4)
                return (bits, channels) == (8, 3) and 0 < width * height <= MAX_PIXELS
            start += 2 + length
    except struct.error:  # the file ends
        return False


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Return what turns a picture upright by its EXIF tag, if it has one."""
    with contextlib.suppress(Exception):  # damaged EXIF is no reason to lose the pixels
        return UPRIGHT.get(picture.getexif().get(ORIENTATION, 1))
    return None


def _readable_formats() -> list[str]:
    """Return the FORMATS that this build of Pillow knows; `Image.open` fails on others."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _from_array(array: np.ndarray, channels: int) -> Image.Image | np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or not array.size:
        raise BadImage(f"{array.dtype} of shape {array.shape} is no uint8 image [H, W, C]")
    if array.shape[-1] == channels or array.shape[-1] > 4:
        return array
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _convert(picture: Image.Image | np.ndarray, channels: int) -> Picture:
    if isinstance(picture, Image.Image) and channels in (1, 3):
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        picture = picture.convert("L" if channels == 1 else "RGB")
    array = np.asarray(picture)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] != channels:
        raise bands.wrong_channels(array.shape[-1], channels)
    return array
