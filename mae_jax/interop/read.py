"""Read any PyTorch file or directory: its state dict, its family, and what it says beside it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from mae_jax.errors import UserError
from mae_jax.interop import pth
from mae_jax.interop.names import Family, canonical_hf

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
    """A state dict with the names of `names.TABLE`, and what the file says beside it."""

    state: dict[str, np.ndarray]
    family: Family
    config: dict[str, Any]  # of Hugging Face, or the arguments of an official run
    source: str  # what the file is, in words
    notes: list[str]


def open_file(path: str | Path) -> File:
    """Find out what a file or directory is, and open it.

    Raises:
      UserError: it cannot be read; the message says what it seems to be.
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
    content, arguments, source = _unwrap(content, path)
    state = {re.sub(r"^module\.", "", str(name)): x for name, x in content.items()}
    notes = []
    skipped = [name for name in state if re.search(IGNORED, name)]
    if skipped:
        notes.append(f"not part of the network, left out: {', '.join(skipped)}")
    state = {name: x for name, x in state.items() if name not in skipped}

    renamed = {canonical_hf(name): x for name, x in state.items()}
    if "vit.embeddings.cls_token" in renamed:
        models = {"vit_mae": "ViTMAE", "vit": "ViT"}
        source = f"Hugging Face {models.get(config.get('model_type', ''), 'ViT names')}"
        notes += _epsilon(config)
        if activation := {config.get("hidden_act", "gelu")} - {"gelu"}:
            raise UserError(f"{path}: hidden_act is {activation.pop()!r}, and only gelu is known")
        config |= {name: image.get(f"image_{name}") for name in ("mean", "std")}
        return File(renamed, "hf", config, source, notes)
    if "cls_token" in state and "patch_embed.proj.weight" in state:
        if "head.1.weight" in state:
            state = _fold_batch_norm(state, path)
            notes.append("head.0, a batch norm without scale and bias, was folded into the head")
        return File(state, "official", arguments, source, notes)
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
    """Return the dictionary in a file, whatever the file is called."""
    with path.open("rb") as file:
        start = file.read(512)
    size = path.stat().st_size
    if start[:2] == b"PK":
        content = pth.read(path)
    elif size > 8 and start[8:9] == b"{":
        content = _safetensors(path)
    else:
        raise UserError(f"{path} {_reason(start, size)}")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or holds numbers of a type that NumPy has not ({error}): copy or"
            " download it again"
        ) from None


def _reason(start: bytes, size: int) -> str:
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
    """Return the state dict inside a checkpoint, the arguments of its run, and what it is."""
    arguments = getattr(content.get("args"), "__dict__", {})
    source = "a state dict with official names (timm's are the same)"
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            source = "a training checkpoint" if "optimizer" in content else "an official file"
            content = content[key]
            break
    tensors = {k: x for k, x in content.items() if isinstance(x, np.ndarray)}
    if not tensors:
        raise UserError(
            f"{path} holds no tensors by name; its keys: {', '.join(map(str, content))[:200]}"
        )
    return tensors, arguments, source


def _epsilon(config: Mapping[str, Any]) -> list[str]:
    epsilon = config.get("layer_norm_eps", 1e-6)
    if epsilon == 1e-6:
        return []
    return [
        f"layer_norm_eps is {epsilon} in the file's config and 1e-6 here, as the weights were"
        " trained: outputs differ where activations are small"
    ]


def _fold_batch_norm(state: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Fold the official linear probe's head: logits = W (x - mean) / sqrt(var + 1e-6) + b."""
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
