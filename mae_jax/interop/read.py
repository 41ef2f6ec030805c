"""Read any PyTorch file or directory: its state dict, its family, and what it says beside it."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from mae_jax.errors import UserError
from mae_jax.interop import pth
from mae_jax.interop.names import Family, canonical_hf

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
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


def open_file(path: str | Path) -> File:
    """Find out what a file or directory is, and open it.

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
    config = getattr(content.get("args"), "__dict__", {}) | config
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            content = dict(content[key])
            break
    state = {
        re.sub(r"^module\.", "", str(name)): x
        for name, x in content.items()
        if isinstance(x, np.ndarray) and not re.search(IGNORED, str(name))
    }
    if {"cls_token", "patch_embed.proj.weight"} <= state.keys():
        return File(path.name, state, "official", config)
    state = {canonical_hf(name): x for name, x in state.items()}
    if "vit.embeddings.cls_token" in state:
        return File(path.name, state, "hf", config)
    keys = ", ".join(map(str, content))[:200]
    raise UserError(f"{path} is not a model of this family; what it holds begins with: {keys}")


def _open_hf(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the config of a directory of Hugging Face."""
    config = _json(directory / "config.json")
    kind, activation = config.get("model_type", "none"), config.get("hidden_act", "gelu")
    if kind not in ("vit_mae", "vit"):
        raise UserError(
            f"{directory} is a directory with model_type {kind!r} in its config.json; of Hugging"
            " Face's models, vit_mae and vit can be read"
        )
    if activation != "gelu":
        raise UserError(f"{directory}: hidden_act is {activation!r}, and only gelu is known")
    image = _json(directory / "preprocessor_config.json")
    config |= {name: image.get(f"image_{name}") for name in ("mean", "std")}
    for name in HF_WEIGHTS:
        if (directory / name).exists():
            return _content(directory / name), config
    raise UserError(f"{directory} has neither {' nor '.join(HF_WEIGHTS)}, in one piece")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def _content(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file, whatever the file is called."""
    with path.open("rb") as file:
        start = file.read(512)
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
    except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or holds numbers of a type that NumPy has not ({error}): copy or"
            " download it again"
        ) from None
