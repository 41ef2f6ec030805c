"""Random erasing, mixup and cutmix of normalised images and labels, on the device.

Pure functions for use inside jit: one draws at random, another applies what was drawn. Numbers:
REFERENCE section 3. Shape suffixes: B batch, H W image, C channels, Y classes, G groups of images.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import Array

ERASED_AREA = (0.02, 1 / 3)  # of the image
ERASED_RATIO = (0.3, 1 / 0.3)  # height over width
ERASE_TRIES = 10


class Boxes(NamedTuple):
    """Rectangles of an image, int32; the bottom row and the right column are not included."""

    top: Array
    bottom: Array
    left: Array
    right: Array


def _inside(boxes: Boxes, height: int, width: int) -> Array:
    """Return which pixels are within each box, bool [..., H, W]."""
    rows, cols = jnp.arange(height)[:, None], jnp.arange(width)
    top, bottom, left, right = (x[..., None, None] for x in boxes)
    return (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)


def draw_erasing(
    rng: Array, batch: int, height: int, width: int, probability: float
) -> tuple[Array, Boxes]:
    """Draw which images are erased, bool [B], and a box for each.

    The area and the logarithm of the aspect are uniform. Of ten draws, the first that is smaller
    than the image on both sides counts; if there is none, the image is not erased.
    """
    keys = jax.random.split(rng, 5)
    shape = (batch, ERASE_TRIES)
    area = height * width * jax.random.uniform(keys[0], shape, float, *ERASED_AREA)
    low, high = map(math.log, ERASED_RATIO)
    ratio = jnp.exp(jax.random.uniform(keys[1], shape, float, low, high))
    box_h = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    box_w = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (box_h < height) & (box_w < width)
    first = jnp.argmax(fits, 1)[:, None]
    box_h, box_w = (jnp.take_along_axis(x, first, 1)[:, 0] for x in (box_h, box_w))
    top = jax.random.randint(keys[2], (batch,), 0, jnp.maximum(height - box_h, 0) + 1)
    left = jax.random.randint(keys[3], (batch,), 0, jnp.maximum(width - box_w, 0) + 1)
    erased = jax.random.bernoulli(keys[4], probability, (batch,)) & fits.any(1)
    return erased, Boxes(top, top + box_h, left, left + box_w)


def erase(images_BHWC: Array, rng: Array, probability: float) -> Array:
    """Fill a random box of some images with N(0, 1), drawn for each pixel and channel."""
    batch, height, width, _ = images_BHWC.shape
    draw, fill = jax.random.split(rng)
    erased, boxes = draw_erasing(draw, batch, height, width, probability)
    noise_BHWC = jax.random.normal(fill, images_BHWC.shape, images_BHWC.dtype)
    hidden_BHW = _inside(boxes, height, width) & erased[:, None, None]
    return jnp.where(hidden_BHW[..., None], noise_BHWC, images_BHWC)


class Mix(NamedTuple):
    """The mixing that is drawn for each group of images."""

    lam_G: Array  # share of an image's own label, and in mixup of its own pixels
    cut_G: Array  # bool: cutmix, else mixup
    boxes: Boxes  # for cutmix, [G] each


def draw_mix(
    rng: Array, groups: int, height: int, width: int, *, mixup: float, cutmix: float
) -> Mix:
    """Draw for each group: mixup or cutmix by a fair coin, lambda from Beta(alpha, alpha), a box.

    Args:
      mixup, cutmix: the alphas; if one is 0 the other is always chosen. Not both may be 0.
    """
    coin, mix, cut, row, col = jax.random.split(rng, 5)
    share = 0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0)
    cut_G = jax.random.bernoulli(coin, share, (groups,))
    mixup_G, cutmix_G = (
        jax.random.beta(key, alpha, alpha, (groups,)) if alpha > 0 else jnp.ones(groups)
        for key, alpha in ((mix, mixup), (cut, cutmix))
    )
    y_G = jax.random.randint(row, (groups,), 0, height)
    x_G = jax.random.randint(col, (groups,), 0, width)
    return make_mix(mixup_G, cutmix_G, cut_G, y_G, x_G, height, width)


def make_mix(
    mixup_G: Array, cutmix_G: Array, cut_G: Array, y_G: Array, x_G: Array, height: int, width: int
) -> Mix:
    """Return a Mix whose boxes have sqrt(1 - lambda) of each side, around a centre (y, x).

    Boxes are clipped to the image; the lambda of cutmix is then the share outside the clipped box.
    """
    side_G = jnp.sqrt(1 - cutmix_G)
    box_h, box_w = ((n * side_G).astype(jnp.int32) for n in (height, width))
    top, bottom = (jnp.clip(y_G + half, 0, height) for half in (-(box_h // 2), box_h // 2))
    left, right = (jnp.clip(x_G + half, 0, width) for half in (-(box_w // 2), box_w // 2))
    boxes = Boxes(top, bottom, left, right)
    area_G = (bottom - top) * (right - left)
    return Mix(jnp.where(cut_G, 1 - area_G / (height * width), mixup_G), cut_G, boxes)


def mix_images(images_BHWC: Array, mix: Mix) -> Array:
    """Mix each image with its partner; the partners are the group in reverse order."""
    own = rearrange(images_BHWC, "(g n) h w c -> g n h w c", g=len(mix.lam_G))
    partner = own[:, ::-1]
    lam, cut = (x[:, None, None, None, None] for x in (mix.lam_G, mix.cut_G))
    box = _inside(mix.boxes, *images_BHWC.shape[1:3])[:, None, :, :, None]
    mixed = jnp.where(cut, jnp.where(box, partner, own), lam * own + (1 - lam) * partner)
    return rearrange(mixed, "g n h w c -> (g n) h w c")


def smooth(label_B: Array, classes: int, smoothing: float) -> Array:
    """Return labels as distributions: 1 - s + s / Y for the label, s / Y for every other class."""
    return jax.nn.one_hot(label_B, classes) * (1 - smoothing) + smoothing / classes


def mix_targets(target_BY: Array, mix: Mix) -> Array:
    """Mix each target with its partner's, lambda to 1 - lambda."""
    own = rearrange(target_BY, "(g n) y -> g n y", g=len(mix.lam_G))
    lam = repeat(mix.lam_G, "g -> g 1 1")
    return rearrange(lam * own + (1 - lam) * own[:, ::-1], "g n y -> (g n) y")
