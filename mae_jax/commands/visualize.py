"""Visualize: reconstructions, attention and features of any weights, on one's own images."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mae_jax.commands import cli
from mae_jax.errors import UserError

USAGE = """\
mae-jax visualize WEIGHTS IMAGES ... --out=DIR [FLAG ...]

WEIGHTS: whatever mae-jax convert reads. IMAGES: files, text files (.txt) with the path of an image
in every line, folders, or data sources such as bundled:photos. A reconstruction of each image is
drawn, and one sheet of all.
--mask is random, block, grid, or a picture in which dark means hidden.
--ratios, --errors, --attention, --pca and --neighbours each draw one more picture.
"""
MASKS = ("random", "block", "grid")
TRUE_CAPTION = (
    "Predictions are un-normalised with the true means and standard deviations of the hidden"
    " patches: the pictures hold information that the model never had."
)
SHEET = slice(16)  # the images of a sheet, at most
BATCH = 16  # images that are computed at a time


def parse(argv: list[str]) -> tuple[str, list[str], flags.FlagValues]:
    """Return weights, images and options.

    Raises:
      UserError: an argument is missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "a new folder for the pictures", flag_values=values)
    flags.DEFINE_enum("format", "png", ("png", "pdf"), "of the pictures", flag_values=values)
    flags.DEFINE_integer("limit", 16, "images at most", lower_bound=1, flag_values=values)
    flags.DEFINE_string("mask", "random", "random, block, grid or a picture", flag_values=values)
    flags.DEFINE_float("mask_ratio", None, "none = that of training", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of random masks", flag_values=values)
    sources = ("visible", "true")
    flags.DEFINE_enum("statistics", "visible", sources, "to undo norm_pixels", flag_values=values)
    ratios = cli.Parser(cli.numbers)
    flags.DEFINE(ratios, "ratios", None, "mask ratios to draw side by side", flag_values=values)
    flags.DEFINE_bool("errors", False, "draw the error of each pixel", flag_values=values)
    flags.DEFINE_bool("attention", False, "draw the cls token's attention", flag_values=values)
    flags.DEFINE_bool("pca", False, "draw patch features as colours", flag_values=values)
    flags.DEFINE_string("neighbours", None, "draw the images nearest to this", flag_values=values)
    cli.define_image_flags(values, split="test")
    cli.define_weight_flags(values)
    rest = cli.parse("visualize", USAGE, argv, values)
    if len(rest) < 2 or not values.out:
        raise UserError(f"WEIGHTS, IMAGES and --out=DIR are wanted\n{USAGE}")
    if values.mask not in MASKS and not Path(values.mask).is_file():
        raise UserError(f"--mask={values.mask}: neither {', '.join(MASKS)} nor a file")
    return rest[0], rest[1:], values


def read_images(
    paths: Sequence[str], values: flags.FlagValues, spec: Any
) -> tuple[list[str], np.ndarray]:
    """Return names and centre crops, uint8 [B, H, W, C], of the first --limit images.

    Raises:
      UserError: a path is no data source, an image cannot be read, or there is none.
    """
    examples: list[cli.Example] = []
    for source in cli.open_images(paths, values.split, values.data_dir):
        for index in range(min(len(source), values.limit - len(examples))):
            example = cli.read_example(source, index, (*spec.image_size, spec.channels))
            if example.error:
                raise UserError(f"{example.name} cannot be read: {example.error}")
            examples.append(example)
    return [x.name for x in examples], np.stack([x.image_HWC for x in examples])


def drawn_mask(file: str, grid: tuple[int, int]) -> np.ndarray:
    """Return which patches a picture hides, bool [L]: those that are dark in the mean.

    Raises:
      UserError: `file` is no picture, or hides no patch or all of them.
    """
    from PIL import Image

    from mae_jax.data import transforms

    try:
        grey = Image.fromarray(transforms.decode(Path(file).read_bytes(), 1)[..., 0])
    except (OSError, transforms.BadImage) as error:
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

    That of each image depends on the seed, the ratio and the image's index, and not on `count`.
    """
    import jax
    import jax.numpy as jnp

    from mae_jax.models import masking

    if values.mask not in MASKS:
        hidden = drawn_mask(values.mask, grid)
        score_BL = jnp.tile(jnp.asarray(hidden, jnp.float32), (count, 1))
        return masking.keep_lowest(score_BL, int((~hidden).sum()))
    kept = masking.num_kept(grid[0] * grid[1], ratio)
    keys = jax.random.split(jax.random.key(values.seed), count)
    draw = getattr(masking, values.mask)
    score_BL = jnp.concatenate([draw(key, 1, grid, ratio) for key in keys])
    return masking.keep_lowest(score_BL, kept)


def in_batches(call: Callable, *trees: Any) -> Any:
    """Return what `call` makes of the rows of all arrays, BATCH rows at a time."""
    import jax

    rows = [slice(i, i + BATCH) for i in range(0, len(jax.tree.leaves(trees)[0]), BATCH)]
    parts = [call(*jax.tree.map(lambda x: x[some], trees)) for some in rows]  # noqa: B023
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def reconstruct(
    model: Any, params: dict, images_BHWC: np.ndarray, mask: Any, statistics: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return which patches are hidden, and the predicted images, uint8."""
    import jax

    predict = jax.jit(partial(model.predict, statistics=statistics))
    out = in_batches(partial(predict, params), images_BHWC, mask)
    return out.mask_BL, np.round(out.images_BHWC).astype(np.uint8)


def encode(model: Any, params: dict, images_BHWC: np.ndarray) -> np.ndarray:
    """Return the tokens of images, (B, 1 + L, D)."""
    import jax

    return in_batches(partial(jax.jit(model.encode), params), images_BHWC)


def nearest_images(
    features_BD: np.ndarray, query_D: np.ndarray, count: int
) -> list[tuple[int, float]]:
    """Return (index, cosine similarity) of the rows most similar to a query."""
    unit = features_BD / np.linalg.norm(features_BD, axis=-1, keepdims=True)
    similarity = unit @ (query_D / np.linalg.norm(query_D))
    order = np.argsort(-similarity, kind="stable")[:count]
    return [(int(i), float(similarity[i])) for i in order]


def draw_reconstructions(
    model: Any, params: dict, images: np.ndarray, names: list[str], values: flags.FlagValues
) -> dict[str, np.ndarray]:
    """Return a picture of each image, a sheet of all, and those of --errors and --ratios.

    Raises:
      UserError: the decoder predicts no pixels.
    """
    from mae_jax.evals import figures, pixels

    spec = model.spec
    if spec.target not in pixels.CAPTIONS:
        raise UserError(
            f"the decoder predicts {spec.target!r}, which is not made of pixels: it cannot be drawn"
        )
    caption = pixels.CAPTIONS[spec.target]
    if spec.target == "norm_pixels" and values.statistics == "true":
        caption = TRUE_CAPTION

    def reconstruct_at(ratio: float) -> tuple[np.ndarray, np.ndarray]:
        mask = make_masks(values, len(images), spec.grid, ratio)
        return reconstruct(model, params, images, mask, values.statistics)

    ratio = spec.mask_ratio if values.mask_ratio is None else values.mask_ratio
    masks, predicted = reconstruct_at(ratio)
    hidden = f"{masks[0].mean():.0%} of the patches are hidden ({Path(values.mask).name}). "

    def figure(draw: Callable, rows: slice, caption: str) -> np.ndarray:
        shown = (images[rows], masks[rows], predicted[rows])
        return draw(*shown, patch_size=spec.patch_size, caption=caption)

    pictures = {
        name: figure(figures.reconstructions, slice(i, i + 1), hidden + caption)
        for i, name in enumerate(names)
    }
    pictures["sheet"] = figure(figures.reconstructions, SHEET, hidden + caption)
    if values.errors:
        pictures["errors"] = figure(figures.errors, SHEET, caption)
    if values.ratios:
        outcomes = [tuple(x[SHEET] for x in reconstruct_at(ratio)) for ratio in values.ratios]
        pictures["ratios"] = figures.ratios(images[SHEET], outcomes, spec.patch_size, caption)
    return pictures


def draw_features(
    model: Any, params: dict, images: np.ndarray, names: list[str], values: flags.FlagValues
) -> dict[str, np.ndarray]:
    """Return the pictures of --attention, --pca and --neighbours.

    Raises:
      UserError: --neighbours names several images.
    """
    from mae_jax.evals import figures

    pictures, patch_size = {}, model.spec.patch_size
    if values.attention:
        for name, image in zip(names, images, strict=True):
            attention_MSL = np.asarray(model.blocks(params, image[None])[1])[:, 0, :, 1:]
            pictures[f"{name}-attention"] = figures.attention(image, attention_MSL, patch_size)
    if values.pca:
        tokens_BLD = encode(model, params, images)[:, 1:]
        pictures["pca"] = figures.components(images[SHEET], tokens_BLD, patch_size)
    if values.neighbours:
        _, query = read_images([values.neighbours], values, model.spec)
        if len(query) != 1:
            raise UserError(
                f"--neighbours={values.neighbours} has {len(query)} images: name the one whose"
                " neighbours are wanted"
            )
        features_BD = encode(model, params, np.concatenate([query, images]))[:, 0]
        nearest = nearest_images(features_BD[1:], features_BD[0], 6)
        pictures["neighbours"] = figures.neighbours(query[0], images, nearest)
    return pictures


def main(argv: list[str]) -> int:
    weights, paths, values = parse(argv)
    from PIL import Image

    from mae_jax import pretrained
    from mae_jax.interop import write

    pictures: dict[str, np.ndarray] = {}
    with write.whole(Path(values.out)) as part:
        model, params = pretrained.load(weights, **cli.weight_options(values))
        names, images = read_images(paths, values, model.spec)
        plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem) for name in names]
        subject = model, params, images, [f"{i:02d}-{name}" for i, name in enumerate(plain)]
        features = values.attention or values.pca or values.neighbours
        if model.spec.decoder:
            pictures = draw_reconstructions(*subject, values)
        elif values.errors or values.ratios or not features:
            raise UserError(
                "these weights have no decoder, so that nothing can be reconstructed: ask for"
                " --attention, --pca or --neighbours, or take weights with one"
            )
        pictures |= draw_features(*subject, values)
        part.mkdir()
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(part / f"{name}.{values.format}")
    print("\n".join(f"{Path(values.out, name)}.{values.format}" for name in pictures))
    return 0
