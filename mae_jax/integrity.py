"""Refuse damaged checkpoints, by digests of their files, and those of another network.

Orbax restores a flipped byte silently. A checkpoint gets its `digests.json` when its files are
complete and before its directory gets the final name, so that none lacks it; `newest_intact`
compares the files with it before anything is restored.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mae_jax import files
from mae_jax.distributed import log_once
from mae_jax.errors import UserError

DIGESTS = "digests.json"
MAX_DIFFERENCES = 20  # in an error message


def digests(checkpoint: epath.Path) -> dict[str, dict]:
    """Return {path in the checkpoint: {"bytes": ..., "sha256": ...}} of the files of the state."""

    def digest(file: epath.Path) -> dict:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]
        return {"bytes": file.stat().length, "sha256": content}

    paths = _files(checkpoint / "state")
    names = [str(path.relative_to(checkpoint)) for path in paths]
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(names, threads.map(digest, paths), strict=True))


def write_digests(checkpoint: epath.Path) -> None:
    """Write digests.json of a checkpoint whose files are complete."""
    files.write_json(checkpoint / DIGESTS, digests(checkpoint))


def damage(checkpoint: epath.Path) -> str | None:
    """Return why a checkpoint fails its digests, or None if it is intact."""
    try:
        expected = json.loads((checkpoint / DIGESTS).read_text())
    except FileNotFoundError:
        return f"it has no {DIGESTS}"
    except ValueError:
        expected = None
    if not isinstance(expected, dict) or not expected:
        return f"{DIGESTS} cannot be read"
    actual = digests(checkpoint)
    for name, entry in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != entry:
            sizes = f"{actual[name]['bytes']} of {entry.get('bytes')} bytes"
            return f"{name} has {sizes}, with other contents than were written"
    return None


def newest_intact(checkpoints: list[epath.Path]) -> int:
    """Return the index of the first intact checkpoint; process 0 compares, for all hosts.

    Args:
      checkpoints: newest first.

    Raises:
      UserError: no checkpoint is intact.
    """
    reasons = []
    for path in checkpoints if jax.process_index() == 0 else ():
        reason = damage(path)
        if reason is None:
            break
        reasons.append(f"checkpoint {path.name} is damaged: {reason}")
    chosen = int(multihost_utils.broadcast_one_to_all(np.int32(len(reasons))))
    if chosen == len(checkpoints):
        raise UserError(
            f"no checkpoint in {checkpoints[0].parent} is intact: {'; '.join(reasons)}. Restore"
            " them from a copy, or delete them to start again"
        )
    for reason in reasons:
        log_once(f"{reason}; using checkpoint {checkpoints[chosen].name} instead")
    return chosen


def require_equal(checkpoint: str | os.PathLike, saved: Any, target: Any) -> None:
    """Refuse a checkpoint whose arrays differ from those of `target` in name, shape or type.

    Args:
      saved, target: trees of jax.ShapeDtypeStruct.
    """
    present, wanted = _described(saved), _described(target)
    differing = [
        f"{name}: {present.get(name, 'none')} in the checkpoint,"
        f" {wanted.get(name, 'none')} by this config"
        for name in wanted | present
        if present.get(name) != wanted.get(name)
    ]
    if differing:
        shown = "\n  ".join(differing[:MAX_DIFFERENCES])
        raise UserError(
            f"{checkpoint} does not fit this config, {len(differing)} arrays differ, such as:\n"
            f"  {shown}\nThe config that it was made with is config.json in its workdir."
        )


def _described(tree: Any) -> dict[str, str]:
    """Return {path: type and shape} of the arrays of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype)}{[*x.shape]}"
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _files(directory: epath.Path) -> list[epath.Path]:
    inside = sorted(directory.iterdir()) if directory.exists() else []
    return [file for path in inside for file in (_files(path) if path.is_dir() else [path])]
