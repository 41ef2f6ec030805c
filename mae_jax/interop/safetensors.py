"""Safetensors files: a JSON header and raw bytes."""

import json
import math
import os
import struct
from collections.abc import Mapping

import numpy as np

from mae_jax.errors import UserError
from mae_jax.interop.pth import dtype_of

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file, as views of it that are read when they are used.

    Raises:
      UserError: it is cut off or damaged, or holds a type of numbers that NumPy has not.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise UserError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r")
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = entry["shape"]
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{name!r} holds numbers of type {entry['dtype']}")
            kind = dtype_of(DTYPES[entry["dtype"]])
            if not all(isinstance(n, int) and n >= 0 for n in [begin, end, *shape]):
                raise UserError(f"{name!r} has sizes that are not numbers")
            if end - begin != math.prod(shape) * kind.itemsize:
                raise UserError(f"{name!r} has {end - begin} bytes for shape {shape}")
            if 8 + length + end > size:
                raise UserError(f"{name!r} ends {8 + length + end - size} bytes after the file")
            first = 8 + length + begin
            tensors[name] = data[first : first + end - begin].view(kind).reshape(shape)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise UserError(
            f"{path} is not an intact safetensors file: {error}. Copy or download it again"
        ) from None


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors, marked as PyTorch's, which transformers wants to see."""
    codes = {name: code for code, name in DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, x in tensors.items():
        end = offset + x.nbytes
        header[name] = {
            "dtype": codes[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x).data.cast("B"))
