"""Read PyTorch's .pth files, without PyTorch and without running anything that is in them.

Such a file is a zip archive: `data.pkl`, a pickle of the structure, and each storage as raw bytes,
uncompressed. The pickle is read by an unpickler that knows few names, makes objects without
behaviour from them, and refuses every other.
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from mae_jax.errors import UserError

STORAGES = {  # as names: a pickle could change the state of a NumPy dtype
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
MAX_PICKLE = 64 * 2**20  # bytes; that of a real model has a few hundred KB


def read(path: str | os.PathLike) -> Any:
    """Return what a .pth file holds; its tensors are views of the file, read when they are used.

    Raises:
      UserError: it is cut off, damaged or compressed, or asks for anything but tensors.
    """
    data = np.memmap(path, np.uint8, "r")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
        return _Reader(data, members).load()
    except Exception as error:  # damaged bytes can make zipfile and pickle raise anything
        reason = str(error) or repr(error)
        raise UserError(f"{path} was not read, it may be cut off or damaged: {reason}") from error


class _Reader(pickle.Unpickler):
    """An unpickler of state dicts, which looks names up in a table of its own and nowhere else.

    Its methods raise UnpicklingError with the reason for which a file is refused.
    """

    def __init__(self, data: np.ndarray, members: dict[str, zipfile.ZipInfo]):
        self._data, self._members = data, members
        pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("it is a zip archive, but not one that torch.save wrote")
        for info in members.values():
            if info.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(
                    f"it has compressed parts ({info.filename!r}); torch.save writes none, and they"
                    " could unpack to any size"
                )
        if members[pickles[0]].file_size > MAX_PICKLE:
            raise pickle.UnpicklingError(f"its pickle is larger than {MAX_PICKLE >> 20} MiB")
        self._root = pickles[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in members and self._bytes(order).tobytes() != b"little":
            raise pickle.UnpicklingError("it was written on a big-endian machine")
        super().__init__(io.BytesIO(self._bytes(pickles[0]).tobytes()), encoding="utf-8")

        # New classes for each file: what a pickle does to them ends with its reading.
        class OrderedDict(dict):
            pass

        class Namespace:
            pass

        self._allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): Namespace,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _tensor(*arguments[:4]),
        }
        for name in PATHS:  # among a run's arguments; they become text
            self._allowed["pathlib", name] = lambda *parts: "/".join(map(str, parts))
        self._allowed |= {("torch", name): dtype for name, dtype in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}. Only tensors, dicts, numbers, text and the arguments"
                " of a run are read; nothing in a file is run"
            )
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid
        if kind != "storage" or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"it has an object of an unknown kind: {pid!r:.80}")
        content = self._bytes(f"{self._root}data/{key}")
        number = np.dtype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
        if len(content) != count * number.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key!r} has {len(content)} bytes, not {count} numbers of {dtype}"
            )
        return content.view(number) if content.size else np.empty(0, number)

    def _bytes(self, name: str) -> np.ndarray:
        """Return the stored bytes of a member, after a check of its CRC."""
        info = self._members.get(name)
        if info is None:
            raise pickle.UnpicklingError(f"it has no {name!r}")
        start = info.header_offset
        header = self._data[start : start + 30].tobytes()
        if len(header) == 30 and header[:4] == b"PK\3\4":
            length, extra = struct.unpack("<HH", header[26:30])
            start += 30 + length + extra
            content = self._data[start : start + info.file_size]
            if len(content) == info.file_size and zlib.crc32(content.data) == info.CRC:
                return content
        raise pickle.UnpicklingError(f"{name!r} has other bytes than were written")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> np.ndarray:
    numbers = [offset, *shape, *stride]
    if not isinstance(storage, np.ndarray) or not all(
        isinstance(x, int) and x >= 0 for x in numbers
    ):
        raise pickle.UnpicklingError("a tensor is not made of a storage and sizes")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if count and (last >= len(storage) or count > len(storage)):
        raise pickle.UnpicklingError(
            f"a tensor of shape {tuple(shape)} does not fit its storage of {len(storage)} numbers"
        )
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
