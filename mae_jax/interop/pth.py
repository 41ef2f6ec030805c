"""Read PyTorch's .pth files, without PyTorch and without running anything that is in them.

Such a file is a zip archive: `data.pkl`, a pickle of the structure, and each storage as raw bytes,
uncompressed. The pickle is read by an unpickler that knows few instructions and names, makes
objects without behaviour from them, and refuses every other. What a file can make it do is bounded
by the file's size: no object is copied, hashed or printed as a whole but text and numbers.
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

from mae_jax import files
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
# Trainers put objects of these packages beside the weights: each is read as an `Ignored`.
IGNORED = ("lightning", "lightning_fabric", "pytorch_lightning", "omegaconf", "numpy", "typing")
# Limits far above real models, which have a few hundred KB, 50,000 instructions, 1,000 members.
MAX_PICKLE = 64 * 2**20  # bytes
MAX_INSTRUCTIONS = 2_000_000
MAX_DIRECTORY = 16 * 2**20  # bytes that list the members of the archive
MAX_RANK = 16  # of a tensor
# Instructions of pickles that torch.save never writes, and that make sets or objects.
REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.PERSID, pickle.DUP),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


# From the unpickler in Python, unlike that in C, single instructions can be left out. It is `Any`,
# since the types of the standard library leave out its attributes.
PythonUnpickler: Any = pickle._Unpickler


class Ignored:
    """An object of another program, of which nothing is kept."""

    def __init__(self, *_: Any):
        pass


def read(path: str | os.PathLike) -> Any:
    """Return what a .pth file holds; its tensors are views of the file, read when they are used.

    Raises:
      UserError: it is cut off, damaged or compressed, or asks for anything but tensors.
    """
    try:
        with open(path, "rb", opener=files.open_regular) as file:
            _check_directory(file)
            data = np.memmap(file, np.uint8, "r")
            with zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist()}
        return _Reader(data, members).load()
    except Exception as error:  # damaged bytes can make zipfile and pickle raise anything
        reason = str(error)[:500] or type(error).__name__
        raise UserError(f"{path} is damaged or is not a weight file: {reason}") from error


def _check_directory(file: io.BufferedIOBase) -> None:
    """Refuse an archive whose directory is so long that listing it would fill the memory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16 - 100))
    end = file.read()
    start = end.rfind(b"PK\5\6")
    (length,) = struct.unpack("<I", end[start + 12 : start + 16]) if start >= 0 else (0,)
    if (start := end.rfind(b"PK\6\6")) >= 0:  # a large archive says it here
        (length,) = struct.unpack("<Q", end[start + 40 : start + 48])
    if length > MAX_DIRECTORY:
        raise pickle.UnpicklingError(f"its directory is longer than {MAX_DIRECTORY >> 20} MiB")
    file.seek(0)


class _Reader(PythonUnpickler):
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
        self._executed = 0

        # New classes for each file: what a pickle does to them ends with its reading.
        class OrderedDict(dict):
            def __init__(self, items: Any = ()):
                for item in items:
                    _set(self, list(item))

        class Namespace:
            pass

        self._state_of = (OrderedDict, Namespace)
        self._allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): Namespace,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _tensor(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "Size"): tuple,
        }
        for name in PATHS:  # among a run's arguments; they become text
            self._allowed["pathlib", name] = _path
        self._allowed |= {("torch", name): dtype for name, dtype in STORAGES.items()}
        self.dispatch = {
            code: self._counted(method)
            for code, method in PythonUnpickler.dispatch.items()
            if bytes([code]) not in REFUSED
        }
        for code, method in (
            (pickle.SETITEM, _Reader.load_setitem),
            (pickle.SETITEMS, _Reader.load_setitems),
            (pickle.DICT, _Reader.load_dict),
            (pickle.BUILD, _Reader.load_build),
        ):
            self.dispatch[code[0]] = self._counted(method)

    def _counted(self, method: Any) -> Any:
        def execute(reader: Any) -> None:
            self._executed += 1
            if self._executed > MAX_INSTRUCTIONS:
                raise pickle.UnpicklingError(f"it has over {MAX_INSTRUCTIONS:,} instructions")
            method(reader)

        return execute

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if module.partition(".")[0] in IGNORED:
            return Ignored
        raise pickle.UnpicklingError(
            f"it asks for {module[:100]}.{name[:100]}. Only tensors, dicts, numbers, text and the"
            " arguments of a run are read; nothing in a file is run"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid
        if kind != "storage" or dtype not in STORAGES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError("it has an object of an unknown kind")
        content = self._bytes(f"{self._root}data/{key}")
        number = np.dtype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
        if not isinstance(count, int) or len(content) != count * number.itemsize:
            raise pickle.UnpicklingError(f"storage {key!r} has another size than it says")
        return content.view(number) if content.size else np.empty(0, number)

    # A key that is a tuple of tuples could take for ever to hash, or crash the interpreter.
    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        content: dict = {}
        _set(content, items)
        self.append(content)

    def load_build(self) -> None:
        """Give an object its attributes, if it is one that may have some."""
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, self._state_of) and isinstance(state, dict):
            _set(vars(instance), [x for item in state.items() for x in item])

    def _bytes(self, name: str) -> np.ndarray:
        """Return the stored bytes of a member, after a check of its CRC."""
        info = self._members.get(name)
        if info is None:
            raise pickle.UnpicklingError(f"it has no {name[:100]!r}")
        start = info.header_offset
        header = self._data[start : start + 30].tobytes()
        if len(header) == 30 and header[:4] == b"PK\3\4":
            length, extra = struct.unpack("<HH", header[26:30])
            start += 30 + length + extra
            content = self._data[start : start + info.file_size]
            if len(content) == info.file_size and zlib.crc32(content.data) == info.CRC:
                return content
        raise pickle.UnpicklingError(f"{name[:100]!r} has other bytes than were written")


def _set(content: Any, items: list[Any]) -> None:
    if not isinstance(content, dict) or len(items) % 2:
        if isinstance(content, Ignored):
            return
        raise pickle.UnpicklingError("it sets an item of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float):
            raise pickle.UnpicklingError(f"it has a key that is a {type(key).__name__}, not text")
        content[key] = value


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise pickle.UnpicklingError("it has a path that is no text")
    return "/".join(parts)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> np.ndarray:
    ranks = {len(x) if isinstance(x, tuple) else -1 for x in (shape, stride)}
    if not isinstance(storage, np.ndarray) or len(ranks) != 1 or not 0 <= min(ranks) <= MAX_RANK:
        raise pickle.UnpicklingError("a tensor is not made of a storage and sizes")
    if not all(isinstance(x, int) and 0 <= x < 2**62 for x in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor is not made of a storage and sizes")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if count and (last >= len(storage) or count > len(storage)):
        raise pickle.UnpicklingError(
            f"a tensor of shape {tuple(shape)} does not fit its storage of {len(storage)} numbers"
        )
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
