"""State dicts with the official names: golden numbers, our parameter tree of them, .pth files."""

import json
import math
import struct
import zipfile
from pathlib import Path

import numpy as np
from einops import rearrange

from mae_jax.models.spec import ModelSpec, ViTSpec


def _block(state: dict, prefix: str, heads: int) -> dict:
    def norm(name):
        return {"scale": state[f"{prefix}.{name}.weight"], "bias": state[f"{prefix}.{name}.bias"]}

    def linear(name):
        return {
            "kernel": state[f"{prefix}.{name}.weight"].T,
            "bias": state[f"{prefix}.{name}.bias"],
        }

    qkv, proj = linear("attn.qkv"), linear("attn.proj")
    qkv["kernel"] = rearrange(qkv["kernel"], "d (three s f) -> d three s f", three=3, s=heads)
    qkv["bias"] = rearrange(qkv["bias"], "(three s f) -> three s f", three=3, s=heads)
    proj["kernel"] = rearrange(proj["kernel"], "(s f) d -> s f d", s=heads)
    return {
        "norm1": norm("norm1"),
        "attn": {"qkv": qkv, "proj": proj},
        "norm2": norm("norm2"),
        "mlp": {"fc1": linear("mlp.fc1"), "fc2": linear("mlp.fc2")},
    }


def _stack(state: dict, prefix: str, depth: int, heads: int) -> dict:
    import jax

    blocks = [_block(state, f"{prefix}.{i}", heads) for i in range(depth)]
    return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}


def _linear(state: dict, name: str) -> dict:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def _norm(state: dict, name: str) -> dict:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def encoder_params(state: dict, depth: int, heads: int) -> dict:
    params = {
        "cls_token": state["cls_token"],
        "patch_embed": {
            "kernel": rearrange(state["patch_embed.proj.weight"], "d ch r c -> (r c ch) d"),
            "bias": state["patch_embed.proj.bias"],
        },
        "stack": _stack(state, "blocks", depth, heads),
    }
    if "norm.weight" in state:
        params["norm"] = _norm(state, "norm")
    return params


def mae_spec(meta: dict) -> ModelSpec:
    width, decoder_width = meta["embed_dim"], meta["dec_dim"]
    return ModelSpec(
        (meta["img"],) * 2,
        (meta["patch"],) * 2,
        3,
        ViTSpec(width, meta["depth"], meta["heads"], 4 * width),
        ViTSpec(decoder_width, meta["dec_depth"], meta["dec_heads"], 4 * decoder_width),
    )


def mae_params(state: dict, meta: dict) -> dict:
    return {
        "encoder": encoder_params(state, meta["depth"], meta["heads"]),
        "decoder": {
            "embed": _linear(state, "decoder_embed"),
            "mask_token": state["mask_token"],
            "stack": _stack(state, "decoder_blocks", meta["dec_depth"], meta["dec_heads"]),
            "norm": _norm(state, "decoder_norm"),
            "pred": _linear(state, "decoder_pred"),
        },
    }


def classifier_params(state: dict, meta: dict) -> dict:
    params = {
        "encoder": encoder_params(state, meta["depth"], meta["heads"]),
        "head": _linear(state, "head"),
    }
    params["encoder"]["pos_embed"] = state["pos_embed"]
    if "fc_norm.weight" in state:
        params["fc_norm"] = _norm(state, "fc_norm")
    return params


STORAGES = {"float32": "Float", "float64": "Double", "float16": "Half", "int64": "Long"}


def write_pth(path: Path, state: dict, wrapped: bool = True) -> Path:
    """Write {"model": state} (or `state` itself) as torch.save does, and return the path."""

    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def group(values: list[bytes]) -> bytes:
        return b"(" + b"".join(values) + b"t"

    stream = [b"\x80\x02}", text("model") + b"}(" if wrapped else b"("]
    for key, (name, x) in enumerate(state.items()):
        kind = f"ctorch\n{STORAGES[x.dtype.name]}Storage\n".encode()
        pid = group([text("storage"), kind, text(str(key)), text("cpu"), number(x.size)])
        strides = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
        arguments = [
            pid + b"Q",
            number(0),
            group([number(n) for n in x.shape]),
            group([number(n) for n in strides]),
            b"\x89",
            b"ccollections\nOrderedDict\n)R",
        ]
        stream += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", group(arguments), b"R"]
    stream.append(b"us." if wrapped else b"u.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(stream))
        archive.writestr("archive/byteorder", b"little")
        for key, x in enumerate(state.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(x).tobytes())
        archive.writestr("archive/version", b"3\n")
    return path


def golden_state(file: Path) -> tuple[dict, dict]:
    """Return the parameters in a file of golden numbers, by their official names, and its sizes."""
    arrays = np.load(file)
    state = {k.removeprefix("param/"): arrays[k] for k in arrays.files if k.startswith("param/")}
    return state, json.loads(str(arrays["meta"]))
