"""Read any PyTorch file or directory: its state dict, its family, and what it says beside it."""

import contextlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from mae_jax import files
from mae_jax.errors import UserError, nearest
from mae_jax.interop import pth
from mae_jax.interop.names import Family, canonical_hf

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DINO_LIKE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "pixio")  # of interop/encoders.py
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # keys of a state dict
# Parts of checkpoints that are no weights of the network.
IGNORED = r"(^|\.)(num_batches_tracked|pooler\.dense\.(weight|bias))$"
# What a file that cannot be read starts with, and what it is.
OTHERS = (
    (rb"\Z", "is empty"),
    (rb"\s*<[!?hH]", "is a web page, not a model: download the file itself again"),
    (rb"version https://git-lfs", "is a pointer of Git LFS, not the file: run git lfs pull"),
    (
        rb"\x80",
        "is a bare pickle, as PyTorch before 1.6 wrote: it is not read, because pickles can run"
        " code. Save it again with a newer PyTorch, or as safetensors",
    ),
    (rb"", "is neither a .pth file of PyTorch (1.6 or newer) nor a safetensors file"),
)


class File(NamedTuple):
    """A state dict with the names of `names.TABLE`, and what the file says beside it."""

    name: str
    state: dict[str, np.ndarray]
    family: Family
    config: dict[str, Any]  # of Hugging Face, or the arguments of an official run


def open_file(path: str | Path, key: str = "") -> File:
    """Find out what a file or directory is, and open it.

    Args:
      key: where the weights lie in the file, such as teacher or ema.model; "" = at its top, or
        under one of WRAPPERS.

    Raises:
      UserError: it cannot be read; the message says why.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file or directory {str(path)!r}")
    if path.is_dir():
        content, config = _open_hf(path)
    else:
        content, config = _content(path), {}
    config = _plain(getattr(content.get("args"), "__dict__", {})) | config
    chosen = _below(path, content, key)
    tensors = {
        str(name): x
        for name, x in chosen.items()
        if isinstance(x, np.ndarray) and not re.search(IGNORED, str(name))
    }
    if (state := _under_a_prefix(tensors, {"cls_token", "patch_embed.proj.weight"})) is not None:
        return File(path.name, state, "official", config)
    renamed = {canonical_hf(re.sub(r"^module\.", "", name)): x for name, x in tensors.items()}
    if (state := _under_a_prefix(renamed, {"vit.embeddings.cls_token"})) is not None:
        return File(path.name, state, "hf", config)
    if any(re.search(r"(^|\.)patch_embed(dings\.projection|\.proj)\.weight$", x) for x in renamed):
        raise UserError(f"{path} has no cls_token, which every encoder here has: it is not read")
    held = ", ".join(str(name)[:100] for name in itertools.islice(chosen, 20))
    keys = [str(name)[:100] for name, x in content.items() if isinstance(x, dict) and x]
    hint = f". Weights may lie under another key: give one of {', '.join(keys)[:200]} as the key"
    raise UserError(
        f"{path} is not a model of this family; what it holds begins with: {held[:200]}"
        + hint * bool(keys)
    )


def _below(path: Path, content: dict, key: str) -> dict:
    """Return the dictionary under a key, whose dots lead deeper, or under one of WRAPPERS."""
    if not key:
        under = (content[name] for name in WRAPPERS if isinstance(content.get(name), dict))
        return next(under, content)
    for name in [key] if key in content else key.split("."):
        if not isinstance(content.get(name), dict):
            there = [str(x) for x, below in content.items() if isinstance(below, dict)]
            raise UserError(f"{path} has no dictionary under the key {key!r}{nearest(name, there)}")
        content = content[name]
    return content


def _under_a_prefix(
    tensors: dict[str, np.ndarray], landmarks: set[str]
) -> dict[str, np.ndarray] | None:
    """Return tensors without the prefix of a model's names, such as the "model." of a trainer.

    Names without it stay as they are. None: no single prefix leads to all the landmarks.
    """
    one = next(iter(landmarks))
    prefixes = {name.removesuffix(one) for name in tensors if name.endswith(one)}
    prefixes = {x for x in prefixes if all(x + mark in tensors for mark in landmarks)}
    if len(prefixes) != 1:
        return None
    return {name.removeprefix(prefix): x for prefix in prefixes for name, x in tensors.items()}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config that are numbers, text, or a few of them."""

    def simple(value: Any) -> bool:
        return value is None or isinstance(value, bool | int | float | str)

    return {
        name: value
        for name, value in config.items()
        if simple(value)
        or (isinstance(value, tuple | list) and len(value) < 100 and all(map(simple, value)))
    }


def _open_hf(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the config of a directory of Hugging Face, or of timm in its form."""
    config = _json(directory / "config.json")
    if "architecture" in config and "model_type" not in config:
        return _weights(directory), _config_of_timm(config)
    kind, activation = config.get("model_type", "none"), config.get("hidden_act", "gelu")
    if kind not in ("vit_mae", "vit", *DINO_LIKE):
        raise UserError(
            f"{directory} is a directory with model_type {kind!r} in its config.json; of Hugging"
            f" Face's models, vit_mae, vit, {', '.join(DINO_LIKE)} can be read"
        )
    if activation != "gelu":
        raise UserError(f"{directory}: hidden_act is {activation!r}, and only gelu is known")
    image = _plain(_json(directory / "preprocessor_config.json"))
    config = _plain(config)
    config |= {name: image.get(f"image_{name}") for name in ("mean", "std")}
    scale: Any = image.get("rescale_factor")
    low: Any = image.get("value_low", 0)  # of `write.hf`, which has added it to the mean
    known = isinstance(scale, int | float) and 1e-12 < scale < 1e12
    if known and isinstance(low, int | float) and abs(low) <= 1e9:
        if low or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
            config["value_range"] = (low, low + 1 / scale)
        with contextlib.suppress(TypeError):  # a mean that is none is refused later
            config["mean"] = [mean - low * scale for mean in config["mean"]]
    return _weights(directory), config


def _config_of_timm(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the config.json of a timm model says of its images, under our keys."""
    images = config.get("pretrained_cfg")
    images = _plain(images) if isinstance(images, dict) else {}
    size = images.get("input_size")
    return {
        "image_size": size[1:] if isinstance(size, list | tuple) else None,
        "mean": images.get("mean"),
        "std": images.get("std"),
    }


def _weights(directory: Path) -> dict[str, Any]:
    """Return the tensors in a directory of Hugging Face."""
    for name in HF_WEIGHTS:
        if (directory / name).exists():
            return _content(directory / name)
    raise UserError(f"{directory} has neither {' nor '.join(HF_WEIGHTS)}, in one piece")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read_bytes(file)) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def _content(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file, whatever the file is called."""
    try:
        with open(path, "rb", opener=files.open_regular) as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if start[:2] == b"PK":
        content = pth.read(path)
    elif start[8:9] == b"{":
        content = _safetensors(path)
    else:
        reason = next(text for pattern, text in OTHERS if re.match(pattern, start))
        raise UserError(f"{path} {reason}")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return dict(content)  # a pickle may have given its own dictionaries other attributes


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # it raises many kinds at damaged headers
        raise UserError(
            f"{path} is damaged, or holds numbers of a type unknown to NumPy"
            f" ({str(error)[:500]}): copy or download it again"
        ) from None
