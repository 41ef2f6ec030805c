"""Random erasing, mixup, cutmix and smoothing against direct renderings in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models import mixup

B, H, W, C, Y, GROUP = 12, 20, 30, 3, 5, 4


def images_and_targets():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(B, H, W, C)).astype(np.float32)
    return images, np.asarray(mixup.smooth(jnp.asarray(rng.integers(0, Y, B)), Y, 0.1))


def test_smoothing_is_the_published_formula():
    expected = np.full((3, 4), 0.1 / 4)
    expected[[0, 1, 2], [2, 0, 3]] = 1 - 0.1 + 0.1 / 4
    ours = mixup.smooth(jnp.array([2, 0, 3]), 4, 0.1)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(ours).sum(1), 1, rtol=1e-6)


# Mixup; cutmix within the image; cutmix whose box is clipped at a corner; a box of nothing
DRAWS = [
    (0.3, 0.9, False, 5, 5),
    (0.9, 0.36, True, 10, 15),
    (0.9, 0.2, True, 1, 29),
    (0.5, 1.0, True, 0, 0),
]


@pytest.mark.parametrize("order", [(0, 1, 2), (3, 2, 0)], ids=str)
def test_each_group_is_mixed_by_its_own_draw_with_its_reverse(order):
    images, targets = images_and_targets()
    draws = [DRAWS[i] for i in order]
    expected, expected_targets = images.copy(), targets.copy()
    for group, (mix_lam, cut_lam, cut, cy, cx) in enumerate(draws):
        rows = range(group * GROUP, (group + 1) * GROUP)
        lam = mix_lam
        if cut:
            h, w = int(H * math.sqrt(1 - cut_lam)), int(W * math.sqrt(1 - cut_lam))
            y0, y1 = max(cy - h // 2, 0), min(cy + h // 2, H)
            x0, x1 = max(cx - w // 2, 0), min(cx + w // 2, W)
            lam = 1 - (y1 - y0) * (x1 - x0) / (H * W)
        for row, partner in zip(rows, reversed(rows), strict=True):
            if cut:
                expected[row, y0:y1, x0:x1] = images[partner, y0:y1, x0:x1]
            else:
                expected[row] = lam * images[row] + (1 - lam) * images[partner]
            expected_targets[row] = lam * targets[row] + (1 - lam) * targets[partner]
    mix = mixup.make_mix(*(jnp.array(values) for values in zip(*draws, strict=True)), H, W)
    np.testing.assert_allclose(mixup.mix_images(jnp.asarray(images), mix), expected, atol=1e-6)
    ours = mixup.mix_targets(jnp.asarray(targets), mix)
    np.testing.assert_allclose(ours, expected_targets, atol=1e-6)


def draws(mixup_alpha, cutmix_alpha, groups=4000):
    return jax.jit(
        lambda key: mixup.draw_mix(key, groups, H, W, mixup=mixup_alpha, cutmix=cutmix_alpha)
    )(jax.random.key(0))


def test_draws_follow_the_published_distributions():
    mix = draws(0.8, 1.0)
    cut, lam = np.asarray(mix.cut_G), np.asarray(mix.lam_G)
    assert abs(cut.mean() - 0.5) < 0.03
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1))
    assert abs(lam[~cut].mean() - 0.5) < 0.03
    assert abs(lam[~cut].var() - 1 / (4 * 2.6)) < 0.006
    # Beta(1, 1) is uniform, and clipping leaves more of the image: E[1 - area] > 1/2
    assert 0.5 < lam[cut].mean() < 0.8
    assert len(np.unique(lam[~cut])) > 1900  # every group has its own


def test_an_alpha_of_zero_leaves_the_other():
    assert not np.asarray(draws(0.8, 0.0).cut_G).any()
    assert np.asarray(draws(0.0, 1.0).cut_G).all()


def test_centres_of_boxes_are_uniform():
    groups = 5000
    mix = jax.jit(lambda key: mixup.draw_mix(key, groups, H, W, mixup=0.0, cutmix=50.0))(
        jax.random.key(1)
    )
    whole = (mix.boxes.top > 0) & (mix.boxes.bottom < H)  # not clipped: the middle is the centre
    centre = np.asarray((mix.boxes.top + mix.boxes.bottom) / 2)[np.asarray(whole)]
    assert abs(centre.mean() - H / 2) < 0.3
    # A box of cutmix is clipped at the border, which a uniform centre reaches.
    assert np.asarray(mix.boxes.top == 0).mean() > 0.2


def test_erased_boxes_follow_the_published_distributions():
    batch, side = 20_000, 224
    erased, boxes = jax.device_get(
        jax.jit(lambda key: mixup.draw_erasing(key, batch, side, side, 0.25))(jax.random.key(0))
    )
    assert abs(erased.mean() - 0.25) < 0.01
    height, width = boxes.bottom - boxes.top, boxes.right - boxes.left
    assert (boxes.top >= 0).all() and (boxes.bottom <= side).all()
    assert (boxes.left >= 0).all() and (boxes.right <= side).all()
    assert (height < side).all() and (width < side).all()
    assert (boxes.top == 0).any() and (boxes.bottom == side).any()
    # The same rule, one image at a time
    rng = np.random.default_rng(0)
    areas, ratios, places = [], [], []
    while len(areas) < batch:
        area = rng.uniform(0.02, 1 / 3) * side * side
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < side and w < side:
            areas.append(h * w)
            ratios.append(h / w)
            places.append(rng.integers(0, side - h + 1))
    quantiles = [5, 25, 50, 75, 95]
    for ours, theirs in (
        (height * width, areas),
        (np.log(height / width), np.log(ratios)),
        (boxes.top, places),
    ):
        spread = np.std(theirs)
        ours, theirs = np.percentile(ours, quantiles), np.percentile(theirs, quantiles)
        np.testing.assert_allclose(ours, theirs, atol=0.05 * spread)


def test_erasing_fills_one_box_with_noise_for_each_pixel():
    images = jnp.full((64, 40, 40, 3), 7.0)
    ours = np.asarray(mixup.erase(images, jax.random.key(0), 1.0))
    changed = ours != 7.0
    assert (changed.all(-1) == changed.any(-1)).all()
    for image in changed.all(-1):
        rows, cols = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert image[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()  # a box
        assert 0.015 <= image.mean() <= 0.36
    noise = ours[changed]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len(np.unique(noise)) > 0.99 * noise.size
    np.testing.assert_array_equal(mixup.erase(images, jax.random.key(0), 0.0), images)
