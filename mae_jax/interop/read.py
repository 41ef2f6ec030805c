"""Any PyTorch file or directory to a state dict, its family, and the network that it is of."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_jax.errors import UserError
from mae_jax.interop import pth, safetensors
from mae_jax.interop.names import Family, Spec, canonical_hf, entries, is_sincos

# Heads of the published widths (configs/common.py); a state dict does not tell them.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}

# What identifies other models, in the order in which they are looked for.
OTHERS = (
    (r"(^|\.)dist_token$", "DeiT with a distillation token"),
    (r"register_tokens?$|reg_token$", "a ViT with registers, such as DINOv2"),
    (r"\.ls1\.|\.gamma_1$|lambda1$", "a ViT with layer scale, such as DINOv2, BEiT or CaiT"),
    (r"relative_position", "BEiT or Swin, with relative positions"),
    (r"^(visual|vision_model|text_model)\.", "CLIP"),
    (r"\.rope|\.w12\.|\.q_norm\.", "a newer ViT (rotary positions, SwiGLU or QK-norm)"),
    (r"^layer[1-4]\.\d+\.conv\d", "ResNet"),
    (r"^stages\.\d+|downsample_layers", "ConvNeXt or another network in stages"),
    (r"^layers\.\d+\.blocks", "Swin"),
    (r"^(predictor|target_encoder)\.", "I-JEPA"),
    (r"^(model\.)?embed_tokens|lm_head|^transformer\.h\.", "a language model"),
)
# Parts of checkpoints that are no weights of the network.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
IGNORED = r"(^|\.)(num_batches_tracked|pooler\.dense\.(weight|bias))$"


class File(NamedTuple):
    """A state dict with the names of TABLE, and what the file says beside it."""

    state: dict[str, np.ndarray]
    family: Family
    config: dict[str, Any]  # of Hugging Face, or the arguments of an official run
    source: str  # what it was found to be
    notes: list[str]


def open_file(path: str | Path) -> File:
    """Find out what a file or directory is, and open it; its tensors are not read yet.

    Raises:
      UserError: it is nothing that can be read; what it seems to be is said.
    """
    path, config, image = Path(path), {}, {}
    if not path.exists():
        raise UserError(f"there is no file or directory {str(path)!r}")
    if path.is_dir():
        config, image = _json(path / "config.json"), _json(path / "preprocessor_config.json")
        kind = config.get("model_type", "none")
        if kind not in ("vit_mae", "vit"):
            raise UserError(
                f"{path} is a directory with model_type {kind!r} in its config.json; of Hugging"
                " Face's models, vit_mae and vit can be read"
            )
        content = _hf_weights(path)
    else:
        content = _content(path)
    content, arguments, found = _unwrap(content, path)
    state = {re.sub(r"^module\.", "", str(name)): x for name, x in content.items()}
    notes = []
    skipped = [name for name in state if re.search(IGNORED, name)]
    if skipped:
        notes.append(f"not part of the network, left out: {', '.join(skipped)}")
    state = {name: x for name, x in state.items() if name not in skipped}

    renamed = {canonical_hf(name): x for name, x in state.items()}
    if "vit.embeddings.cls_token" in renamed:
        source = "Hugging Face " + {"vit_mae": "ViTMAE", "vit": "ViT"}.get(
            config.get("model_type", ""), "ViT names"
        )
        notes += _epsilon(config)
        if activation := {config.get("hidden_act", "gelu")} - {"gelu"}:
            raise UserError(f"{path}: hidden_act is {activation.pop()!r}, and only gelu is known")
        config |= {name: image.get(f"image_{name}") for name in ("mean", "std")}
        return File(renamed, "hf", config, source, notes)
    if "cls_token" in state and "patch_embed.proj.weight" in state:
        if "head.1.weight" in state:
            state = _fold_batch_norm(state, path)
            notes.append("head.0, a batch norm without scale and bias, was folded into the head")
        return File(state, "official", arguments, found, notes)
    raise UserError(f"{path} is not a model of this family: it looks like {_guess(state)}")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def _hf_weights(directory: Path) -> dict[str, Any]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = _json(directory / f"{name}.index.json").get("weight_map", {})
        if (directory / name).exists():
            return _content(directory / name)
        if index:
            parts = sorted(set(index.values()))
            if any(Path(part).name != part or not (directory / part).exists() for part in parts):
                raise UserError(f"{directory}/{name}.index.json names files that are not there")
            return {k: x for part in parts for k, x in _content(directory / part).items()}
    raise UserError(f"{directory} has neither model.safetensors nor pytorch_model.bin")


def _content(path: Path) -> dict[str, Any]:
    """The dictionary in a file, whatever the file is called."""
    with path.open("rb") as file:
        start = file.read(512)
    size = path.stat().st_size
    if start[:2] == b"PK":
        content = pth.read(path)
    elif size > 8 and start[8:9] == b"{":
        content = safetensors.read(path)
    else:
        raise UserError(f"{path} {_what(start, size)}")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _what(start: bytes, size: int) -> str:
    text = start.lstrip().lower()
    if not size:
        return "is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a model: download the file itself again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: run git lfs pull"
    if start[:1] == b"\x80":
        return (
            "is a bare pickle, as PyTorch before 1.6 wrote: it is not read, because pickles can run"
            " code. Save it again with a newer PyTorch, or as safetensors"
        )
    return "is neither a .pth file of PyTorch (1.6 or newer) nor a safetensors file"


def _unwrap(content: dict, path: Path) -> tuple[dict, dict, str]:
    """The state dict inside a checkpoint, the arguments of its run, and words for what it is."""
    arguments = getattr(content.get("args"), "__dict__", {})
    found = "a state dict with official names (timm's are the same)"
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            found = "a training checkpoint" if "optimizer" in content else "an official file"
            content = content[key]
            break
    tensors = {k: x for k, x in content.items() if isinstance(x, np.ndarray)}
    if not tensors:
        raise UserError(
            f"{path} holds no tensors by name; its keys: {', '.join(map(str, content))[:200]}"
        )
    return tensors, arguments, found


def _epsilon(config: Mapping[str, Any]) -> list[str]:
    epsilon = config.get("layer_norm_eps", 1e-6)
    if epsilon == 1e-6:
        return []
    return [
        f"layer_norm_eps is {epsilon} in the file's config and 1e-6 here, as the weights were"
        " trained: outputs differ where activations are small"
    ]


def _fold_batch_norm(state: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The official linear probe's head: logits = W (x - mean) / sqrt(var + 1e-6) + b."""
    try:
        mean, var = (np.asarray(state[f"head.0.running_{x}"], np.float64) for x in ("mean", "var"))
        weight, bias = (np.asarray(state[f"head.1.{x}"], np.float64) for x in ("weight", "bias"))
        scale = 1 / np.sqrt(var + 1e-6)
        folded = {"head.weight": weight * scale, "head.bias": bias - weight @ (mean * scale)}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: the head of a linear probe is not whole: {error}") from None
    rest = {name: x for name, x in state.items() if not name.startswith("head.")}
    return rest | {name: x.astype(np.float32) for name, x in folded.items()}


def _guess(state: Mapping[str, Any]) -> str:
    for pattern, family in OTHERS:
        if any(re.search(pattern, name) for name in state):
            return family
    return f"none of the models known here; its first tensors: {', '.join(list(state)[:5])}"


def infer(
    file: File,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    target: str | None = None,
    name: str = "",
) -> tuple[Spec, list[str]]:
    """The network that a state dict is of, and notes on what had to be assumed.

    Args:
      heads, decoder_heads: where the file does not say, and the width is none of the published.
      image_size: of the file, (height, width), where its patches are not in a square.
      target: "pixels" or "norm_pixels", where the file does not say.
      name: of the file; those of the released files tell their target.

    Raises:
      UserError: tensors that contradict each other, or something that cannot be told.
    """
    state, config, hf = file.state, file.config, file.family == "hf"
    notes: list[str] = []

    def shape(official: str, hf_name: str, rank: int) -> tuple[int, ...]:
        key = hf_name if hf else official
        if key not in state:
            raise UserError(f"{key} is missing, so that this would be a partial load")
        if state[key].ndim != rank or not all(state[key].shape):
            raise UserError(f"{key} has shape {state[key].shape}, of another rank than {rank}")
        return state[key].shape

    def depth(stem: str) -> int:
        found = {int(m[1]) for key in state if (m := re.match(rf"{re.escape(stem)}\.(\d+)\.", key))}
        if found != set(range(len(found))):
            raise UserError(f"{stem} has {len(found)} layers, and they are not numbered from 0")
        return len(found)

    embed = "vit.embeddings.patch_embeddings.projection.weight"
    width, channels, *patch = shape("patch_embed.proj.weight", embed, 4)
    blocks = "vit.encoder.layer" if hf else "blocks"
    fc1 = (f"{blocks}.0.mlp.fc1.weight", f"{blocks}.0.intermediate.dense.weight")
    spec = Spec(
        grid=(0, 0),
        patch=(patch[0], patch[1]),
        channels=channels,
        width=width,
        depth=depth(blocks),
        heads=_heads("heads", width, heads or config.get("num_attention_heads"), HEADS),
        hidden=shape(*fc1, 2)[0],
    )
    grid, told = _grid(state, spec, hf, image_size or config.get("image_size"))
    spec = spec._replace(grid=grid)
    notes += told

    stem = "decoder.decoder_" if hf else "decoder_"
    if f"{stem}embed.weight" in state:
        decoder_width = shape("decoder_embed.weight", "decoder.decoder_embed.weight", 2)[0]
        given = decoder_heads or config.get("decoder_num_attention_heads")
        spec = spec._replace(
            decoder_width=decoder_width,
            decoder_depth=depth(f"{stem}layers" if hf else f"{stem}blocks"),
            decoder_heads=_heads("decoder_heads", decoder_width, given, DECODER_HEADS),
            decoder_hidden=shape(
                "decoder_blocks.0.mlp.fc1.weight",
                "decoder.decoder_layers.0.intermediate.dense.weight",
                2,
            )[0],
        )
        target, told = _target(target, config, name)
        notes += told
        spec = spec._replace(target=target, mask_ratio=_ratio(config.get("mask_ratio")))
    head = "classifier.weight" if hf else "head.weight"
    if head in state:
        pool = "avg" if "fc_norm.weight" in state else "cls"
        spec = spec._replace(classes=shape("head.weight", head, 2)[0], pool=pool)
    spec = spec._replace(
        mean=_numbers("mean", config.get("mean"), spec.mean),
        std=_numbers("std", config.get("std"), spec.std),
    )
    if len(spec.mean) != channels:
        notes.append(f"mean and std of {channels} channels are not known: taken as 0.5 and 0.25")
        spec = spec._replace(mean=(0.5,) * channels, std=(0.25,) * channels)
    dtypes = Counter(x.dtype.name for x in state.values())
    if set(dtypes) != {"float32"}:
        counts = ", ".join(f"{n} {dtype}" for dtype, n in dtypes.items())
        notes.append(f"types of the tensors: {counts}; all are made float32")
    return spec, notes


def unused(file: File, spec: Spec) -> list[str]:
    """Names of the file that the network has no place for."""
    known = {name for entry in entries(spec, file.family) for name in entry.names}
    return [name for name in file.state if name not in known]


def _ratio(given: Any) -> float:
    if given is None:
        return Spec._field_defaults["mask_ratio"]
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


def _heads(what: str, width: int, given: Any, published: Mapping[int, int]) -> int:
    heads = given or published.get(width)
    if not heads:
        raise UserError(
            f"the file does not say how many {what} a width of {width} is split into: give {what}"
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{what}={heads} does not divide the width {width}")
    return heads


def _grid(state: Mapping, spec: Spec, hf: bool, size: Any) -> tuple[tuple[int, int], list[str]]:
    """Rows and columns of patches: as the image size says, else square, else as the positions."""
    key = "vit.embeddings.position_embeddings" if hf else "pos_embed"
    if size is not None:
        sides = [size, size] if isinstance(size, int) else size
        if not (
            isinstance(sides, list | tuple)
            and len(sides) == 2
            and all(isinstance(side, int) for side in sides)
        ):
            raise UserError(f"the file's image_size is {size!r}: give image_size")
        height, width = sides
        grid = height // spec.patch[0], width // spec.patch[1]
        if key in state and state[key].shape[1] != 1 + math.prod(grid):
            raise UserError(
                f"{key} has {state[key].shape[1]} positions; images of {height} x {width} in"
                f" patches of {spec.patch[0]} x {spec.patch[1]} and a cls token need"
                f" {1 + math.prod(grid)}"
            )
        return grid, []
    if key not in state or state[key].ndim != 3 or state[key].shape[1] < 2:
        raise UserError(f"there is no position table {key}: give image_size")
    table, patches = state[key], state[key].shape[1] - 1
    side = math.isqrt(patches)
    if side * side == patches:
        return (side, side), []
    for rows in range(1, patches + 1):
        if patches % rows == 0 and is_sincos(table, (rows, patches // rows)):
            return (rows, patches // rows), []
    raise UserError(
        f"{key} has {patches} patches, which are not in a square: give the image_size of the file"
    )


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
