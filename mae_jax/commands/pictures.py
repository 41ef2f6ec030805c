"""Draw what a model makes of images: reconstructions, attention and features."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from mae_jax import files
from mae_jax.config import resolve
from mae_jax.data.bands import BadImage
from mae_jax.data.decode import decode
from mae_jax.errors import UserError
from mae_jax.evals import figures, pixels
from mae_jax.models import masking, masks
from mae_jax.models.patchify import to_levels

MASKS = ("random", "block", "grid", "granular", "green", "inverse_block")
TRUE_CAPTION = (
    "Predictions are un-normalised with the true means and standard deviations of the hidden"
    " patches: the pictures hold information that the model never had."
)
ERROR_SCALE = 64  # levels that are drawn as the brightest colour
SHEET = slice(16)  # the images of a sheet, at most
BATCH = 16  # images that are computed at a time


def drawn_mask(file: str, grid: tuple[int, int]) -> np.ndarray:
    """Return which patches a picture hides, bool [L]: those whose mean is dark.

    Raises:
      UserError: `file` is no picture, or hides no patch or all of them.
    """
    try:
        grey = Image.fromarray(decode(files.read_bytes(file), 1)[..., 0])
    except (UserError, BadImage) as error:
        raise UserError(
            f"--mask={file}: neither {', '.join(MASKS)} nor a picture: {error}"
        ) from None
    hidden = np.asarray(grey.resize(grid[::-1], Image.Resampling.BOX)).reshape(-1) < 128
    if hidden.all() or not hidden.any():
        raise UserError(
            f"--mask={file} hides {hidden.sum()} of {hidden.size} patches; dark means hidden, and"
            " at least one patch must be hidden and one visible"
        )
    return hidden


def make_masks(values: flags.FlagValues, count: int, grid: tuple[int, int], ratio: float) -> Any:
    """Return the Mask of `count` images.

    The mask of an image depends on the seed, the ratio and the image's index, not on `count`.
    """
    if values.mask not in MASKS:
        if values.mask_ratio is not None or values.ratios:
            raise UserError(
                f"--mask={values.mask} hides what is dark there, whatever the ratio: leave out"
                " --mask_ratio and --ratios"
            )
        hidden = drawn_mask(values.mask, grid)
        score_BL = jnp.tile(jnp.asarray(hidden, jnp.float32), (count, 1))
        return masking.keep_lowest(score_BL, int((~hidden).sum()))
    kept = masking.num_kept(grid[0] * grid[1], ratio)
    keys = jax.random.split(jax.random.key(values.seed), count)
    draw = resolve(values.mask, masking, masks)
    score_BL = jnp.concatenate([draw(key, 1, grid, ratio) for key in keys])
    return masking.keep_lowest(score_BL, kept)


def in_batches(call: Callable, *trees: Any) -> Any:
    """Return the results of `call` for the rows of all arrays, BATCH rows at a time."""
    rows = [slice(i, i + BATCH) for i in range(0, len(jax.tree.leaves(trees)[0]), BATCH)]
    parts = [call(*jax.tree.map(lambda x: x[some], trees)) for some in rows]  # noqa: B023
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def reconstruct(
    model: Any, params: dict, images_BHWC: np.ndarray, mask: Any, statistics: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return which patches are hidden, and the predicted images, uint8."""
    predict = partial(model.predict, params, statistics=statistics)
    out = in_batches(predict, images_BHWC, mask)
    return out.mask_BL, np.round(out.images_BHWC).astype(np.uint8)


def displayed(images_BHWC: np.ndarray, spec: Any, bands: Sequence[int]) -> np.ndarray:
    """Return the bands of images that are shown, uint8."""
    return figures.bands_of(to_levels(jnp.asarray(images_BHWC), spec.value_range), bands)


def encode(model: Any, params: dict, images_BHWC: np.ndarray) -> np.ndarray:
    """Return the tokens of images, (B, 1 + L, D)."""
    return in_batches(partial(model.encode, params), images_BHWC)


def draw_reconstructions(
    model: Any,
    params: dict,
    images: np.ndarray,
    names: list[str],
    values: flags.FlagValues,
    bands: Sequence[int],
) -> dict[str, np.ndarray]:
    """Return a picture of each image, a sheet of all, and those of --errors and --ratios."""
    spec = model.spec
    drawn = displayed(images, spec, bands)

    def reconstruct_at(ratio: float) -> tuple[np.ndarray, np.ndarray]:
        mask = make_masks(values, len(images), spec.grid, ratio)
        masks, predicted = reconstruct(model, params, images, mask, values.statistics)
        return masks, figures.bands_of(predicted, bands)

    ratio = spec.mask_ratio if values.mask_ratio is None else values.mask_ratio
    masks, predicted = reconstruct_at(ratio)
    caption = pixels.CAPTIONS[spec.target]
    if spec.target == "norm_pixels" and values.statistics == "true":
        caption = TRUE_CAPTION
    hidden = f"{masks[0].mean():.0%} of the patches are hidden ({Path(values.mask).name}). "

    def figure(rows: slice) -> np.ndarray:
        shown = (drawn[rows], masks[rows], predicted[rows])
        return figures.reconstructions(*shown, patch_size=spec.patch_size, caption=hidden + caption)

    pictures = {name: figure(slice(i, i + 1)) for i, name in enumerate(names)}
    pictures["sheet"] = figure(SHEET)
    if values.errors:
        shown = (drawn[SHEET], masks[SHEET], predicted[SHEET])
        pictures["errors"] = draw_errors(*shown, spec.patch_size, caption)
    if values.ratios:
        columns = [("original", drawn[SHEET])]
        for ratio in values.ratios:
            masks, predicted = (x[SHEET] for x in reconstruct_at(ratio))
            for title, under in (
                (f"{masks[0].mean():.0%} hidden", figures.HIDDEN),
                ("reconstructed", predicted),
            ):
                pasted = figures.paste(drawn[SHEET], under, masks, spec.patch_size)
                columns.append((title, pasted))
        pictures["ratios"] = figures.sheet(columns, caption)
    return pictures


def draw_errors(
    images: np.ndarray, masks: np.ndarray, predicted: np.ndarray, patch_size: Any, caption: str
) -> np.ndarray:
    """Draw a row for each image: original, prediction with visible patches, absolute error."""
    error_BHW = np.abs(predicted.astype(float) - images).mean(-1) / ERROR_SCALE
    error_BHWC = figures.heat(np.clip(error_BHW, 0, 1))
    grey_BHWC = np.broadcast_to(figures.HIDDEN, error_BHWC.shape)
    columns = [
        ("original", images),
        ("with visible patches", figures.paste(images, predicted, masks, patch_size)),
        ("absolute error", figures.paste(grey_BHWC, error_BHWC, masks, patch_size)),
    ]
    return figures.sheet(
        columns,
        f"Error: mean over the channels shown, black 0 to bright {ERROR_SCALE} levels or more; grey"
        f" where patches are visible. {caption}",
    )


def draw_attention(model: Any, params: dict, image: np.ndarray, bands: Sequence[int]) -> np.ndarray:
    """Draw the cls token's attention to patches: a row for each layer, all heads in it."""
    attention_MSL = np.asarray(model.blocks(params, image[None])[1])[:, 0, :, 1:]
    scaled_SML = (attention_MSL / attention_MSL.max(-1, keepdims=True)).swapaxes(0, 1)
    maps_SMHW = figures.enlarge(scaled_SML, model.spec.image_size, model.spec.patch_size, axis=2)
    heads = [(f"head {i}", maps_MHWC) for i, maps_MHWC in enumerate(figures.heat(maps_SMHW))]
    shown = displayed(image, model.spec, bands)
    return figures.sheet(
        [("original", np.stack([shown] * len(attention_MSL))), *heads],
        "Attention of the cls token to the patches; a row for each layer, the first on top."
        " Each map is scaled to its largest value.",
    )


def draw_components(
    model: Any, params: dict, images: np.ndarray, bands: Sequence[int]
) -> np.ndarray:
    """Draw the principal components of the patch features of all images, also those not shown."""
    tokens_BLD = encode(model, params, images)[:, 1:]
    tokens_BGLD = tokens_BLD.reshape(len(images), model.spec.num_groups, -1, tokens_BLD.shape[-1])
    colours_BLC = figures.principal_colours(tokens_BGLD.mean(1))[SHEET]
    colours_BHWC = figures.enlarge(colours_BLC, model.spec.image_size, model.spec.patch_size)
    return figures.sheet(
        [
            ("original", displayed(images[SHEET], model.spec, bands)),
            ("patch features", colours_BHWC),
        ],
        "The first three principal components of the patch features of all images, as red,"
        " green and blue.",
    )


def draw_neighbours(
    model: Any, params: dict, images: np.ndarray, query: np.ndarray, bands: Sequence[int]
) -> np.ndarray:
    """Draw a query, (1, H, W, C), and the images nearest to it."""
    features_BD = encode(model, params, np.concatenate([query, images]))[:, 0]
    nearest = nearest_images(features_BD[1:], features_BD[0], 6)
    query, images = (displayed(x, model.spec, bands) for x in (query, images))
    return figures.sheet(
        [("query", query), *((f"{cosine:.3f}", images[i : i + 1]) for i, cosine in nearest)],
        "The nearest images, by the cosine similarity of the cls tokens.",
    )


def nearest_images(
    features_BD: np.ndarray, query_D: np.ndarray, count: int
) -> list[tuple[int, float]]:
    """Return (index, cosine similarity) of the rows most similar to a query."""
    unit = features_BD / np.linalg.norm(features_BD, axis=-1, keepdims=True)
    similarity = unit @ (query_D / np.linalg.norm(query_D))
    order = np.argsort(-similarity, kind="stable")[:count]
    return [(int(i), float(similarity[i])) for i in order]
