"""Write files so that a reader never sees half of one: beside the target, then renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath


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


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a whole file, or leave the old one."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as JSON, or leave the old file."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
