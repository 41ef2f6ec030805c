"""Visualize: reconstructions, attention and features of any weights, on one's own images."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mae_jax.errors import UserError

USAGE = """\
mae-jax visualize WEIGHTS IMAGES ... --out=DIR [FLAG ...]

WEIGHTS: whatever mae-jax convert reads. IMAGES: files, folders, or data sources such as
bundled:photos. For each image a reconstruction is drawn, and one sheet of all.
--mask is random, block, grid, or a picture in which dark means hidden.
--ratios, --errors, --attention, --pca and --neighbours each draw one more picture.
"""
MASKS = ("random", "block", "grid")
TRUE_CAPTION = (
    "Predictions are un-normalised with the true means and standard deviations of the hidden"
    " patches: the pictures hold information that the model never had."
)
ERROR_SCALE = 64  # levels that are drawn as the brightest colour
MAX_SHEET = 16  # rows


def parse(argv: list[str]) -> tuple[list[str], flags.FlagValues]:
    """Weights and images, and options.

    Raises:
      UserError: something is missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "a new folder for the pictures", flag_values=values)
    flags.DEFINE_enum("format", "png", ("png", "pdf"), "of the pictures", flag_values=values)
    flags.DEFINE_string("split", "test", "of a data source", flag_values=values)
    flags.DEFINE_string("data_dir", "", "where tfds datasets live", flag_values=values)
    flags.DEFINE_integer("limit", 16, "images at most", lower_bound=1, flag_values=values)
    flags.DEFINE_string("mask", "random", "random, block, grid or a picture", flag_values=values)
    flags.DEFINE_float("mask_ratio", None, "none = that of training", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of random masks", flag_values=values)
    flags.DEFINE_enum(
        "statistics", "visible", ("visible", "true"), "that undo norm_pixels", flag_values=values
    )
    flags.DEFINE_list("ratios", None, "mask ratios to draw side by side", flag_values=values)
    flags.DEFINE_bool("errors", False, "draw the error of each pixel", flag_values=values)
    flags.DEFINE_bool("attention", False, "draw the cls token's attention", flag_values=values)
    flags.DEFINE_bool("pca", False, "draw patch features as colours", flag_values=values)
    flags.DEFINE_string("neighbours", None, "draw the images nearest to this", flag_values=values)
    flags.DEFINE_string("image_size", None, "SIDE or HEIGHTxWIDTH", flag_values=values)
    flags.DEFINE_integer("heads", None, "where the file does not say", flag_values=values)
    flags.DEFINE_integer("decoder_heads", None, "where the file does not say", flag_values=values)
    flags.DEFINE_enum(
        "target", None, ("pixels", "norm_pixels"), "where the file does not say", flag_values=values
    )
    flags.DEFINE_bool(
        "averaged", False, "of a run with config.ema, the averaged weights", flag_values=values
    )
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    try:
        rest = values(["mae-jax visualize", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values.help:
        print(USAGE)
        print(values.main_module_help() or values.get_help())
        raise SystemExit(0)
    if len(rest) < 2 or not values.out:
        raise UserError(f"WEIGHTS, IMAGES and --out=DIR are wanted\n{USAGE}")
    return rest, values


def read_images(
    places: Sequence[str], values: flags.FlagValues, size: tuple[int, int], channels: int
) -> tuple[list[str], np.ndarray]:
    """Names and centre crops, uint8 [B, H, W, C], of the first images of files, folders, sources.

    Raises:
      UserError: a place is none, a file cannot be read, or there is no image.
    """
    from mae_jax.data import crops, sources, transforms

    names: list[str] = []
    images: list[np.ndarray] = []
    for place in places:
        if Path(place).is_file():
            records: Any = [{"image": Path(place).read_bytes(), "name": place}]
        else:
            folder = Path(place).is_dir()
            split = "train" if folder else values.split
            name = f"folder:{place}" if folder else place
            records = sources.open_source(name, split, values.data_dir)
        for index in range(min(len(records), values.limit - len(images))):
            record = records[index]
            try:
                picture = transforms.decode(record["image"], channels)
            except transforms.BadImage as error:
                raise UserError(f"{record['name']} cannot be read: {error}") from None
            names.append(str(record["name"]))
            images.append(crops.center(picture, size))
    return names, np.stack(images)


def drawn_mask(file: str, grid: tuple[int, int]) -> np.ndarray:
    """Which patches a picture hides, bool [L]: those that are dark on average.

    Raises:
      UserError: it is no picture, or hides no patch or all of them.
    """
    from PIL import Image

    from mae_jax.data import transforms

    try:
        flat = Image.fromarray(np.asarray(transforms.decode(Path(file).read_bytes(), 1)))
    except (OSError, transforms.BadImage) as error:
        raise UserError(
            f"--mask={file}: neither {', '.join(MASKS)} nor a picture: {error}"
        ) from None
    small = flat.resize(grid[::-1], Image.Resampling.BOX)
    hidden = np.asarray(small).reshape(-1) < 128
    if hidden.all() or not hidden.any():
        raise UserError(
            f"--mask={file} hides {hidden.sum()} of {hidden.size} patches; dark means hidden, and"
            " at least one patch must be hidden and one visible"
        )
    return hidden


def make_masks(values: flags.FlagValues, count: int, grid: tuple[int, int], ratio: float) -> Any:
    """The Mask of each image; random ones depend on the seed, the image's place and the ratio."""
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


def reconstruct(model: Any, params: dict, images: np.ndarray, mask: Any, statistics: str) -> Any:
    """Predicted images, uint8, and masks, in batches."""
    import jax

    predict = jax.jit(partial(model.predict, statistics=statistics))
    outs = []
    for start in range(0, len(images), 16):
        rows = slice(start, start + 16)
        outs.append(predict(params, images[rows], jax.tree.map(lambda x: x[rows], mask)))  # noqa: B023
    predicted = np.concatenate([np.round(out.images_BHWC) for out in outs]).astype(np.uint8)
    return predicted, np.concatenate([out.mask_BL for out in outs])


def paste(
    images: np.ndarray, masks_BL: np.ndarray, under: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """The images where they are visible, and what is `under` them where they are hidden."""
    rows, cols = images.shape[1] // grid[0], images.shape[2] // grid[1]
    hidden = np.reshape(masks_BL, (-1, *grid, 1)).repeat(rows, 1).repeat(cols, 2) > 0
    return np.where(hidden, under, images).astype(np.uint8)


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers 0..1 to colours, uint8 [..., 3]."""
    import matplotlib

    return (matplotlib.colormaps["inferno"](values)[..., :3] * 255).astype(np.uint8)


def attention_maps(model: Any, params: dict, image: np.ndarray) -> np.ndarray:
    """(layers, heads, H, W): the cls token's attention to patches, each scaled to its largest."""
    attention = np.asarray(model.blocks(params, image[None])[1])[:, 0, :, 1:]
    maps = (attention / attention.max(-1, keepdims=True)).reshape(
        *attention.shape[:2], *model.spec.grid
    )
    return maps.repeat(model.spec.patch[0], 2).repeat(model.spec.patch[1], 3)


def principal_colours(features_BLD: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The first three principal components of all patches as RGB, uint8 [B, rows, columns, 3]."""
    flat = features_BLD.reshape(-1, features_BLD.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    parts = flat @ directions[:3].T
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))  # of fewer than three tokens
    low, high = np.percentile(parts, [1, 99], axis=0)
    scaled = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (scaled * 255).astype(np.uint8).reshape(len(features_BLD), *grid, 3)


def nearest_images(features_BD: np.ndarray, query_D: np.ndarray, count: int) -> list[tuple]:
    """(index, cosine similarity) of the most similar rows."""
    unit = features_BD / np.linalg.norm(features_BD, axis=-1, keepdims=True)
    similarity = unit @ (query_D / np.linalg.norm(query_D))
    order = np.argsort(-similarity, kind="stable")[:count]
    return [(int(i), float(similarity[i])) for i in order]


def encode(model: Any, params: dict, images: np.ndarray) -> np.ndarray:
    import jax

    call = jax.jit(model.encode)
    return np.concatenate([call(params, images[i : i + 16]) for i in range(0, len(images), 16)])


def draw(model: Any, params: dict, values: flags.FlagValues, places: list[str]) -> dict[str, Any]:
    """All pictures by name, uint8 [height, width, 3].

    Raises:
      UserError: what is asked for cannot be drawn of these weights or images.
    """
    from mae_jax.evals import figures, pixels

    spec = model.spec
    if values.mask not in MASKS and not Path(values.mask).is_file():
        raise UserError(f"--mask={values.mask}: neither {', '.join(MASKS)} nor a file")
    names, images = read_images(places, values, spec.image_size, spec.channels)
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem) for name in names]
    stems = [f"{i:02d}-{name}" for i, name in enumerate(plain)]
    ratio = spec.mask_ratio if values.mask_ratio is None else values.mask_ratio
    pictures: dict[str, Any] = {}
    sheet: Callable[..., np.ndarray] = figures.sheet

    grey = np.array(figures.HIDDEN, np.uint8)
    if spec.decoder_width:
        if spec.target not in pixels.CAPTIONS:
            raise UserError(
                f"the decoder predicts {spec.target!r}, which is not made of pixels: it cannot be"
                " drawn"
            )
        told = pixels.CAPTIONS[spec.target]
        if spec.target == "norm_pixels" and values.statistics == "true":
            told = TRUE_CAPTION
        mask = make_masks(values, len(images), spec.grid, ratio)
        predicted, masks = reconstruct(model, params, images, mask, values.statistics)
        hidden = f"{masks[0].mean():.0%} of the patches are hidden ({Path(values.mask).name}). "
        figure = partial(figures.reconstructions, patch=spec.patch, caption=hidden + told)
        for i, stem in enumerate(stems):
            pictures[stem] = figure(images[i : i + 1], masks[i : i + 1], predicted[i : i + 1])
        rows = slice(MAX_SHEET)
        pictures["sheet"] = figure(images[rows], masks[rows], predicted[rows])
        if values.errors:
            error = np.abs(predicted.astype(float) - images).mean(-1)
            maps = heat(np.clip(error / ERROR_SCALE, 0, 1))
            maps = paste(np.broadcast_to(grey, maps.shape), masks, maps, spec.grid)
            pasted = paste(images, masks, predicted, spec.grid)
            pictures["errors"] = sheet(
                list(zip(images[rows], pasted[rows], maps[rows], strict=True)),
                ("original", "with visible patches", "absolute error"),
                f"Error: mean over channels, black 0 to bright {ERROR_SCALE} levels or more; grey"
                f" where patches are visible. {told}",
            )
        if values.ratios:
            columns, titles = [figures.rgb(images)], ["original"]
            for text in values.ratios:
                mask = make_masks(values, len(images), spec.grid, _ratio(text))
                predicted, masks = reconstruct(model, params, images, mask, values.statistics)
                columns += [
                    paste(columns[0], masks, grey, spec.grid),
                    paste(columns[0], masks, figures.rgb(predicted), spec.grid),
                ]
                titles += [f"{masks[0].mean():.0%} hidden", "reconstructed"]
            columns = [column[rows] for column in columns]
            pictures["ratios"] = sheet(list(zip(*columns, strict=True)), titles, told)
    elif (
        values.errors or values.ratios or not (values.attention or values.pca or values.neighbours)
    ):
        raise UserError(
            "these weights have no decoder, so that nothing can be reconstructed: ask for"
            " --attention, --pca or --neighbours, or take weights with one"
        )

    if values.attention:
        for stem, image in zip(stems, images, strict=True):
            maps = heat(attention_maps(model, params, image))
            pictures[f"{stem}-attention"] = sheet(
                [[image, *row] for row in maps],
                ["original", *(f"head {i}" for i in range(spec.heads))],
                "Attention of the cls token to the patches; a row for each layer, the first on top."
                " Each map is scaled to its largest value.",
            )
    if values.pca:
        tokens = encode(model, params, images)[:, 1:]
        colours = principal_colours(tokens, spec.grid)
        colours = colours.repeat(spec.patch[0], 1).repeat(spec.patch[1], 2)
        pictures["pca"] = sheet(
            list(zip(images, colours, strict=True))[:MAX_SHEET],
            ("original", "patch features"),
            "The first three principal components of the patch features of all images, as red,"
            " green and blue.",
        )
    if values.neighbours:
        _, query = read_images([values.neighbours], values, spec.image_size, spec.channels)
        if len(query) != 1:
            raise UserError(
                f"--neighbours={values.neighbours} has {len(query)} images: name the one whose"
                " neighbours are wanted"
            )
        features = encode(model, params, np.concatenate([query, images]))[:, 0]
        found = nearest_images(features[1:], features[0], 6)
        pictures["neighbours"] = sheet(
            [[query[0], *(images[i] for i, _ in found)]],
            ["query", *(f"{similarity:.3f}" for _, similarity in found)],
            "The nearest images, by the cosine similarity of the cls tokens.",
        )
    return pictures


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--ratios: {text!r} is not a number") from None


def main(argv: list[str]) -> int:
    (weights, *places), values = parse(argv)
    from PIL import Image

    from mae_jax import pretrained
    from mae_jax.commands.convert import size
    from mae_jax.interop import write

    options = {
        name: getattr(values, name) for name in ("heads", "decoder_heads", "target", "averaged")
    }
    with write.whole(Path(values.out)) as part:
        model, params = pretrained.load(
            weights, image_size=size("image_size", values.image_size), **options
        )
        pictures = draw(model, params, values, places)
        part.mkdir()
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(part / f"{name}.{values.format}")
    print("\n".join(f"{Path(values.out, name)}.{values.format}" for name in pictures))
    return 0
