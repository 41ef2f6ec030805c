"""Draw what a model makes of images, as sheets of columns with titles and a caption."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mae_jax.errors import UserError

TILE = 160  # smaller images are enlarged to at least this width or height
MARGIN = 6
LINE = 17  # pixels from one line of text to the next
PICTURES = 6  # rows of a sheet of evaluated images
HIDDEN = np.array((190, 196, 206), np.uint8)  # a grey that differs from those of a grey image

Size = tuple[int, int]  # (height, width)


def reconstructions(
    images_BHWC: np.ndarray,
    masks_BL: np.ndarray,
    predictions_BHWC: np.ndarray,
    *,
    patch_size: Size,
    caption: str,
) -> np.ndarray:
    """Draw a row for each image: original, masked, reconstruction, the same with visible patches.

    Args:
      images_BHWC: uint8.
      masks_BL: 1 = hidden.
      predictions_BHWC: uint8, of the whole image.
      caption: what a reader must know, written below.

    Returns:
      uint8 [height, width, 3].
    """
    columns = [
        ("original", images_BHWC),
        ("masked", paste(images_BHWC, HIDDEN, masks_BL, patch_size)),
        ("reconstruction", predictions_BHWC),
        ("with visible patches", paste(images_BHWC, predictions_BHWC, masks_BL, patch_size)),
    ]
    return sheet(columns, caption)


def sheet(columns: Sequence[tuple[str, np.ndarray]], caption: str) -> np.ndarray:
    """Draw columns of images, uint8 [B, H, W, C], under their titles, and a caption below.

    Small images are enlarged by a whole factor, without smoothing; channels are shown as by `rgb`.

    Returns:
      uint8 [height, width, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    count, height, width, _ = columns[0][1].shape
    factor = max(1, -(-TILE // max(height, width)))
    height, width = height * factor, width * factor

    font = ImageFont.load_default(13)
    cell = max(width, *(int(font.getlength(title)) + 4 for title, _ in columns))
    page = MARGIN + len(columns) * (cell + MARGIN)
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= page - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    top = MARGIN + LINE
    bottom = top + count * (height + MARGIN)
    canvas = Image.new("RGB", (page, bottom + len(lines) * LINE + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (title, images_BHWC) in enumerate(columns):
        left = MARGIN + column * (cell + MARGIN)
        draw.text((left + cell / 2, MARGIN), title, "black", font, anchor="ma")
        for row, tile_HWC in enumerate(rgb(images_BHWC)):
            enlarged = Image.fromarray(tile_HWC.repeat(factor, 0).repeat(factor, 1))
            canvas.paste(enlarged, (left + (cell - width) // 2, top + row * (height + MARGIN)))
    for number, text in enumerate(lines):
        draw.text((MARGIN, bottom + number * LINE), text, "black", font)
    return np.asarray(canvas)


def choose_bands(bands: Sequence[int], channels: int) -> tuple[int, ...]:
    """Return which bands are shown, counted from 1: the given ones, the first three, or one.

    Raises:
      UserError: `bands` are not one or three of those that the images have.
    """
    chosen = tuple(bands) or tuple(range(1, 4) if channels >= 3 else (1,))
    if len(chosen) not in (1, 3) or not 1 <= min(chosen) <= max(chosen) <= channels:
        raise UserError(
            f"bands={chosen}: give one or three of the bands 1 to {channels}, such as 1 or 3,2,1"
        )
    return chosen


def bands_of(levels_BHWC: Any, bands: Sequence[int]) -> np.ndarray:
    """Return these bands of images of levels as uint8, rounded and clipped to 0..255."""
    shown = np.asarray(levels_BHWC)[..., np.array(bands) - 1]
    return np.clip(np.round(shown), 0, 255).astype(np.uint8)


def rgb(images: np.ndarray) -> np.ndarray:
    """Return the first three channels, or the first one three times if there are fewer."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., [0, 0, 0]]


def paste(
    images_BHWC: np.ndarray, under: np.ndarray, masks_BL: np.ndarray, patch_size: Size
) -> np.ndarray:
    """Return RGB images with `under`, images or a colour, in place of the hidden patches."""
    hidden_BL1 = np.asarray(masks_BL)[..., None] > 0
    hidden_BHW1 = enlarge(hidden_BL1, images_BHWC.shape[1:3], patch_size)
    return np.where(hidden_BHW1, rgb(under), rgb(images_BHWC))


def enlarge(per_patch: np.ndarray, size: Size, patch_size: Size, axis: int = 1) -> np.ndarray:
    """Repeat a value of each patch for all its pixels; `axis`, L, becomes two axes, of `size`."""
    grid = (size[0] // patch_size[0], size[1] // patch_size[1])
    shape = (*per_patch.shape[:axis], *grid, *per_patch.shape[axis + 1 :])
    return per_patch.reshape(shape).repeat(patch_size[0], axis).repeat(patch_size[1], axis + 1)


def heat(levels: np.ndarray) -> np.ndarray:
    """Return numbers from 0 to 1 as colours, uint8 [..., 3]."""
    import matplotlib

    return (matplotlib.colormaps["inferno"](levels)[..., :3] * 255).astype(np.uint8)


def principal_colours(features_BLD: np.ndarray) -> np.ndarray:
    """Return the first three principal components of all patches as RGB, uint8 [B, L, 3]."""
    flat = features_BLD.reshape(-1, features_BLD.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    parts = flat @ directions[:3].T
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))  # for fewer than three tokens
    low, high = np.percentile(parts, [1, 99], axis=0)
    scaled = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (scaled * 255).astype(np.uint8).reshape(*features_BLD.shape[:2], 3)
