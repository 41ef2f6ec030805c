"""Visualize: reconstructions, attention and features of any weights, on one's own images."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mae_jax import files
from mae_jax.commands import cli
from mae_jax.errors import UserError

USAGE = """\
mae-jax visualize WEIGHTS IMAGES ... --out=DIR [FLAG ...]

WEIGHTS: whatever mae-jax convert reads. IMAGES: files, text files (.txt) with the path of an image
in every line, folders, or data sources such as bundled:photos. If the weights have a decoder, a
reconstruction of each image is drawn, and one sheet of all.
--mask is a picture in which dark means hidden, or random, block, grid, granular, green or
inverse_block.
--ratios, --errors, --attention, --pca and --neighbours each draw one more picture.
Of a run of segmentation: image, truth, prediction and error, the truth of segfolder:PATH.
"""
OF_SEGMENTATION = ("out", "format", "limit", "split")  # flags of such a run's pictures


def parse(argv: list[str]) -> tuple[str, list[str], flags.FlagValues]:
    """Return weights, images and options."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "a new folder for the pictures", flag_values=values)
    flags.DEFINE_enum("format", "png", ("png", "pdf"), "of the pictures", flag_values=values)
    flags.DEFINE_integer("limit", 16, "images at most", lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "mask", "random", "a picture, or random, block, grid, granular, ...", flag_values=values
    )
    flags.DEFINE_float("mask_ratio", None, "none = that of training", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of random masks", flag_values=values)
    sources = ("visible", "true")
    flags.DEFINE_enum("statistics", "visible", sources, "to undo norm_pixels", flag_values=values)
    ratios, whole = cli.Parser(cli.numbers), cli.Parser(partial(cli.numbers, kind=int))
    flags.DEFINE(ratios, "ratios", None, "mask ratios to draw side by side", flag_values=values)
    text = "one or three bands to show, such as 4,3,2; none = the first"
    flags.DEFINE(whole, "bands", None, text, flag_values=values)
    flags.DEFINE_bool("errors", False, "draw the error of each pixel", flag_values=values)
    flags.DEFINE_bool("attention", False, "draw the cls token's attention", flag_values=values)
    flags.DEFINE_bool("pca", False, "draw patch features as colours", flag_values=values)
    flags.DEFINE_string("neighbours", None, "draw the images nearest to this", flag_values=values)
    cli.define_image_flags(values, ", ".join(cli.SHOWN))
    cli.define_weight_flags(values)
    rest = cli.parse("visualize", USAGE, argv, values)
    if len(rest) < 2 or not values.out:
        raise UserError(f"WEIGHTS, IMAGES and --out=DIR are wanted\n{USAGE}")
    files.require_local(values.out, "--out")
    return rest[0], rest[1:], values


def read_images(
    paths: Sequence[str], values: flags.FlagValues, spec: Any
) -> tuple[list[str], np.ndarray]:
    """Return names and centre crops, [B, H, W, C], of the first --limit images.

    Raises:
      UserError: a path is no data source, an image cannot be read, or there is none.
    """
    examples: list[cli.Example] = []
    for source in cli.open_images(paths, values, *cli.SHOWN):
        for index in range(min(len(source), values.limit - len(examples))):
            example = cli.read_example(source, index, spec)
            if example.error:
                raise UserError(f"{example.name} cannot be read: {example.error}")
            examples.append(example)
    return [x.name for x in examples], np.stack([x.image_HWC for x in examples])


def draw(weights: str, paths: list[str], values: flags.FlagValues) -> dict[str, np.ndarray]:
    """Return the pictures that the flags ask for, by name."""
    from mae_jax import pretrained
    from mae_jax.commands import pictures
    from mae_jax.evals import figures

    drawn: dict[str, np.ndarray] = {}
    model, params = pretrained.load(weights, **cli.weight_options(values))
    bands = figures.choose_bands(values.bands or (), model.spec.channels)
    names, images = read_images(paths, values, model.spec)
    plain = cli.plain_names(names)
    features = values.attention or values.pca or values.neighbours
    if model.spec.decoder or values.errors or values.ratios or not features:
        drawn = pictures.draw_reconstructions(model, params, images, plain, values, bands)
    if values.attention:
        for name, image in zip(plain, images, strict=True):
            drawn[f"{name}-attention"] = pictures.draw_attention(model, params, image, bands)
    if values.pca:
        drawn["pca"] = pictures.draw_components(model, params, images, bands)
    if values.neighbours:
        _, query = read_images([values.neighbours], values, model.spec)
        if len(query) != 1:
            raise UserError(
                f"--neighbours={values.neighbours} has {len(query)} images: name the one whose"
                " neighbours are wanted"
            )
        drawn["neighbours"] = pictures.draw_neighbours(model, params, images, query, bands)
    return drawn


def main(argv: list[str]) -> int:
    weights, paths, values = parse(argv)
    from PIL import Image

    from mae_jax.configs.common import pretraining
    from mae_jax.interop import write

    with write.whole(Path(values.out)) as part:
        run = pretraining(weights) if "://" in weights or Path(weights).is_dir() else None
        if run and run.get("task") == "segment":
            from mae_jax.commands import segment_pictures

            others = [f"--{x}" for x in values if values[x].present and x not in OF_SEGMENTATION]
            if others:
                raise UserError(
                    f"{weights} is a run of segmentation, whose pictures are image, truth and"
                    f" prediction: leave out {', '.join(others)}"
                )
            drawn = segment_pictures.draw(weights, run, paths, values)
        else:
            drawn = draw(weights, paths, values)
        part.mkdir()
        for name, picture in drawn.items():
            Image.fromarray(picture).save(part / f"{name}.{values.format}")
    print("\n".join(f"{Path(values.out, name)}.{values.format}" for name in drawn))
    return 0
