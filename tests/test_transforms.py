"""Crops against plain Pillow, pixel by pixel."""

import math
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from tiny import noise

from mae_jax.data import crops, transforms

BICUBIC = Image.Resampling.BICUBIC
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
BOX = dict(scale=SCALE, ratio=RATIO, resizer="pillow")


def plain(image: np.ndarray, box: tuple[int, int, int, int], size_HW) -> np.ndarray:
    """Cut the box out of the array, then Pillow's bicubic."""
    left, top, width, height = box
    part = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    return np.asarray(part.resize(size_HW[::-1], BICUBIC))


@pytest.mark.parametrize("size_HW", [(24, 24), (16, 40)], ids=str)
@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (9, 11), (1, 1)], ids=str)
def test_random_resized_crop_cuts_its_box_and_resizes_it(shape, size_HW):
    image = noise(*shape)
    for seed in range(20):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        got = crops.random_resized(image, size_HW, rng, **BOX)
        box = transforms.random_box(*shape[::-1], SCALE, RATIO, same)
        np.testing.assert_array_equal(got, plain(image, box, size_HW))


def photographs():
    from skimage import data  # in the wheel

    return [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]


@pytest.mark.parametrize("crop", [crops.random_resized, crops.probe])
def test_the_fast_resizer_is_nearly_pillow(crop):
    apart = []
    for seed, image in enumerate(5 * photographs()):
        scale = max(1, min(image.shape[:2]) // 375)  # of ImageNet's size
        picture = np.asarray(Image.fromarray(image).reduce(scale))
        exact, fast = (
            crop(picture, (224, 224), np.random.default_rng(seed), **BOX | {"resizer": resizer})
            for resizer in ("pillow", "fast")
        )
        assert fast.shape == (224, 224, 3) and fast.dtype == np.uint8
        apart.append(np.abs(exact.astype(int) - fast).mean())
    assert 0 < np.mean(apart) < 0.1 and max(apart) < 0.5


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (50, 40), (700, 90), (1, 1), (64, 48)])
def test_the_fast_resizer_rounds_each_direction_as_pillow_but_for_one_level(size):
    width, height = size
    image = noise(height, width)
    fast = transforms.resize_fast(image, (0, 0, width, height), 64, 48)
    wide = transforms.resize_pillow(image, (0, 0, width, height), 64, height)
    exact = transforms.resize_pillow(wide, (0, 0, 64, height), 64, 48)
    apart = np.abs(exact.astype(int) - fast)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_the_fast_resizer_takes_any_number_of_channels():
    def crop(picture):
        rng = np.random.default_rng(3)
        return crops.random_resized(picture, (24, 32), rng, **BOX | {"resizer": "fast"})

    image = noise(50, 70)
    for picture in (image, image[..., :1], np.concatenate([image, image], -1)):
        got = crop(picture)
        assert got.shape == (24, 32, picture.shape[-1])
        planes = [crop(plane[..., None]) for plane in np.moveaxis(picture, -1, 0)]
        np.testing.assert_array_equal(got, np.concatenate(planes, -1))


def test_random_box_follows_the_rule_draw_by_draw():
    width, height = 300, 200
    for seed in range(200):
        rng = np.random.default_rng(seed)
        got = transforms.random_box(width, height, SCALE, RATIO, rng)
        same = np.random.default_rng(seed)
        expected = None
        for _ in range(10):
            area = 60_000 * same.uniform(0.2, 1.0)
            aspect = math.exp(same.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                expected = same.integers(0, width - w + 1), same.integers(0, height - h + 1), w, h
                break
        assert got == (expected or ((300 - 267) // 2, 0, 267, 200))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 10, (493, 0, 13, 10)),  # as wide as the ratio allows
        (10, 1000, (0, 493, 10, 13)),
        (1000, 1, (499, 0, 1, 1)),
        (1, 1000, (0, 499, 1, 1)),
        (1, 1, (0, 0, 1, 1)),
    ],
    ids=str,
)
def test_strips_get_the_largest_centred_box_of_an_allowed_aspect(width, height, expected):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert transforms.random_box(width, height, SCALE, RATIO, rng) == expected


def test_fallback_of_an_allowed_aspect_is_the_whole_picture():
    class Largest:  # draws that never fit: the largest area in the widest aspect
        def random(self):
            return 1.0

    assert transforms.random_box(100, 100, SCALE, RATIO, Largest()) == (0, 0, 100, 100)


@pytest.mark.parametrize("size, corner", [(224, (58, 16)), (256, (42, 0))])
def test_center_crop_is_that_of_the_official_evaluation(size, corner):
    """With a margin up to 224. round((341 - 224) / 2) is even: 58."""
    image, (left, top) = noise(300, 400), corner
    resized = np.asarray(Image.fromarray(image).resize((341, 256), BICUBIC))
    expected = resized[top : top + size, left : left + size]
    np.testing.assert_array_equal(crops.center(image, (size, size)), expected)
    upright = crops.center(image.swapaxes(0, 1), (size, size))
    assert upright.shape == (size, size, 3)


@pytest.mark.parametrize("size_HW", [(32, 64), (64, 32), (96, 96), (14, 14)], ids=str)
@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (7, 5), (1, 1), (300, 300)], ids=str)
def test_center_crop_resizes_to_the_smallest_cover_of_the_size_and_its_margin(shape, size_HW):
    (height, width), image = shape, noise(*shape)
    least_h, least_w = (int(side / (224 / 256)) for side in size_HW)
    factor = max(Fraction(least_h, height), Fraction(least_w, width))
    new_w, new_h = int(width * factor), int(height * factor)
    left, top = round((new_w - size_HW[1]) / 2), round((new_h - size_HW[0]) / 2)
    resized = Image.fromarray(image).resize((new_w, new_h), BICUBIC)
    expected = resized.crop((left, top, left + size_HW[1], top + size_HW[0]))
    np.testing.assert_array_equal(crops.center(image, size_HW), expected)


@pytest.mark.parametrize("shape", [(2, 60_000), (60_000, 2)], ids=str)
def test_of_a_long_strip_only_the_middle_is_resized(shape, monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda p, size, *a: sizes.append(size) or resize(p, size, *a)
    )
    image = noise(*shape)
    got = crops.center(image, (32, 32))
    assert max(sizes[0]) <= 36 * (transforms.MAX_STRETCH + 1)
    middle = slice(30_000 - 100, 30_000 + 100)
    part = image[:, middle] if shape[0] == 2 else image[middle]
    np.testing.assert_array_equal(got, crops.center(part, (32, 32)))


def test_fixed_crop_is_a_part_of_the_resized_picture_at_every_place():
    image = noise(80, 60)
    resized = np.asarray(Image.fromarray(image).resize((36, 48), BICUBIC))  # 32 * 256 // 224 = 36
    places = {}
    for top in range(48 - 32 + 1):
        for left in range(36 - 32 + 1):
            places[resized[top : top + 32, left : left + 32].tobytes()] = (top, left)
    rng = np.random.default_rng(0)
    drawn = [crops.fixed(image, (32, 32), rng) for _ in range(800)]
    assert {places[crop.tobytes()] for crop in drawn} == set(places.values())


def test_fixed_crop_moves_at_any_size():
    image, rng = noise(60, 60), np.random.default_rng(0)
    assert len({crops.fixed(image, (256, 256), rng).tobytes() for _ in range(3)}) == 3


@pytest.mark.parametrize("crop", [crops.random_resized, crops.fixed, crops.center])
@pytest.mark.parametrize("channels", [2, 4, 7])
def test_crops_treat_the_channels_of_an_array_one_by_one(channels, crop):
    image = noise(30, 40, channels)
    box = BOX if crop is crops.random_resized else {}
    got = crop(image, (16, 24), np.random.default_rng(3), **box)
    assert got.shape == (16, 24, channels)
    assert got.dtype == np.uint8
    for channel in range(channels):
        plane = image[..., channel : channel + 1]
        alone = crop(plane, (16, 24), np.random.default_rng(3), **box)
        np.testing.assert_array_equal(got[..., channel], alone[..., 0])
