"""Open weights of any format, resize their positions, and save them in our own format."""

import json
import os
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from mae_jax import checkpoint, files, limits
from mae_jax.errors import UserError
from mae_jax.interop import described, encoders, infer, names, read
from mae_jax.models import resize
from mae_jax.models.spec import ModelSpec, Size


class Weights(NamedTuple):
    """Parameters on the host, the network that they are of, and how they were read."""

    spec: ModelSpec
    params: dict
    report: list[str]


def open_weights(
    path: str | os.PathLike,
    *,
    part: str = "all",
    key: str = "",
    image_size: int | Size | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    target: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    value_range: tuple[float, ...] | None = None,
    allow_unused: bool = False,
    averaged: bool = False,
) -> Weights:
    """Read weights of any format, all of them or nothing.

    Args:
      path: a file, a folder, or the name of weights that come with the package: cifar10-s.
      part: "all" or "encoder".
      key: where a file of another program has its weights, such as teacher; see `read.open_file`.
      image_size: (height, width), or the side of a square, to make a model for; the positions,
        fixed or trained, are resized as the official fine-tuning does it. A file whose patches are
        not in a square, and that does not say its image size, is taken to be of this one.
      heads, decoder_heads: where the file does not say.
      target, mean, std: instead of what the file says; "pixels" or "norm_pixels", and a number for
        each channel.
      value_range: of a file's images, the values that become 0 and 1; see `ModelSpec`.
      allow_unused: accept a file with tensors that the network does not have.
      averaged: take the averaged weights of a run with config.ema.

    Raises:
      UserError: `path` cannot be read, a tensor is missing, does not fit or has no place in the
        network, or there are no averaged weights.
    """
    files.require_place(path, "weights")
    source = epath.Path(shipped(path) or path)  # a workdir may be in a bucket
    if part not in ("all", "encoder"):
        raise UserError(f"part={part!r} is unknown: choose all or encoder")
    if target not in (None, "pixels", "norm_pixels"):
        raise UserError(f"target={target!r} is unknown: choose pixels or norm_pixels")
    size = None if image_size is None else _sides(image_size)
    given: dict[str, Any] = {"target": target}
    for name, value in (("mean", mean), ("std", std), ("value_range", value_range)):
        given[name] = None if value is None else _numbers(name, value)
    ours = source.is_dir() and any((source / x).is_dir() for x in ("checkpoints", "state"))
    if ours:
        weights = _open_ours(source, averaged)
        decoder = weights.spec.decoder
        known = {"heads": weights.spec.encoder.heads, "decoder_heads": decoder and decoder.heads}
        options: dict[str, Any] = {"key": key, "heads": heads, "decoder_heads": decoder_heads}
        for option, x in options.items():
            if x and x != known.get(option):
                raise UserError(f"{option}={x!r}: {source} says it itself: leave {option} out")
        changes: dict[str, Any] = {name: x for name, x in given.items() if x}
        weights = weights._replace(spec=replace(weights.spec, **changes))
    elif averaged:
        raise UserError(f"averaged weights: only runs of this project have both, and not {source}")
    else:
        options = {"heads": heads, "decoder_heads": decoder_heads, "image_size": size} | given
        try:
            weights = _open_theirs(source, key, allow_unused, options)
        except UserError:
            raise
        except Exception as error:  # whatever a file can say that no model would
            raise UserError(
                f"{source} is damaged or is not a weight file: {str(error)[:500] or error!r:.500}"
            ) from error
    if part == "encoder":
        if not weights.spec.final_norm:
            raise UserError(
                "a classifier that averages patches has no final norm of its encoder (fc_norm comes"
                " after the mean): take it whole, with part=all"
            )
        encoder = {"encoder": weights.params["encoder"]}
        weights = weights._replace(spec=described.encoder_only(weights.spec), params=encoder)
    if size and size != weights.spec.image_size:
        weights = _resize(weights, size)
    return weights


def _sides(image_size: Any) -> Size:
    """Return height and width of what a user gave as the size of images."""
    sides = (image_size,) * 2 if isinstance(image_size, Integral) else image_size
    whole = isinstance(sides, tuple | list) and all(isinstance(x, Integral) for x in sides)
    if not whole or len(sides) != 2:
        raise UserError(f"image_size={image_size!r}: give a whole number, or (height, width)")
    return int(sides[0]), int(sides[1])


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """Return the mean, std or value_range that a user gave, as a tuple."""
    found = tuple(np.ravel(value).tolist())
    limit = limits.NUMBERS[f"data.{name}"]
    if not limit.holds(found):
        raise UserError(f"{name}={value!r}: give {limit}")
    if name == "value_range" and found and (len(found) != 2 or found[0] >= found[1]):
        raise UserError(f"value_range={value!r}: give (LOW, HIGH), the smaller one first")
    return found


def shipped(name: str | os.PathLike) -> Path | None:
    """Return the folder of weights that come with the package, such as cifar10-s; None = no such.

    A file or folder of that name in the current folder is meant instead.
    """
    package = Path(__file__).parents[1]
    if Path(name).parts[1:] or Path(name).exists():
        return None
    for weights in (package / "weights", package.parent / "weights"):  # installed; a checkout
        if (weights / name / "model.safetensors").exists():
            return weights / name
    return None


def _open_theirs(path: epath.Path, key: str, allow_unused: bool, options: dict) -> Weights:
    """Read a file or directory of another family; `options` are arguments of `infer.infer`."""
    if "://" in str(path):
        raise UserError(
            f"{path} is no workdir of this project; other files are read from local disks only:"
            " copy it first"
        )
    file, left_out = encoders.canonical(read.open_file(path, key))
    spec, notes = infer.infer(file, **options)
    unused = infer.unused(file, spec)
    if unused and not allow_unused:
        raise UserError(
            f"{path} has {len(unused)} tensors that the network has no place for:"
            f" {', '.join(unused[:8])}{', ...' * (len(unused) > 8)}. If they are not needed, say"
            " allow_unused"
        )
    matched = len(file.state) - len(unused)
    report = [f"{path}: {file.family} names", f"matched: {matched} tensors", *left_out, *notes]
    if unused:
        report.append(f"unused: {', '.join(unused)}")
    encoders.complete(file, spec)
    params, spec = names.to_ours(file.state, spec, file.family)
    return Weights(spec, params, report)


def _resize(weights: Weights, size: Size) -> Weights:
    """Adapt weights to images of another size; a fixed table that is resized becomes trained."""
    spec, report = replace(weights.spec, image_size=size), list(weights.report)
    params = {name: dict(value) for name, value in weights.params.items()}
    for side, vit in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        if vit:
            table, old = params[side].get("pos_embed"), weights.spec.grid
            resized = resize.positions_of(table, old, vit, spec)
            params[side]["pos_embed"] = np.asarray(resized)
            report.append(f"resized: {side}/pos_embed, {weights.spec.grid} -> {spec.grid} patches")
    spec = names.with_positions(spec, flatten_dict(params, sep="/"))
    return weights._replace(spec=spec, params=params, report=report)


def _open_ours(path: epath.Path, averaged: bool) -> Weights:
    """Read a checkpoint of this project, or the newest of a workdir."""
    step = checkpoint.find(path, "init_from")
    folders = (step, step.parent, step.parent.parent)
    configs = [folder / "config.json" for folder in folders if (folder / "config.json").exists()]
    if not configs:
        raise UserError(
            f"{step} lies in no workdir: the config.json that says what it is of is looked for"
            f" beside it and two folders above"
        )
    part = checkpoint.AVERAGED if averaged else checkpoint.PARAMS
    shapes = checkpoint.shapes(step, part)
    flat = {name: x.shape for name, x in flatten_dict(shapes, sep="/").items()}
    if averaged and not flat:
        raise UserError(f"{step} holds no averaged weights: its run had no config.ema")
    if "encoder/stack/blocks/attn/qkv/kernel" not in flat:
        raise UserError(f"{step} holds no encoder; its parameters: {', '.join(flat)[:200]}")
    try:
        config = json.loads(configs[0].read_text())
        segments = config.get("task") == "segment"  # its head is of patches, and no classifier's
        known = {x: shape for x, shape in flat.items() if not (segments and x.startswith("head/"))}
        spec = described.spec_of(known, config)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{configs[0]} is not the config of a run: {error!r}") from None
    report = [f"{step}: a checkpoint of this project", f"matched: {len(known)} arrays"]
    if config.get("ema") and not averaged:
        report.append("weights are taken as the last update left them: averaged=True for the mean")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: x.update(sharding=here), shapes)
    params = jax.tree.map(np.asarray, checkpoint.restore(step, target, part))
    if segments and params.pop("head", None):
        report.append("left out: the head of the segmentation")
    if "decoder" in params and not spec.decoder:
        del params["decoder"]
        report.append("left out: the decoder, which is not the paper's")
    return Weights(spec, params, report)


def save(directory: Path, spec: ModelSpec, params: dict, origin: str) -> None:
    """Write a workdir of ours with one checkpoint, of step 0, for config.init_from and `load`."""
    with checkpoint.Checkpointer(directory) as saver:
        saver.save(0, {"params": params})
    config = {"task": "classify" if spec.classes else "pretrain", "converted_from": origin}
    files.write_json(directory / "config.json", config | described.config_of(spec))
