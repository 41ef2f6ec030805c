"""Draw what a run of segmentation makes of images: image, truth if there is one, prediction."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from mae_jax import checkpoint, train
from mae_jax.commands import cli
from mae_jax.data import bad_images, bands, segmentation
from mae_jax.data.bands import BadImage
from mae_jax.data.label_maps import IGNORED, Legend
from mae_jax.data.segmentation import Pair
from mae_jax.errors import UserError
from mae_jax.evals import segment, segment_figures
from mae_jax.mesh import make_mesh
from mae_jax.models.probe import LinearHead
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder
from mae_jax.tasks import common
from mae_jax.tasks.segment import Task, head_layers

STRIDE = 2 / 3  # of the windows, where the run measured none


def draw(
    workdir: str, saved: dict[str, Any], paths: Sequence[str], values: flags.FlagValues
) -> dict[str, np.ndarray]:
    """Return a picture of each of the first --limit images, and one of all, by name.

    Args:
      saved: the config.json of the run.
      paths: images and sources as elsewhere; "segfolder:PATH" gives the truth, too.

    Raises:
      UserError: an image cannot be read, or the checkpoint is of another network.
    """
    config = ConfigDict(saved)
    task, state = _restore(workdir, config)
    names, pairs = _read(paths, values, config)
    classes = _class_names(config, task.head.classes)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    compute = task.predict()["segmentation"]
    strides = [cfg.stride for cfg in config.evals.values() if cfg.type == "segment"]
    windows = segment.Windows(config, compute, mesh, 1, strides[0] if strides else STRIDE)
    rows = []
    for pair in pairs:
        predicted_HW = windows(state, [pair])[0]
        assert predicted_HW is not None  # there is an image
        rows.append(segment.small(pair, predicted_HW, windows.size))
    image, truth, predicted = (np.stack(x) for x in zip(*rows, strict=True))
    image = segment_figures.levels(image)

    def sheet(part: slice) -> np.ndarray:
        caption = f"Step {int(state.step):,} of {workdir}."
        return segment_figures.sheet(image[part], truth[part], predicted[part], classes, caption)

    drawn = {name: sheet(slice(i, i + 1)) for i, name in enumerate(cli.plain_names(names))}
    return drawn | {"sheet": sheet(slice(None))}


def _restore(workdir: str, config: ConfigDict) -> tuple[Task, train.TrainState]:
    """Return the task and the newest state of a run, without its training data."""
    path = checkpoint.find(workdir, "resume")
    spec = ModelSpec.from_config(config.to_dict())
    spec = replace(spec, encoder=replace(spec.encoder, trained_positions=True))
    saved = checkpoint.shapes(path)
    head = LinearHead(saved["params"]["head"]["kernel"].shape[-1])
    layers = head_layers(config.head.layers, spec.encoder.depth)
    encoder = Encoder(spec, common.compute(config.model, None))
    task = Task(encoder, head, None, layers, config)  # type: ignore[arg-type]
    one = SingleDeviceSharding(jax.devices()[0])
    params, extra = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
        jax.eval_shape(task.init, jax.random.key(0)),
    )
    return task, train.TrainState(
        jnp.int32(path.name),
        checkpoint.restore(path, params, ("params",)),
        None,
        checkpoint.restore(path, extra, ("extra",)),
    )


def _read(
    paths: Sequence[str], values: flags.FlagValues, config: ConfigDict
) -> tuple[list[str], list[Pair]]:
    """Return names and pairs of the first --limit images; without a truth, maps are IGNORED."""
    names: list[str] = []
    pairs: list[Pair] = []
    dtype = bands.pixel_type(config.data.get("value_range", ()))
    for path in paths:
        with_truth = path.startswith(segmentation.PREFIX)
        sources = (
            [
                cli.open_split_of(
                    values, cli.SHOWN, partial(segmentation.open_pairs, config.data, path)
                )
            ]
            if with_truth
            else cli.open_images([path], values, *cli.SHOWN)
        )
        for source in sources:
            for index in range(min(len(source), values.limit - len(pairs))):
                try:
                    if with_truth:
                        pair = segmentation.read(source, index, config.model.channels, dtype)
                        name = source[index]["name"]
                    else:
                        record, picture = bad_images.read(
                            source, index, config.model.channels, dtype
                        )
                        name = record["name"]
                        pair = Pair(picture, np.full(picture.shape[:2], IGNORED, np.uint8))
                except BadImage as error:
                    raise UserError(f"{source[index]['name']} cannot be read: {error}") from None
                names.append(name)
                pairs.append(pair)
    return names, pairs


def _class_names(config: ConfigDict, count: int) -> list[str]:
    """Return the names of the run's classes, or their numbers if its source is gone."""
    root = config.data.source.removeprefix(segmentation.PREFIX)
    try:
        return list(Legend.from_config(config.data, root).names)
    except UserError:
        return [f"class {number}" for number in range(count)]
