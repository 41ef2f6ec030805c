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
MAX_PICKLE = 64 * 2**20  # bytes; that of a real model has a few hundred KB


def read(path: str | os.PathLike) -> Any:
    """Return what a .pth file holds; its tensors are views of the file, read when they are used.

    Raises:
      UserError: it is cut off, damaged or compressed, or asks for anything but tensors.
    """
    data = np.memmap(path, np.uint8, "r")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is cut off or damaged: its end has no zip directory, which .pth files have"
        ) from None
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive, but not one that torch.save wrote")
        root = pickles[0].removesuffix("data.pkl")
        packed = [i.filename for i in members.values() if i.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise UserError(
                f"{path} has compressed parts ({packed[0]!r}); torch.save writes none, and they"
                " could unpack to any size"
            )
        if members[pickles[0]].file_size > MAX_PICKLE:
            raise UserError(f"{path}: its {pickles[0]} is larger than {MAX_PICKLE >> 20} MiB")
        order = members.get(f"{root}byteorder")
        if order and _bytes(data, order, path).tobytes() != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")

        def storage(key: str) -> np.ndarray:
            info = members.get(f"{root}data/{key}")
            if info is None:
                raise UserError(f"{path} has no storage {key!r}: it is damaged")
            return _bytes(data, info, path)

        reader = _Reader(io.BytesIO(_bytes(data, members[pickles[0]], path).tobytes()))
        reader.storage = storage
        try:
            return reader.load()
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} was not read: {error}") from None
        except (
            EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
            UnicodeDecodeError, MemoryError, struct.error,
        ) as error:  # fmt: skip
            raise UserError(f"{path}: its data.pkl is damaged ({error!r})") from None


def _bytes(data: np.ndarray, info: zipfile.ZipInfo, path: Any) -> np.ndarray:
    """Return the stored bytes of a member, after a check of its CRC."""
    start = info.header_offset
    header = data[start : start + 30].tobytes()
    if len(header) == 30 and header[:4] == b"PK\3\4":
        name, extra = struct.unpack("<HH", header[26:30])
        start += 30 + name + extra
        content = data[start : start + info.file_size]
        if len(content) == info.file_size and zlib.crc32(content.data) == info.CRC:
            return content
    raise UserError(f"{path} is damaged: {info.filename!r} has other bytes than were written")


class _Reader(pickle.Unpickler):
    """An unpickler of state dicts, which looks names up in a table of its own and nowhere else."""

    storage: Any  # key -> bytes

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")

        # New classes for each file: what a pickle does to them ends with its reading.
        class OrderedDict(dict):
            pass

        class Namespace:
            pass

        def rebuild(storage, offset, shape, stride, *_):
            return _tensor(storage, offset, shape, stride)

        self._allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): Namespace,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        }
        # Paths among a run's arguments become text.
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            self._allowed["pathlib", name] = lambda *parts: "/".join(map(str, parts))
        self._allowed |= {("torch", name): dtype for name, dtype in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}. Only tensors, dicts, numbers, text and the arguments"
                " of a run are read; nothing in a file is run"
            ) from None

    def persistent_load(self, pid: Any) -> np.ndarray:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError(f"it has an object of an unknown kind: {pid!r:.80}")
        _, dtype, key, _, count = pid
        if dtype not in STORAGES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it has a storage of an unknown kind: {pid!r:.80}")
        content = self.storage(key)
        kind = np.dtype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
        if not isinstance(count, int) or len(content) != count * kind.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key!r} has {len(content)} bytes, not {count} numbers of {dtype}"
            )
        return content.view(kind) if content.size else np.empty(0, kind)


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
