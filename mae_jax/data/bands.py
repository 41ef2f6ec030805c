"""Images of any number of bands and of any precision: TIFF files by tifffile, and .npy files."""

import io
import logging
import math
from collections.abc import Sequence

import numpy as np

MAX_VALUES = 3 * 178_956_970  # of an image: as many as the largest RGB image that is read has

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
NPY = b"\x93NUMPY"
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is reported with the file's name


class BadImage(ValueError):
    """Content that cannot be read as an image; the message says why."""


class WrongBands(BadImage):
    """An image of another number of channels, or of another type, than the config says."""


def pixel_type(value_range: Sequence[float]) -> type[np.uint8] | type[np.float32]:
    """Return the type of pixels up to the device: float32 where config.data.value_range is given.

    A float32 holds every 8-bit and 16-bit number exactly.
    """
    return np.float32 if value_range else np.uint8


def is_tiff(data: bytes) -> bool:
    """Return whether a file starts like a TIFF."""
    return data[:4] in TIFF


def is_npy(data: bytes) -> bool:
    """Return whether a file starts like one that numpy.save wrote."""
    return data.startswith(NPY)


def read(data: bytes) -> np.ndarray:
    """Return the array [H, W, bands] of a TIFF or .npy file, in the type that the file has.

    Raises:
      ValueError: the file is damaged, too large, or holds no image.
    """
    array = _read_npy(data) if is_npy(data) else _read_tiff(data)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(f"{array.dtype} of shape {array.shape} is no image [H, W, bands]")
    return array


def _read_npy(data: bytes) -> np.ndarray:
    """Return the array of a .npy file without ever unpickling, and without copying it."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy version {version} holds no plain numbers")
    header = (None, np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0)
    shape, fortran_order, dtype = header[version[0]](file)  # type: ignore[misc]
    if dtype.hasobject:
        raise ValueError("pickled objects are not read, since they could run any program")
    _check_size(shape)
    array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_tiff(data: bytes) -> np.ndarray:
    """Return the first image of a TIFF; pages of the same shape are taken as its bands."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        _check_size(series.shape)
        array, axes = series.asarray(), series.axes
    if array.ndim != 3:
        return array
    planes = [i for i, axis in enumerate(axes) if axis not in "YX"]
    return np.moveaxis(array, planes[0], -1) if len(planes) == 1 else array


def _check_size(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(f"shape {shape} is more than {MAX_VALUES:,} numbers: cut it into tiles")


def read_numbers(image: bytes | np.ndarray, channels: int) -> np.ndarray:
    """Return the numbers of a file or an array as float32 [H, W, C]."""
    if isinstance(image, bytes):
        if not (is_npy(image) or is_tiff(image)):
            raise WrongBands(
                "not a TIFF or .npy file: convert it to one, or leave config.data.value_range=()"
            )
        image = read(image)
    array = image[..., None] if image.ndim == 2 else image
    if array.ndim != 3 or array.shape[-1] != channels:
        raise wrong_channels(array.shape[-1], channels)
    array = np.ascontiguousarray(array, np.float32)
    if wrong := array.size - np.count_nonzero(np.isfinite(array)):
        raise BadImage(f"{wrong:,} values are not finite: write a number where there are no data")
    return array


def eight_bits(array: np.ndarray, channels: int) -> np.ndarray:
    """Return the array [H, W, C] of a TIFF or .npy file as uint8.

    Photographs of 16 bits keep their upper 8.
    """
    photo = array.shape[-1] in (1, 3, 4) and channels in (1, 3)
    if (array.dtype.kind, array.dtype.itemsize) == ("u", 2) and photo:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise WrongBands(
            f"{array.dtype} from {array.min():g} to {array.max():g} in {array.shape[-1]} channels:"
            " give the range to scale, such as --config.data.value_range='(0, 10000)'"
        )
    return array


def wrong_channels(found: int, wanted: int) -> WrongBands:
    """Return the error about an image of another number of channels than wanted."""
    return WrongBands(
        f"{found} channels where {wanted} are wanted: set config.model.channels={found}, with a"
        " config.data.mean and a config.data.std for each"
    )
