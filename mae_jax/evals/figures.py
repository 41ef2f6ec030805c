"""Draw what a model makes of images, as sheets of rows with titles and a caption."""

import textwrap
from collections.abc import Sequence

import numpy as np

TILE = 160  # smaller images are enlarged to at least this width or height
MARGIN = 6
HIDDEN = np.array((190, 196, 206), np.uint8)  # a grey that differs from those of a grey image
ERROR_SCALE = 64  # levels that are drawn as the brightest colour

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
    images, predictions = rgb(images_BHWC), rgb(predictions_BHWC)
    columns = (
        images,
        paste(images, HIDDEN, masks_BL, patch_size),
        predictions,
        paste(images, predictions, masks_BL, patch_size),
    )
    titles = ("original", "masked", "reconstruction", "with visible patches")
    return sheet(list(zip(*columns, strict=True)), titles, caption)


def errors(
    images_BHWC: np.ndarray,
    masks_BL: np.ndarray,
    predictions_BHWC: np.ndarray,
    *,
    patch_size: Size,
    caption: str,
) -> np.ndarray:
    """Draw a row for each image: original, prediction with visible patches, absolute error."""
    error_BHW = np.abs(predictions_BHWC.astype(float) - images_BHWC).mean(-1) / ERROR_SCALE
    error_BHWC = heat(np.clip(error_BHW, 0, 1))
    columns = (
        images_BHWC,
        paste(images_BHWC, predictions_BHWC, masks_BL, patch_size),
        paste(np.broadcast_to(HIDDEN, error_BHWC.shape), error_BHWC, masks_BL, patch_size),
    )
    return sheet(
        list(zip(*columns, strict=True)),
        ("original", "with visible patches", "absolute error"),
        f"Error: mean over channels, black 0 to bright {ERROR_SCALE} levels or more; grey where"
        f" patches are visible. {caption}",
    )


def ratios(
    images_BHWC: np.ndarray,
    outcomes: Sequence[tuple[np.ndarray, ...]],
    patch_size: Size,
    caption: str,
) -> np.ndarray:
    """Draw a row for each image: original, then masked and reconstructed for each outcome.

    Args:
      outcomes: pairs of masks_BL and predictions_BHWC.
    """
    images = rgb(images_BHWC)
    columns, titles = [images], ["original"]
    for masks_BL, predictions_BHWC in outcomes:
        for under in (HIDDEN, rgb(predictions_BHWC)):
            columns.append(paste(images, under, masks_BL, patch_size))
        titles += [f"{masks_BL[0].mean():.0%} hidden", "reconstructed"]
    return sheet(list(zip(*columns, strict=True)), titles, caption)


def attention(image_HWC: np.ndarray, attention_MSL: np.ndarray, patch_size: Size) -> np.ndarray:
    """Draw the cls token's attention to patches: a row for each of M layers, all heads in it."""
    scaled = attention_MSL / attention_MSL.max(-1, keepdims=True)
    maps = scaled.reshape(*scaled.shape[:2], *grid(image_HWC[None], patch_size))
    maps_MSHW = enlarge(maps, patch_size, axis=2)
    return sheet(
        [[image_HWC, *maps] for maps in heat(maps_MSHW)],
        ["original", *(f"head {i}" for i in range(scaled.shape[1]))],
        "Attention of the cls token to the patches; a row for each layer, the first on top."
        " Each map is scaled to its largest value.",
    )


def components(images_BHWC: np.ndarray, features_BLD: np.ndarray, patch_size: Size) -> np.ndarray:
    """Draw a row for each image: the original, and the principal components of its patches.

    The components are those of all features, also of images that are not drawn.
    """
    colours = principal_colours(features_BLD, grid(images_BHWC, patch_size))
    colours = enlarge(colours, patch_size, axis=1)
    return sheet(
        list(zip(images_BHWC, colours, strict=False)),
        ("original", "patch features"),
        "The first three principal components of the patch features of all images, as red,"
        " green and blue.",
    )


def neighbours(
    query_HWC: np.ndarray, images_BHWC: np.ndarray, nearest: Sequence[tuple[int, float]]
) -> np.ndarray:
    """Draw a query and the images nearest to it, given by (index, similarity)."""
    return sheet(
        [[query_HWC, *(images_BHWC[i] for i, _ in nearest)]],
        ["query", *(f"{similarity:.3f}" for _, similarity in nearest)],
        "The nearest images, by the cosine similarity of the cls tokens.",
    )


def sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], caption: str) -> np.ndarray:
    """Draw rows of images of one size, uint8 [H, W, C], under their titles, and a caption below.

    Small images are enlarged by a whole factor, without smoothing; channels are shown as by `rgb`.

    Returns:
      uint8 [height, width, 3].
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
            corner = (left + (cell - width) // 2, top + row * (height + MARGIN))
            canvas.paste(Image.fromarray(enlarged), corner)
    for number, text in enumerate(lines):
        draw.text((MARGIN, bottom + number * line), text, "black", font)
    return np.asarray(canvas)


def rgb(images: np.ndarray) -> np.ndarray:
    """Return three channels of any number: the first three, or of fewer the first one thrice."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., [0, 0, 0]]


def paste(
    images_BHWC: np.ndarray, under: np.ndarray, masks_BL: np.ndarray, patch_size: Size
) -> np.ndarray:
    """Return images with `under`, images or a colour, in place of the patches that are hidden."""
    hidden = (np.asarray(masks_BL) > 0).reshape(-1, *grid(images_BHWC, patch_size), 1)
    return np.where(enlarge(hidden, patch_size, axis=1), under, images_BHWC)


def grid(images_BHWC: np.ndarray, patch_size: Size) -> Size:
    """Return the rows and columns of patches."""
    return images_BHWC.shape[1] // patch_size[0], images_BHWC.shape[2] // patch_size[1]


def enlarge(maps: np.ndarray, patch_size: Size, axis: int) -> np.ndarray:
    """Repeat what there is once per patch, rows on `axis` and columns on the next, per pixel."""
    return maps.repeat(patch_size[0], axis).repeat(patch_size[1], axis + 1)


def heat(levels: np.ndarray) -> np.ndarray:
    """Return numbers from 0 to 1 as colours, uint8 [..., 3]."""
    import matplotlib

    return (matplotlib.colormaps["inferno"](levels)[..., :3] * 255).astype(np.uint8)


def principal_colours(features_BLD: np.ndarray, shape: Size) -> np.ndarray:
    """Return the first three principal components of all patches as RGB, uint8 [B, *shape, 3]."""
    flat = features_BLD.reshape(-1, features_BLD.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    parts = flat @ directions[:3].T
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))  # for fewer than three tokens
    low, high = np.percentile(parts, [1, 99], axis=0)
    scaled = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (scaled * 255).astype(np.uint8).reshape(len(features_BLD), *shape, 3)
