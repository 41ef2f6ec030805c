"""Draw label maps: image, truth, prediction and error, and a legend of the classes."""

from collections.abc import Sequence

import numpy as np

from mae_jax.data.label_maps import IGNORED
from mae_jax.evals import figures

GREY = 110  # where a pixel has no class
WRONG = (214, 39, 40)  # the red of an error
SWATCH = 14  # pixels of a legend's side


def levels(images: np.ndarray) -> np.ndarray:
    """Return images as uint8; those of another type are stretched to 0..255 all together."""
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    return ((images - low) / max(high - low, 1e-12) * 255).astype(np.uint8)


def colours(classes: int) -> np.ndarray:
    """Return a colour for each class, and grey for IGNORED, uint8 (256, 3).

    Hues are spread by the golden ratio, so that neighbouring numbers look different.
    """
    from matplotlib.colors import hsv_to_rgb

    number = np.arange(256)
    hsv = np.stack(
        [number * 0.618034 % 1, 0.85 - 0.3 * (number // 6 % 2), 0.95 - 0.25 * (number % 3)], -1
    )
    table = (hsv_to_rgb(hsv) * 255).round().astype(np.uint8)
    table[classes:] = GREY
    return table


def sheet(
    images_BHWC: np.ndarray,
    truth_BHW: np.ndarray,
    predicted_BHW: np.ndarray,
    names: Sequence[str],
    caption: str,
) -> np.ndarray:
    """Draw a row for each image: image, truth, prediction, and where they differ, in red.

    Args:
      images_BHWC: of 1 or 3 channels; see `levels`.
      truth_BHW, predicted_BHW: class numbers, and IGNORED.
      names: of the classes.

    Returns:
      uint8 [height, width, 3].
    """
    table, rgb_BHWC = colours(len(names)), figures.rgb(levels(images_BHWC))
    wrong_BHW1 = ((truth_BHW != predicted_BHW) & (truth_BHW != IGNORED))[..., None]
    pale_BHW1 = (rgb_BHWC.mean(-1, keepdims=True) / 2 + 127).astype(np.uint8)
    error_BHWC = np.where(wrong_BHW1, np.array(WRONG, np.uint8), pale_BHW1)
    columns = [
        ("image", rgb_BHWC),
        ("truth", table[truth_BHW]),
        ("prediction", table[predicted_BHW]),
        ("error", error_BHWC),
    ]
    drawn = figures.sheet(columns, caption)
    shown = np.unique([*np.unique(truth_BHW), *np.unique(predicted_BHW)])
    return np.concatenate(
        [drawn, legend(names, shown[shown < len(names)].tolist(), drawn.shape[1])]
    )


def legend(names: Sequence[str], numbers: Sequence[int], width: int) -> np.ndarray:
    """Draw the names of some classes beside their colours, in lines of a width."""
    from PIL import Image, ImageDraw, ImageFont

    font, table = ImageFont.load_default(13), colours(len(names))
    entries = [(table[i], names[i]) for i in numbers] + [(table[IGNORED], "without a class")]
    places, x, y = [], figures.MARGIN, figures.MARGIN
    for _, name in entries:
        needed = SWATCH + 6 + int(font.getlength(name)) + 14
        if x + needed > width and x > figures.MARGIN:
            x, y = figures.MARGIN, y + figures.LINE + 3
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, y + figures.LINE + figures.MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for (colour, name), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), tuple(map(int, colour)), "black")
        draw.text((x + SWATCH + 6, y), name, "black", font)
    return np.asarray(canvas)
