"""RandAugment: every operation pixel by pixel, and how operations are drawn."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import augment

GOLDEN = np.load(Path(__file__).parent / "data" / "randaug_ops.npz")
ARGS = json.loads(str(GOLDEN["args"]))
NAMES = dict(zip(augment.OPERATIONS, GOLDEN["ops"].tolist(), strict=True))


def test_operations_are_the_official_fifteen():
    told = {"Increasing": "", "Rel": "", "X": "_x", "Y": "_y"}
    for ours, theirs in NAMES.items():
        for old, new in told.items():
            theirs = theirs.replace(old, new)
        assert ours.replace("_", "") == theirs.replace("_", "").lower()
    assert len(NAMES) == 15


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_the_operation_at_magnitude_9_is_the_official_one(name):
    """With the sign that was drawn there: arguments below 0, or factors below 1."""
    key = f"{NAMES[name]}@9"
    image = augment.apply(Image.fromarray(GOLDEN["image"]), name, 9.0, negative=True)
    np.testing.assert_array_equal(np.asarray(image), GOLDEN[key])
    _, strength, signed = augment.OPERATIONS[name]
    if ARGS[key]:
        factor = name in ("color", "contrast", "brightness", "sharpness")
        value = -strength(9.0) if signed else strength(9.0)
        assert value + factor == pytest.approx(ARGS[key][0], abs=1e-15)


# Magnitude -> strength, worked out from the published ranges
STRENGTHS = {
    "rotate": {0: 0, 5: 15, 10: 30},
    "posterize": {0: 4, 2.4: 4, 2.5: 3, 10: 0},
    "solarize": {0: 256, 5: 128, 10: 0},
    "solarize_add": {0: 0, 5: 55, 10: 110},
    "color": {0: 0, 10: 0.9},
    "shear_x": {0: 0, 10: 0.3},
    "translate_y": {0: 0, 10: 0.45},
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_strength_grows_with_magnitude(name):
    for magnitude, strength in STRENGTHS[name].items():
        assert augment.OPERATIONS[name].strength(magnitude) == pytest.approx(strength)


def test_draws_follow_the_published_rules(monkeypatch):
    """Two operations with replacement, each applied half of the time, N(9, 0.5) clipped at 10."""
    seen = []

    def note(image, name, magnitude, negative):
        seen.append((name, magnitude, negative))
        return image

    monkeypatch.setattr(augment, "apply", note)
    chosen, images = augment.parse("rand-m9-mstd0.5-inc1"), 6000
    rng = np.random.default_rng(0)
    per_image = []
    for _ in range(images):
        before = len(seen)
        chosen(np.zeros((1, 1, 3), np.uint8), rng)
        per_image.append(len(seen) - before)
    np.testing.assert_allclose(np.bincount(per_image) / images, [0.25, 0.5, 0.25], atol=0.02)
    names, magnitudes, signs = map(np.array, zip(*seen, strict=True))
    counts = np.array([(names == name).mean() for name in augment.OPERATIONS])
    np.testing.assert_allclose(counts, 1 / 15, atol=0.012)
    assert magnitudes.max() == 10.0
    assert abs((magnitudes == 10.0).mean() - 0.0228) < 0.01  # two deviations above the mean
    assert abs(np.median(magnitudes) - 9) < 0.03
    assert abs(np.percentile(magnitudes, 15.87) - 8.5) < 0.04
    assert abs(signs.mean() - 0.5) < 0.03
    pairs = [i for i in range(len(per_image)) if per_image[i] == 2]
    starts = np.cumsum([0, *per_image])
    repeated = np.mean([names[starts[i]] == names[starts[i] + 1] for i in pairs])
    assert abs(repeated - 1 / 15) < 0.02  # with replacement


def test_the_same_generator_gives_the_same_image_and_another_gives_another():
    chosen = augment.RandAugment(number=4)
    again = pickle.loads(pickle.dumps(chosen))
    first = [chosen(GOLDEN["image"], np.random.default_rng(seed)) for seed in range(8)]
    second = [again(GOLDEN["image"], np.random.default_rng(seed)) for seed in range(8)]
    np.testing.assert_array_equal(first, second)
    assert len({image.tobytes() for image in first}) > 5


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_grey_images_stay_grey_at_every_magnitude(name):
    grey = Image.fromarray(GOLDEN["image"]).convert("L")
    for magnitude in (0.0, 4.7, 10.0):
        image = augment.apply(grey, name, magnitude, negative=False)
        assert (image.mode, image.size) == ("L", grey.size)
    array = augment.RandAugment(number=3)(np.asarray(grey)[..., None], np.random.default_rng(0))
    assert array.shape == (64, 96, 1) and array.dtype == np.uint8


def test_a_mirrored_view_is_accepted():
    augment.RandAugment(number=8)(GOLDEN["image"][:, ::-1], np.random.default_rng(0))


def test_names_are_read():
    assert augment.parse("rand-m9-mstd0.5-inc1") == augment.RandAugment(9.0, 0.5, 2)
    assert augment.parse("rand-m7-n3-inc0") == augment.RandAugment(7.0, 0.0, 3)


@pytest.mark.parametrize(
    "name",
    ["auto", "rand", "rand-m9", "rand-m11-inc1", "rand-m9-inc1-w0", "rand-m9-n0-inc1",
     "rand-m9-m8-inc1", "rand-m9-n1.5-inc1"],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="such as rand-m9-mstd0.5-inc1"):
        augment.parse(name)
