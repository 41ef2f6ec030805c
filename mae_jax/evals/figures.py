"""Sheets of images: rows, titles, caption; the canonical figure of reconstructions."""

import textwrap
from collections.abc import Sequence

import numpy as np
from einops import rearrange, repeat

TILE = 160  # smaller images are enlarged to at least this width or height
MARGIN = 6
HIDDEN = (190, 196, 206)  # a grey that differs from the greys of a grey image
TITLES = ("original", "masked", "reconstruction", "with visible patches")


def reconstructions(
    images_BHWC: np.ndarray,
    masks_BL: np.ndarray,
    predictions_BHWC: np.ndarray,
    *,
    patch: tuple[int, int],
    caption: str,
) -> np.ndarray:
    """A row for each image: original, masked, reconstruction, reconstruction with visible patches.

    Small images are enlarged by a whole factor, without smoothing. Of more than three channels the
    first three are shown, of two the first.

    Args:
      images_BHWC: uint8.
      masks_BL: 1 = hidden.
      predictions_BHWC: uint8, of the whole image.
      caption: what a reader must know, written below.

    Returns uint8 [height, width, 3].
    """
    images, predictions = rgb(images_BHWC), rgb(predictions_BHWC)
    rows = images.shape[1] // patch[0]
    hidden = rearrange(masks_BL > 0, "b (h w) -> b h w", h=rows)
    hidden = repeat(hidden, "b h w -> b (h r) (w c) 1", r=patch[0], c=patch[1])
    columns = (
        images,
        np.where(hidden, np.array(HIDDEN, np.uint8), images),
        predictions,
        np.where(hidden, predictions, images),
    )
    return sheet(list(zip(*columns, strict=True)), TITLES, caption)


def sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], caption: str) -> np.ndarray:
    """Rows of images of one size, uint8 [H, W, C], under their titles, a caption below.

    Small images are enlarged by a whole factor, without smoothing; channels as in
    `reconstructions`.

    Returns uint8 [height, width, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][0].shape[:2] if rows else (TILE, TILE)
    factor = max(1, -(-TILE // max(height, width)))
    height, width = height * factor, width * factor

    font = ImageFont.load_default(13)
    cell = max(width, *(int(font.getlength(title)) + 4 for title in titles))
    page = MARGIN + len(titles) * (cell + MARGIN)
    characters = int((page - 2 * MARGIN) / (font.getlength(caption) / len(caption)))
    lines = textwrap.wrap(caption, characters, break_on_hyphens=False)
    while characters > 1 and max(map(font.getlength, lines)) > page - 2 * MARGIN:
        characters -= 1  # a line of wide letters
        lines = textwrap.wrap(caption, characters, break_on_hyphens=False)
    line = 17  # pixels from one line of text to the next
    top = MARGIN + line
    bottom = top + len(rows) * (height + MARGIN)
    canvas = Image.new("RGB", (page, bottom + len(lines) * line + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        left = MARGIN + column * (cell + MARGIN)
        draw.text((left + cell / 2, MARGIN), title, "black", font, anchor="ma")
        for row, tiles in enumerate(rows):
            enlarged = rgb(tiles[column]).repeat(factor, 0).repeat(factor, 1)
            place = (left + (cell - width) // 2, top + row * (height + MARGIN))
            canvas.paste(Image.fromarray(enlarged), place)
    for number, text in enumerate(lines):
        draw.text((MARGIN, bottom + number * line), text, "black", font)
    return np.asarray(canvas)


def rgb(images: np.ndarray) -> np.ndarray:
    """Three channels of any number: the first three, or the first thrice."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., [0, 0, 0]]
