"""What a workdir says of its run: config.json and env.json; and that no other run uses it."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_jax.distributed import log_once
from mae_jax.errors import UserError

# A run may go on with other values of these: they change when and where things are computed, shown
# and kept, and never what is computed, but for rounding.
FREE_KEYS = (
    "checkpoint",
    "evals",
    "log_every",
    "mesh",
    "connect_seconds",
    "heartbeat_seconds",
    "stall_seconds",
    "data.data_dir",
    "data.max_bad_fraction",
    "data.prefetch",
    "data.threads",
    "data.workers",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def check_workdir(
    workdir: str | os.PathLike, config: ConfigDict, examples: int | None = None
) -> None:
    """Makes the workdir, and refuses that of another run.

    Args:
      examples: how many the dataset has; None = not known.

    Raises:
      UserError: it cannot be written to, is not one folder for all hosts, or was made with a
        config that differs in more than FREE_KEYS, or with another number of examples.
    """
    root = epath.Path(workdir)
    _require_shared(root)
    if old_config := _read_json(root / "config.json"):
        changed = _changes(old_config, json.loads(config.to_json()))
        refused = [
            text
            for key, text in changed.items()
            if not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
        ]
        if refused:
            raise UserError(
                f"{workdir} was made with another config:\n  "
                + "\n  ".join(refused)
                + "\nGive the old values, or another --workdir; deleting this one starts it again."
            )
    known = _read_json(root / "env.json").get("examples")
    if known and examples and known != examples:
        raise UserError(
            f"{workdir} was made with a dataset of {known:,} examples, which has {examples:,} now:"
            " epochs, order and rates would differ. Give the old data or another --workdir, with"
            " config.init_from if it is to start from this one"
        )


def _require_shared(root: epath.Path) -> None:
    """Makes a folder, in which every host must see what host 0 writes; all refuse alike."""
    number = int(multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31)))
    probe, reason = root / f".seen_by_all_hosts-{number}", ""
    if jax.process_index() == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        except OSError as error:
            reason = f" ({error})"
    if multihost_utils.broadcast_one_to_all(np.int32(len(reason))):
        raise UserError(f"--workdir={root} cannot be written to{reason}")
    seen = np.atleast_1d(multihost_utils.process_allgather(np.int32(probe.exists())))
    if jax.process_index() == 0:
        probe.unlink()
    if not seen.all():
        raise UserError(
            f"--workdir={root} is not one folder for all hosts: hosts"
            f" {np.flatnonzero(seen == 0).tolist()} do not see there what host 0 writes. Give a"
            " bucket, or a folder of a disk that all share"
        )


def prepare_workdir(
    workdir: str | os.PathLike, config: ConfigDict, examples: int | None = None
) -> None:
    """Writes config.json and env.json, and prints what changed in the environment.

    Raises:
      UserError: see `check_workdir`.
    """
    check_workdir(workdir, config, examples)
    root = epath.Path(workdir)
    old_env, new_env = _read_json(root / "env.json"), environment()
    old_env.pop("examples", None)  # which is checked
    changed = _changes(old_env, new_env) if old_env else {}
    if changed:
        log_once(
            f"warning: {workdir} was last used in another environment, results may differ by"
            f" rounding: {', '.join(changed.values())}"
        )
    multihost_utils.sync_global_devices("workdir read")
    if jax.process_index() == 0:
        write_json(root / "config.json", json.loads(config.to_json()))
        write_json(root / "env.json", new_env | {"examples": examples})


def environment() -> dict[str, Any]:
    """Versions and devices."""
    return versions() | {
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def versions() -> dict[str, Any]:
    """Of the packages, and the commit when this is a checkout."""
    here = Path(__file__).parents[1]
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("mae-jax", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if (here / ".git").exists():
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            told = subprocess.run(command, capture_output=True, text=True, check=True)
            found["commit"] = told.stdout.strip()
    return found


def flat(tree: dict) -> dict[str, Any]:
    """Nested dicts as one, with keys such as 'optim.blr'."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, lambda x: not isinstance(x, dict))[0]
    return {jax.tree_util.keystr(p, simple=True, separator="."): value for p, value in leaves}


def _changes(old: dict, new: dict) -> dict[str, str]:
    """Key -> 'key: old -> new' where two nested dicts differ."""
    before, after = flat(old), flat(new)
    return {
        key: f"{key}: {before.get(key, 'none')!r} -> {after.get(key, 'none')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _read_json(file: epath.Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def write_json(file: epath.Path, content: dict) -> None:
    """All of it or nothing: a reader never sees half a file."""
    part = file.parent / f"{file.name}.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)
