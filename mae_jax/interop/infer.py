"""Tell from the shapes of a state dict, and what its file says, which network it is of."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mae_jax.errors import UserError
from mae_jax.interop.names import BLOCK, entries, is_sincos, stem
from mae_jax.interop.read import File
from mae_jax.models.spec import ModelSpec, ViTSpec

# Heads of the published widths (configs/common.py); a state dict does not tell them.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}


def infer(
    file: File,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    target: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    name: str = "",
) -> tuple[ModelSpec, list[str]]:
    """Return the network that a state dict is of, and notes on what had to be assumed.

    Args:
      heads, decoder_heads: where the file does not say, and the width is none of the published.
      image_size: of the file, (height, width), where its patches are not in a square.
      target: "pixels" or "norm_pixels", where the file does not say.
      mean, std: of each channel, where the file does not say.
      name: of the file; those of the released files tell their target.

    Raises:
      UserError: tensors that contradict each other, or something that cannot be told.
    """
    state, config, family = file.state, file.config, file.family
    _, channels, rows, columns = _shape(file, stem("encoder/patch_embed", family), 4)
    encoder = _vit(file, "encoder", "heads", heads or config.get("num_attention_heads"), HEADS)
    grid = _grid(file, (rows, columns), image_size or config.get("image_size"))
    fields: dict[str, Any] = {}
    notes: list[str] = []
    if stem("decoder/embed", family) + ".weight" in state:
        given = decoder_heads or config.get("decoder_num_attention_heads")
        fields["decoder"] = _vit(file, "decoder", "decoder_heads", given, DECODER_HEADS)
        fields["target"], notes = _target(target, config, name)
        if config.get("mask_ratio") is not None:
            fields["mask_ratio"] = _ratio(config["mask_ratio"])
    head = stem("head", family)
    if f"{head}.weight" in state:
        fields["classes"] = _shape(file, head, 2)[0]
        fields["pool"] = "avg" if "fc_norm.weight" in state else "cls"
    defaults = {"mean": ModelSpec.mean, "std": ModelSpec.std}
    colours = {name: _numbers(name, config.get(name), x) for name, x in defaults.items()}
    if len(colours["mean"]) != channels:
        colours = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
        notes.append(f"mean and std of {channels} channels are not known: taken as 0.5 and 0.25")
    dtypes = Counter(x.dtype.name for x in state.values())
    if set(dtypes) != {"float32"}:
        counts = ", ".join(f"{n} {dtype}" for dtype, n in dtypes.items())
        notes.append(f"types of the tensors: {counts}; all are made float32")
    spec = ModelSpec(
        (grid[0] * rows, grid[1] * columns),
        (rows, columns),
        channels,
        encoder,
        mean=mean or colours["mean"],
        std=std or colours["std"],
        **fields,
    )
    return spec, notes


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


def _vit(file: File, side: str, what: str, heads: Any, published: Mapping[int, int]) -> ViTSpec:
    """Return the sizes of the encoder or decoder; whether positions are trained comes later."""
    blocks = stem(f"{side}/stack/blocks", file.family)
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    layers = {int(found[1]) for key in file.state if (found := pattern.match(key))}
    if layers != set(range(len(layers))):
        raise UserError(f"{blocks} has {len(layers)} layers, and they are not numbered from 0")
    hidden, width = _shape(file, f"{blocks}.0.{stem('mlp/fc1', file.family, BLOCK)}", 2)
    heads = heads or published.get(width)
    if not heads:
        raise UserError(
            f"the file does not say how many {what} a width of {width} is split into: give {what}"
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{what}={heads} does not divide the width {width}")
    return ViTSpec(width, len(layers), heads, hidden)


def _grid(file: File, patch_size: tuple[int, int], size: Any) -> tuple[int, int]:
    """Return rows and columns of patches: by the image size, else square, else by the positions."""
    key = stem("encoder/pos_embed", file.family)
    table = file.state.get(key)
    positions = table.shape[1] if table is not None and table.ndim == 3 else 0
    if size is not None:
        sides = [size, size] if isinstance(size, int) else size
        if not (
            isinstance(sides, list | tuple)
            and len(sides) == 2
            and all(isinstance(side, int) for side in sides)
        ):
            raise UserError(f"the file's image_size is {size!r}: give image_size")
        grid = sides[0] // patch_size[0], sides[1] // patch_size[1]
        if positions and positions != 1 + math.prod(grid):
            raise UserError(
                f"{key} has {positions} positions; images of {sides[0]} x {sides[1]} in"
                f" patches of {patch_size[0]} x {patch_size[1]} and a cls token need"
                f" {1 + math.prod(grid)}"
            )
        return grid
    if table is None or positions < 2:
        raise UserError(f"there is no position table {key}: give image_size")
    patches = positions - 1
    side = math.isqrt(patches)
    if side * side == patches:
        return side, side
    for rows in range(1, patches + 1):
        if patches % rows == 0 and is_sincos(table, (rows, patches // rows)):
            return rows, patches // rows
    raise UserError(
        f"{key} has {patches} patches, which are not in a square: give the image_size of the file"
    )


def _ratio(given: Any) -> float:
    if not isinstance(given, float) or not 0 < given < 1:
        raise UserError(f"the file's mask_ratio is {given!r}, not a number between 0 and 1")
    return given


def _numbers(what: str, given: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    if given is None:  # timm's arguments say None for its own default
        return default
    try:
        return tuple(float(x) for x in given)
    except (TypeError, ValueError):
        raise UserError(f"the file's {what} is {given!r}, not a number for each channel") from None


def _target(given: str | None, config: Mapping, name: str) -> tuple[str, list[str]]:
    if given:
        return given, []
    if "norm_pix_loss" in config:
        return ("norm_pixels" if config["norm_pix_loss"] else "pixels"), []
    if "visualize" in name:
        return "pixels", ["target: pixels, by the name of the file"]
    return "norm_pixels", [
        "target: the file does not say whether the decoder predicts pixels or normalised pixels;"
        " taken as norm_pixels, give target=pixels if not"
    ]
