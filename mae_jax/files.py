"""Write files so that a reader never sees half of one, and read regular files only."""

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from etils import epath

from mae_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[epath.Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the body succeeds.

    The body writes a file there, or a folder, whose final name must be free. After an exception the
    temporary file or folder is removed and `path` is what it was.
    """
    target = epath.Path(path)
    part = target.parent / f"{target.name}.part-{os.getpid()}"
    try:
        yield part
        part.replace(target)
    finally:
        if part.is_dir():
            part.rmtree()
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[bool]:
    """Lock a folder while the body runs; yield False if another process has locked it.

    The lock is of the folder itself and ends with the process. Buckets and some disks have none.
    """
    if "://" in os.fspath(folder):
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = True
    except BlockingIOError:
        is_free = False
    except OSError:  # this disk has no locks
        is_free = True
    try:
        yield is_free
    finally:
        os.close(descriptor)


def require_place(path: str | os.PathLike, what: str) -> None:
    """Check that files can be written below a path: a folder of a disk, or a gs:// bucket.

    Args:
      what: the flag or key that names it, such as --workdir, for the message.

    Raises:
      UserError: it is a URL of another kind, or the package for buckets is missing.
    """
    _require_whole(path, what)
    scheme, is_url, rest = os.fspath(path).partition("://")
    if not is_url:
        return
    if scheme == "file":
        raise UserError(f"{what}={path}: write the path itself, /{rest.lstrip('/')}")
    if scheme != "gs":
        raise UserError(
            f"{what}={path}: {scheme}:// is not supported: give a local folder, a bucket"
            " gs://BUCKET/FOLDER, or mount it as a folder"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{what}={path}: buckets need gcsfs: pip install gcsfs")


def require_local(path: str | os.PathLike, what: str) -> None:
    """Raise UserError if a path is a URL where only local files are read or written."""
    _require_whole(path, what)
    if "://" in os.fspath(path):
        raise UserError(f"{what}={path}: only local files can be used here: copy to or from there")


def _require_whole(path: str | os.PathLike, what: str) -> None:
    """Raise UserError if a URL has lost one of its slashes, or a path begins with ~.

    A pathlib.Path takes the slash. After `=` a shell does not expand ~, which would be a folder.
    """
    if os.fspath(path).startswith("~"):
        raise UserError(f"{what}={path}: write {os.path.expanduser(path)}")
    if lost := re.match(r"(gs|s3|az|file|https?|hdfs):/(?!/)(.*)", os.fspath(path)):
        scheme, rest = lost.groups()
        raise UserError(f"{what}={path}: a slash is missing: {scheme}://{rest}")


def open_regular(path: str | os.PathLike, flags: int) -> int:
    """Open a file as `open` asks an opener to; refuse pipes and devices, which may never end.

    Raises:
      OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # of a pipe, without waiting for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a pipe, a device or a folder, not a file")
    return descriptor


def read_regular(path: str | os.PathLike) -> bytes:
    """Return what a file holds, in half the time that `open` and `read` take for a small one.

    Raises:
      OSError: see `open_regular`.
    """
    descriptor = open_regular(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, parts = os.fstat(descriptor).st_size + 1, []
        while part := os.read(descriptor, size):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Return what a file of a user holds.

    Raises:
      UserError: it cannot be read, or is no regular file.
    """
    try:
        return read_regular(path)
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read: {error.strerror or error}") from None


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a whole file, or leave the old one."""
    if "://" in os.fspath(path):  # an object of a bucket appears whole; renaming would copy it
        epath.Path(path).write_bytes(content)
        return
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as JSON, or leave the old file."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a JSON file of ours holds; {} if there is no such file.

    Raises:
      UserError: it is damaged.
    """
    file = epath.Path(path)
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: restore it from a copy, or start in another folder")
    return content
