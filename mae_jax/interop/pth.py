"""PyTorch's .pth files, without PyTorch and without running anything that is in them.

Such a file is a zip archive: `data.pkl`, a pickle of the structure, and each storage as raw bytes,
uncompressed. The pickle is read by an unpickler that knows few names, makes objects without
behaviour from them, and refuses every other.
"""

import io
import math
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mae_jax.errors import UserError

STORAGES = {
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


def dtype_of(name: str) -> np.dtype:
    """A NumPy dtype by name, bfloat16 among them."""
    return np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(name)


def release(x: Any) -> None:
    """Lets go of the memory of a file that a tensor is a view of; it is read again when needed."""
    while x is not None and not isinstance(x, mmap.mmap):
        x = getattr(x, "base", None)
    if x is not None and hasattr(mmap, "MADV_DONTNEED"):
        x.madvise(mmap.MADV_DONTNEED)


def read(path: str | os.PathLike) -> Any:
    """What a .pth file holds; its tensors are views of the file, read when they are used.

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
    """The stored bytes of a member, checked against its CRC."""
    start = info.header_offset
    header = data[start : start + 30].tobytes()
    if len(header) == 30 and header[:4] == b"PK\3\4":
        name, extra = struct.unpack("<HH", header[26:30])
        start += 30 + name + extra
        found = data[start : start + info.file_size]
        intact = len(found) == info.file_size and zlib.crc32(found.data) == info.CRC
        release(data)
        if intact:
            return found
    raise UserError(f"{path} is damaged: {info.filename!r} has other bytes than were written")


class _Reader(pickle.Unpickler):
    """An unpickler of state dicts; the names that it is asked for are looked up here alone."""

    storage: Any  # key -> bytes

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")

        # Made anew for each file: what a pickle does to them ends with its reading.
        class OrderedDict(dict):
            pass

        class Namespace:
            pass

        def rebuild(storage, offset, shape, stride, *_):
            return _tensor(storage, offset, shape, stride)

        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): Namespace,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        }
        # Paths among a run's arguments. Text is what they are made of and all that is kept.
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            self._known["pathlib", name] = lambda *parts: "/".join(map(str, parts))
        self._known |= {("torch", name): dtype for name, dtype in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
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
        found = self.storage(key)
        kind = dtype_of(dtype)
        if not isinstance(count, int) or len(found) != count * kind.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key!r} has {len(found)} bytes, not {count} numbers of {dtype}"
            )
        return found.view(kind) if found.size else np.empty(0, kind)


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
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
    return view


def write(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """{"model": state} as torch.save writes it; `torch.load(path, weights_only=True)` reads it."""

    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def group(values: list[bytes]) -> bytes:
        return b"(" + b"".join(values) + b"t"

    storages = {dtype: name for name, dtype in STORAGES.items()}
    stream = [b"\x80\x02}", text("model"), b"}("]
    for key, (name, x) in enumerate(state.items()):
        kind = f"ctorch\n{storages[x.dtype.name]}\n".encode()
        pid = group([text("storage"), kind, text(str(key)), text("cpu"), number(x.size)])
        steps = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
        arguments = [
            pid + b"Q",
            number(0),
            group([number(n) for n in x.shape]),
            group([number(n) for n in steps]),
            b"\x89",
            b"ccollections\nOrderedDict\n)R",
        ]
        stream += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", group(arguments), b"R"]
    stream.append(b"us.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(stream))
        archive.writestr("archive/byteorder", b"little")
        for key, x in enumerate(state.values()):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(x).data.cast("B"))
        archive.writestr("archive/version", b"3\n")
