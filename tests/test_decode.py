"""Decoding as a person would expect it."""

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.ImageFile import ImageFile
from tiny import noise

from mae_jax.data.bands import BadImage
from mae_jax.data.decode import ORIENTATION, decode


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file written by hand, since Pillow writes neither 16-bit colour nor false sizes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in data)


def decoded(image: bytes | np.ndarray, channels: int = 3) -> np.ndarray:
    """The image as Pillow would give it, [H, W] if it is grey."""
    picture = decode(image, channels)
    return picture[..., 0] if channels == 1 else picture


def gradient() -> np.ndarray:
    """Smooth, so that lossy formats keep it nearly; no symmetry, so that turns show."""
    y, x = np.mgrid[:16, :24]
    return np.stack([10 * x, 15 * y, 5 * (x + y)], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_give_their_pixels(kind):
    image = noise(5, 7)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(encoded(image, kind, **options)), image)


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey():
    grey, colour = noise(5, 7, 0), noise(5, 7)
    for file in (encoded(grey), grey, grey[..., None]):
        np.testing.assert_array_equal(decoded(file), np.stack([grey] * 3, -1))
        np.testing.assert_array_equal(decoded(file, 1), grey)
    luma = Image.fromarray(colour).convert("L")
    for file in (encoded(colour), colour):
        np.testing.assert_array_equal(decoded(file, 1), luma)


def bits() -> Image.Image:
    return Image.fromarray(noise(5, 7, 0) > 127)


def palette() -> Image.Image:
    return Image.fromarray(gradient()).quantize(32)


@pytest.mark.parametrize(
    "image", [bits(), palette(), Image.new("RGB", (1, 1), (9, 8, 7))], ids=["1", "P", "RGB"]
)
def test_bits_palettes_and_single_pixels_show_their_colours(image):
    np.testing.assert_array_equal(decoded(encoded(image)), image.convert("RGB"))


def test_cmyk_jpegs_show_their_colours():
    cmyk = Image.fromarray(gradient()).convert("CMYK")
    assert np.abs(decoded(encoded(cmyk, "JPEG", quality=95)) - gradient().astype(int)).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.arange(0, 65536, 256, np.uint16).reshape(16, 16) + 255
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    file = encoded(Image.fromarray(values), kind, **options)
    np.testing.assert_array_equal(decoded(file, 1), np.arange(256).reshape(16, 16))
    np.testing.assert_array_equal(decoded(file)[..., 2], np.arange(256).reshape(16, 16))


def test_12_bit_grey_of_a_tiff_is_scaled_by_its_own_bits():
    values = (0, 1000, 2000, 4095)
    rows = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = b"II*\0" + struct.pack("<I", 14) + rows + struct.pack("<H", len(tags)) + entries
    assert decoded(file + bytes(4), 1).tolist() == [[value >> 4 for value in values]]


def test_16_bit_colour_is_scaled_as_16_bit_grey():
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    np.testing.assert_array_equal(decoded(png(5, 4, 16, 2, rows)), values >> 8)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_32_bit_pixels_of_unknown_range_are_refused(mode):
    file = encoded(Image.fromarray(noise(4, 4, 0)).convert(mode), "TIFF")
    with pytest.raises(BadImage, match="32 bits"):
        decode(file)


@pytest.mark.parametrize("order", "<>")
def test_signed_pixels_of_16_bits_are_refused_as_what_they_are(order):
    file = io.BytesIO()
    tifffile.imwrite(file, noise(4, 4, 0).astype(f"{order}i2"), byteorder=order)
    with pytest.raises(BadImage, match="signed pixels of 16 bits.*convert it to .* without sign"):
        decode(file.getvalue(), 1)


def test_transparent_parts_are_white():
    image = noise(4, 4, 4)
    alpha = image[..., 3:] / 255
    expected = image[..., :3] * alpha + 255 * (1 - alpha)
    for file in (encoded(image), image):
        assert np.abs(decoded(file) - expected).max() <= 1

    hole = np.full((4, 4), 1, np.uint8)
    hole[0, 0] = 0
    palette = Image.fromarray(hole, "P")
    palette.putpalette([9, 9, 9, 50, 100, 200])
    for kind in ("PNG", "GIF"):
        pixels = decoded(encoded(palette, kind, transparency=0))
        assert pixels[0, 0].tolist() == [255] * 3
        assert pixels[1, 1].tolist() == [50, 100, 200]

    key = Image.fromarray(np.array([[0, 7]], np.uint8))
    assert decoded(encoded(key, transparency=7), 1).tolist() == [[0, 255]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    pixels = decoded(file).astype(int)
    assert pixels.shape == (4, 6, 3)
    assert np.abs(pixels - (200, 0, 0)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_photographs_are_turned_upright(orientation, kind):
    # What the camera stored, for each value of the tag (EXIF 2.3, section 4.6.4).
    upright = gradient()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    pixels = decoded(encoded(np.ascontiguousarray(stored), kind, exif=exif, **options))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)


def test_damaged_exif_does_not_lose_the_picture():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\xff" * 40
    file = encoded(gradient(), "JPEG", quality=95)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the tags
        broken = decoded(file[:2] + segment + file[2:])
    np.testing.assert_array_equal(broken, decoded(file))


def bomb() -> bytes:
    return png(20_000, 20_000, 8, 2, b"\0" * 1000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"Dear diary,\n", "not an image"),
        (b"\xff\xd8\xff\xe0 no more of it", "cannot be decoded: Truncated"),
        (encoded(noise(32, 32))[:1500], "truncated"),
        (encoded(noise(64, 64), "JPEG")[:2000], "truncated"),
        (encoded(noise(32, 32), "WEBP")[:100], "cannot be decoded"),
        (bomb(), "more than 178,956,970 pixels"),
        (png(0, 5, 8, 2, b""), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    ],
    ids=["empty", "text", "head", "png", "jpeg", "webp", "bomb", "flat", "postscript"],
)
def test_what_is_no_image_is_refused_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    def load(self):
        raise AssertionError("pixels were asked for")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # not Pillow's own check alone
    with pytest.raises(BadImage, match="20000 x 20000"):
        decode(bomb())


def test_lack_of_memory_is_not_the_images_fault(monkeypatch):
    def load(self):
        raise MemoryError

    file = encoded(noise(4, 4))
    monkeypatch.setattr(ImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode(file)


def test_threads_leave_the_filters_of_warnings_alone():
    before, file = list(warnings.filters), encoded(noise(64, 64), "JPEG")
    threads = [threading.Thread(target=decode, args=(file,)) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_other_numbers_of_channels_pass_unchanged_and_are_never_guessed():
    for channels in (2, 4, 5, 13):
        image = noise(4, 6, channels)
        np.testing.assert_array_equal(decoded(image, channels), image)
    np.testing.assert_array_equal(decoded(encoded(noise(4, 6, 4)), 4), noise(4, 6, 4))
    with pytest.raises(BadImage, match="5 channels where 3 are wanted"):
        decode(noise(4, 6, 5), 3)
    with pytest.raises(BadImage, match="3 channels where 5 are wanted"):
        decode(encoded(noise(4, 6)), 5)
    with pytest.raises(BadImage, match="1 channels where 4 are wanted"):
        decode(noise(4, 6, 0), 4)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(array):
    with pytest.raises(BadImage, match="no uint8 image"):
        decode(array)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (33, 16), (211, 333)], ids=str)
def test_jpegs_have_the_pixels_of_pillow(shape, subsampling, progressive):
    for quality in (30, 75, 95):
        options = dict(quality=quality, subsampling=subsampling, progressive=progressive)
        data = encoded(noise(*shape) // 3, "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decoded(data), expected)


def test_a_colour_jpeg_is_decoded_without_pillow_and_a_grey_one_with_it(monkeypatch):
    loads, load = [], ImageFile.load
    monkeypatch.setattr(ImageFile, "load", lambda image: loads.append(image.mode) or load(image))
    colour = encoded(noise(20, 30), "JPEG")
    decode(colour)
    assert not loads
    decode(encoded(noise(20, 30, 0), "JPEG"))
    decode(colour, channels=1)
    assert "L" in loads and "RGB" in loads


@pytest.mark.parametrize("lost", [2, 200, 1500])
def test_a_cut_jpeg_is_judged_by_pillow(lost):
    data = encoded(noise(40, 60), "JPEG", quality=90)[:-lost]
    try:
        expected = np.asarray(Image.open(io.BytesIO(data)))
    except OSError as error:
        with pytest.raises(BadImage, match=str(error).split(" (")[0]):
            decode(data)
    else:
        np.testing.assert_array_equal(decoded(data), expected)
