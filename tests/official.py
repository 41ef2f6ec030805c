"""State dicts with the official names: golden numbers, our parameters of them, .pth files."""

import json
import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from mae_jax.interop import names
from mae_jax.models.spec import ModelSpec, ViTSpec

DATA = Path(__file__).parent / "data"


def golden_state(file: Path) -> tuple[dict, dict]:
    """Return the parameters in a file of golden numbers, by their official names, and its sizes."""
    arrays = np.load(file)
    state = {k.removeprefix("param/"): arrays[k] for k in arrays.files if k.startswith("param/")}
    return state, json.loads(str(arrays["meta"]))


GOLDEN = np.load(DATA / "mae_tiny.npz")
STATE, META = golden_state(DATA / "mae_tiny.npz")
HEADS = {"heads": META["heads"], "decoder_heads": META["dec_heads"]}


def mae_spec() -> ModelSpec:
    width, decoder_width = META["embed_dim"], META["dec_dim"]
    return ModelSpec(
        (META["img"],) * 2,
        (META["patch"],) * 2,
        3,
        ViTSpec(width, META["depth"], META["heads"], 4 * width),
        ViTSpec(decoder_width, META["dec_depth"], META["dec_heads"], 4 * decoder_width),
    )


def classifier_spec(meta: dict, pool: str, drop_path: float = 0.0) -> ModelSpec:
    width, sizes = meta["embed_dim"], ((meta["img"],) * 2, (meta["patch"],) * 2, 3)
    encoder = ViTSpec(width, meta["depth"], meta["heads"], 4 * width, drop_path, True)
    return ModelSpec(*sizes, encoder, classes=meta["classes"], pool=pool)


def params_of(state: dict, spec: ModelSpec) -> dict:
    return names.to_ours(dict(state), spec, "official")[0]


def assert_close(ours, theirs, name=""):
    worst = np.max(np.abs(np.asarray(ours) - theirs))
    assert worst <= 1e-5 * np.max(np.abs(theirs)), (name, worst, np.max(np.abs(theirs)))


STORAGES = {"float32": "Float", "float64": "Double", "float16": "Half", "int64": "Long"}


def write_pth(path: Path, state: dict = STATE, wrapped: bool = True) -> Path:
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
