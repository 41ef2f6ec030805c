"""Open weights of any format, adapt them to other images, and save them in our own format."""

import contextlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import checkpoint, integrity
from mae_jax.errors import UserError
from mae_jax.files import write_json
from mae_jax.interop import infer, names, read
from mae_jax.models import patch_embed, posemb
from mae_jax.models.spec import ModelSpec

READ_BYTES = 2**27  # of our own checkpoints, at a time

Colours = tuple[float, ...]  # a number for each channel


class Weights(NamedTuple):
    """Parameters on the host, the network that they are of, and how they were read."""

    spec: ModelSpec
    params: dict
    report: list[str]
    about: dict[str, str]  # origin, data and recipe, as far as they are known


def open_weights(
    path: str | os.PathLike,
    *,
    part: str = "all",
    image_size: int | tuple[int, int] | None = None,
    file_image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    target: str | None = None,
    mean: Colours | None = None,
    std: Colours | None = None,
    allow_unused: bool = False,
    averaged: bool = False,
) -> Weights:
    """Read weights of any format, all of them or nothing.

    Args:
      part: "all" or "encoder".
      image_size: (height, width), or the side of a square, to make a model for; the positions,
        fixed or trained, are resized as the official fine-tuning does it.
      file_image_size: that of the file, where its patches are not in a square.
      channels: of images to make a model for; the patch embedding is adapted. Encoder only.
      heads, decoder_heads, target: where the file does not say.
      mean, std: where the file does not say; with one number for each of other `channels`, those
        of the images to make a model for.
      allow_unused: read on if the file has tensors that the network has not.
      averaged: take the averaged weights of a run with config.ema.

    Raises:
      UserError: it cannot be read, a tensor is missing or does not fit, or one has no place in the
        network; there are no averaged weights.
    """
    source = epath.Path(path)  # a workdir may be in a bucket
    if part not in ("all", "encoder"):
        raise UserError(f"part={part!r} is unknown: choose all or encoder")
    if target not in (None, "pixels", "norm_pixels"):
        raise UserError(f"target={target!r} is unknown: choose pixels or norm_pixels")
    given: dict[str, Any] = {name: tuple(x) for name, x in (("mean", mean), ("std", std)) if x}
    wanted = {name: x for name, x in given.items() if len(x) == channels}  # those of the new images
    given = {name: x for name, x in given.items() if name not in wanted}
    try:
        ours = source.is_dir() and any((source / x).is_dir() for x in ("checkpoints", "state"))
    except ImportError as error:  # gcsfs or s3fs
        raise UserError(f"{source} cannot be opened: {error}") from error
    if ours:
        weights = _open_ours(source, part, averaged)
        changes = given | ({"target": target} if target else {})
        weights = weights._replace(spec=replace(weights.spec, **changes))
    elif averaged:
        raise UserError(f"averaged weights: only runs of this project have both, and not {source}")
    else:
        options = {"heads": heads, "decoder_heads": decoder_heads, "target": target}
        options |= {"image_size": file_image_size} | given
        weights = _open_theirs(source, part, allow_unused, options)
        if mean and std:
            report = [line for line in weights.report if not line.startswith("mean and std")]
            weights = weights._replace(report=report)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size and tuple(size) != weights.spec.image_size:
        weights = _resize(weights, (size[0], size[1]))
    if channels and channels != weights.spec.channels:
        return _recolour(weights, channels, wanted)
    return weights._replace(spec=replace(weights.spec, **wanted))


def _open_theirs(path: epath.Path, part: str, allow_unused: bool, options: dict) -> Weights:
    """Read a file or directory of another family; `options` are arguments of `infer.infer`."""
    if "://" in str(path):
        raise UserError(
            f"{path} is no workdir of this project; other files are read from local disks only:"
            " copy it first"
        )
    file = read.open_file(path)
    spec, notes = infer.infer(file, name=path.name, **options)
    unused, num_tensors = infer.unused(file, spec), len(file.state)
    if unused and not allow_unused:
        raise UserError(
            f"{path} has {len(unused)} tensors that {file.source} has no place for:"
            f" {', '.join(unused[:8])}{', ...' * (len(unused) > 8)}. If they are not needed, say"
            " allow_unused"
        )
    matched = num_tensors - len(unused)
    if part == "encoder":
        spec = _encoder_only(spec)
        dropped = len(infer.unused(file, spec)) - len(unused)
        notes.append(f"part=encoder: {dropped} tensors of decoder and head left out")
        matched -= dropped
    wanted = [name for entry in names.entries(spec, file.family) for name in entry.names]
    absent = [name for name in wanted if name not in file.state]
    params, spec = names.to_ours(file.state, spec, file.family)
    report = [f"{path}: {file.source}", f"matched: {matched} tensors", *file.notes, *notes]
    if unused:
        report.append(f"unused: {', '.join(unused)}")
    if absent:
        report.append(f"missing, computed: {', '.join(absent)}")
    for side, vit in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        if vit and vit.trained_positions and not spec.classes:
            report.append(f"positions of the {side} are not the sine-cosine table: kept")
    return Weights(spec, params, report, {"origin": f"{path.name} ({file.source})"})


def _encoder_only(spec: ModelSpec) -> ModelSpec:
    if not spec.final_norm:
        raise UserError(
            "a classifier that averages patches has no final norm of its encoder (fc_norm comes"
            " after the mean): take it whole, with part=all"
        )
    return spec.encoder_only()


def _resize(weights: Weights, size: tuple[int, int]) -> Weights:
    """Adapt weights to images of another size; a fixed table that is resized becomes trained."""
    spec, report = replace(weights.spec, image_size=size), list(weights.report)
    params = {name: dict(value) for name, value in weights.params.items()}
    for side, vit in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        if vit:
            table = params[side].get("pos_embed")
            if table is None:
                table = posemb.sincos_2d(vit.width, weights.spec.grid)[None]
            resized = posemb.resize(jnp.asarray(table), weights.spec.grid, spec.grid)
            params[side]["pos_embed"] = np.asarray(resized)
            report.append(f"resized: {side}/pos_embed, {weights.spec.grid} -> {spec.grid} patches")
    spec = names.with_positions(spec, flatten_dict(params, sep="/"))
    return weights._replace(spec=spec, params=params, report=report)


def _recolour(weights: Weights, channels: int, wanted: dict[str, Colours]) -> Weights:
    """Adapt weights to images of other channels, with the mean and std that are wanted.

    See `patch_embed.adapt`. Where neither side is grey, how the new channels relate to the old ones
    is not known: weights, mean and std are repeated in turn, as timm does.
    """
    spec = weights.spec
    old = spec.channels
    if spec.decoder:
        raise UserError(
            f"the decoder predicts {old} channels, and cannot be adapted to {channels}: take"
            " part=encoder"
        )
    alike: dict[str, Any] = {
        name: (float(np.mean(x)),) if channels == 1 else tuple(x[i % old] for i in range(channels))
        for name, x in (("mean", spec.mean), ("std", spec.std))
    }
    new = replace(spec, channels=channels, **alike | wanted)
    encoder = weights.params["encoder"]
    kernel, bias = (encoder["patch_embed"][name] for name in ("kernel", "bias"))
    if 1 in (old, channels):
        kernel, bias = map(np.asarray, patch_embed.adapt(kernel, bias, spec, new))
    else:
        kernel = patch_embed.recolour(kernel, old, channels)
    encoder = encoder | {"patch_embed": {"kernel": kernel, "bias": bias}}
    report = [*weights.report, f"patch_embed: adapted from {old} to {channels} channels"]
    return weights._replace(spec=new, params=weights.params | {"encoder": encoder}, report=report)


def _open_ours(path: epath.Path, part: str, averaged: bool) -> Weights:
    """Read a checkpoint of this project, or the newest of a workdir."""
    step = checkpoint.find(path, "init_from")
    folders = (step, step.parent, step.parent.parent)
    configs = [folder / "config.json" for folder in folders if (folder / "config.json").exists()]
    if not configs:
        raise UserError(
            f"{step} lies in no workdir: the config.json that says what it is of is looked for"
            f" beside it and two folders above"
        )
    flat = _read(step, checkpoint.AVERAGED if averaged else checkpoint.PARAMS)
    if averaged and not flat:
        raise UserError(f"{step} holds no averaged weights: its run had no config.ema")
    if "encoder/stack/blocks/attn/qkv/kernel" not in flat:
        raise UserError(f"{step} holds no encoder; its parameters: {', '.join(flat)[:200]}")
    try:
        config = json.loads(configs[0].read_text())
        spec = ModelSpec.from_params({name: x.shape for name, x in flat.items()}, config)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{configs[0]} is not the config of a run: {error!r}") from None
    about = {"origin": config.get("converted_from") or f"{path.name}, step {step.name}"}
    if "train_for" in config:
        about["data"] = str(config["data"].get("source", ""))
        about["recipe"] = (
            f"{config['train_for']}, batch {config.get('batch_size')},"
            f" {', '.join(f'{k} {v}' for k, v in config.get('optim', {}).items())}"
        )
    report = [f"{step}: a checkpoint of this project", f"matched: {len(flat)} arrays"]
    if averaged:
        report.append("the averaged weights (config.ema)")
    elif config.get("ema"):
        report.append(
            "weights are taken as the last update left them: averaged=True for their mean"
        )
    params = unflatten_dict(flat, sep="/")
    if part == "encoder":
        spec, params = _encoder_only(spec), {"encoder": params["encoder"]}
    return Weights(spec, params, report, about)


def _read(step: epath.Path, part: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the parameters of a checkpoint under these keys, by their paths.

    Read a few at a time: Orbax holds the decoded chunks of all that one call asks for beside the
    result.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    remaining = flatten_dict(checkpoint.shapes(step, part), sep="/")
    prefix = "/".join(part) + "/"
    flat: dict[str, np.ndarray] = {}
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        while remaining:
            group: dict[str, jax.ShapeDtypeStruct] = {}
            while remaining and sum(x.size * x.dtype.itemsize for x in group.values()) < READ_BYTES:
                name, shape = remaining.popitem()
                group[prefix + name] = shape.update(sharding=here)
            target = unflatten_dict(group, sep="/")
            arguments = ocp.checkpoint_utils.construct_restore_args(target)
            arrays = reader.restore(
                step / "state",
                args=ocp.args.PyTreeRestore(target, arguments, partial_restore=True),
            )
            for name, x in flatten_dict(arrays, sep="/").items():
                flat[name.removeprefix(prefix)] = np.asarray(x)
    return flat


def save(directory: str | os.PathLike, spec: ModelSpec, params: dict, origin: str) -> None:
    """Write a workdir of ours with one checkpoint, of step 0, for config.init_from and `load`."""
    root = Path(directory)
    step = root.absolute() / "checkpoints" / "0"
    # Neither copied first nor in one database, whose parts Orbax would keep in memory until the
    # end: in chunks, of which a few are held.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns of what is left out here on purpose
    try:
        in_place = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, in_place))
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        chunks = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=2**26), {"params": params})
        tree = ocp.args.PyTreeSave({"params": params}, save_args=chunks)
        with ocp.Checkpointer(handler) as saver:
            saver.save(step / "state", args=tree)
    finally:
        logger.setLevel(level)
    integrity.write_digests(epath.Path(step))
    task = "classify" if spec.classes else "pretrain"
    write_json(root / "config.json", {"task": task, "converted_from": origin} | spec.to_json())
