"""Infer the network of a state dict from its shapes, and from what its file says."""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

from mae_jax.errors import UserError
from mae_jax.interop.encoders import block_options
from mae_jax.interop.names import BLOCK, entries, stem
from mae_jax.interop.read import File
from mae_jax.models.spec import ModelSpec, Size, ViTSpec

# Heads of the published widths (configs/common.py); a state dict does not tell them.
HEADS = {"encoder": {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}, "decoder": {512: 16}}
OTHER_COLOURS = {"mean": 0.5, "std": 0.25}  # of images that are not RGB


def infer(
    file: File,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: Size | None = None,
    target: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    value_range: tuple[float, ...] | None = None,
) -> tuple[ModelSpec, list[str]]:
    """Return the network that a state dict is of, and notes on what had to be assumed.

    Args:
      file: what the file says wins over image_size, and loses to the other arguments.

    Raises:
      UserError: tensors contradict each other, or do not say what an argument could.
    """
    _, channels, *patch_size = _shape(file, stem("encoder/patch_embed", file.family), 4)
    fields: dict[str, Any] = {"encoder": _vit(file, "encoder", heads)}
    notes = []
    if f"{stem('decoder/embed', file.family)}.weight" in file.state:
        fields["decoder"] = _vit(file, "decoder", decoder_heads)
        fields["mask_ratio"] = _from_config(file, "mask_ratio", _share, ModelSpec.mask_ratio)
        normalised = _from_config(file, "norm_pix_loss", bool, None)
        if normalised is None and "visualize" in file.name:
            normalised = False  # docs/REFERENCE.md section 8
        if normalised is None and target is None:
            notes.append(
                "target: the file does not say whether the decoder predicts pixels or normalised"
                " pixels; taken as norm_pixels, give target=pixels if not"
            )
        fields["target"] = target or ("pixels" if normalised is False else "norm_pixels")
    head = stem("head", file.family)
    if f"{head}.weight" in file.state:
        fields["classes"] = _shape(file, head, 2)[0]
        fields["pool"] = "avg" if "fc_norm.weight" in file.state else "cls"
    for key, given in (("mean", mean), ("std", std)):
        colours = given or _from_config(file, key, _floats, getattr(ModelSpec, key))
        if not given and len(colours) != channels:
            colours = (OTHER_COLOURS[key],) * channels
            notes.append(f"{key} of {channels} channels is not known: taken as {colours[0]}")
        fields[key] = colours
    fields["cls_tokens"] = _cls_tokens(file)
    fields["value_range"] = value_range or _from_config(file, "value_range", _floats, ())
    rows, columns = patch_size
    size = _image_size(file, (rows, columns), image_size)
    return ModelSpec(size, (rows, columns), channels, **fields), notes


def unused(file: File, spec: ModelSpec) -> list[str]:
    """Return names of the file that the network has no place for."""
    known = {name for entry in entries(spec, file.family) for name in entry.names}
    return [name for name in file.state if name not in known]


def _shape(file: File, layer: str, rank: int) -> tuple[int, ...]:
    """Return the shape of a layer's weight."""
    key = f"{layer}.weight"
    if key not in file.state:
        raise UserError(f"{key} is missing, so that this would be a partial load")
    shape = file.state[key].shape
    if len(shape) != rank or not all(shape):
        raise UserError(f"{key} has shape {shape}, of another rank than {rank}")
    return shape


def _vit(file: File, side: str, heads: int | None) -> ViTSpec:
    """Return the sizes of the encoder or decoder; whether positions are trained comes later."""
    blocks = stem(f"{side}/stack/blocks", file.family)
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    layers = {match[1] for key in file.state if (match := pattern.match(key))}
    if layers != set(map(str, range(len(layers)))):
        raise UserError(f"{blocks} has {len(layers)} layers, and they are not numbered from 0")
    mlp_width, width = _shape(file, f"{blocks}.0.{stem('mlp/fc1', file.family, BLOCK)}", 2)
    prefix = "decoder_" if side == "decoder" else ""
    published = HEADS[side].get(width)
    heads = heads or _from_config(file, f"{prefix}num_attention_heads", operator.index, published)
    if not heads:
        raise UserError(
            f"the file does not say how many {prefix}heads a width of {width} is split into: give"
            f" {prefix}heads"
        )
    if heads < 1 or width % heads:
        raise UserError(f"{prefix}heads={heads} does not divide the width {width}")
    block = block_options(file) if side == "encoder" else None
    return ViTSpec(width, len(layers), heads, mlp_width, block=block)


def _cls_tokens(file: File) -> int:
    """Return how many class tokens there are."""
    shape = file.state[stem("encoder/cls_token", file.family)].shape
    return shape[1] if len(shape) == 3 and shape[1] else 1


def _image_size(file: File, patch_size: Size, image_size: Size | None) -> Size:
    """Return what the file says; else that of a square of patches; else `image_size`."""
    key = stem("encoder/pos_embed", file.family)
    if (sides := _from_config(file, "image_size", _sides, None)) is not None:
        return sides
    shape = file.state[key].shape if key in file.state else ()
    patches = shape[1] - _cls_tokens(file) if len(shape) == 3 else 0
    side = math.isqrt(max(patches, 0))
    if side and side**2 == patches:
        return side * patch_size[0], side * patch_size[1]
    if image_size is None:
        raise UserError(f"{key} is not of patches in a square: give the image_size of the file")
    return image_size


def _from_config(file: File, key: str, read: Callable[[Any], Any], default: Any) -> Any:
    """Return what the file's config says, or the default where it says nothing."""
    value = file.config.get(key)
    if value is None:  # timm's arguments say None for its own default
        return default
    try:
        return read(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"the file's {key} is {value!r}, which is not a possible {key}") from None


def _share(value: Any) -> float:
    if not 0 < value < 1:
        raise ValueError
    return float(value)


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value))


def _sides(value: Any) -> Size:
    height, width = (value, value) if isinstance(value, int) else value
    return operator.index(height), operator.index(width)
