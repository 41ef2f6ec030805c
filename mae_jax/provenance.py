"""Record in a workdir which config and environment it belongs to, and refuse it to other runs."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_jax import files
from mae_jax.config import OPTIONAL_KEYS, REMOVED_KEYS, RENAMED_KEYS
from mae_jax.distributed import log_once
from mae_jax.errors import UserError

# A run may resume with other values of these keys: they change when and where a run computes,
# shows and keeps things, and what it computes by no more than rounding.
FREE_KEYS = (
    "checkpoint",
    "evals",
    "hosts",
    "log_every",
    "mesh",
    "data.data_dir",
    "data.max_bad_fraction",
    "data.workers",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
)
# Old workdirs must resume with newer code. Whoever adds a key to a recipe adds it here, with the
# value that does what the code did before: a config without the key counts as having that value.
# A key that is renamed or removed is added to mae_jax/config.py.
ADDED_KEYS: dict[str, Any] = OPTIONAL_KEYS | {
    "data.resizer": "pillow",
    "data.synthetic": False,
}
FOLDERS = ("checkpoints", "logs", "images", "tensorboard", "profile")  # of a workdir
UNFINISHED = "unfinished.json"  # of a run that was asked to stop during an evaluation
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def check_workdir(
    workdir: str | os.PathLike, config: ConfigDict, examples: int | None = None
) -> None:
    """Make the workdir, and refuse the workdir of another run.

    Args:
      examples: number of examples of the dataset; None if it is not known.

    Raises:
      UserError: the workdir cannot be written to, is not one folder for all hosts, or was made
        with a config that differs in more than FREE_KEYS or with another number of examples.
    """
    root = epath.Path(workdir)
    _require_shared(root)
    old, new = files.read_json(root / "config.json"), json.loads(config.to_json())
    differences = config_differences(old, new)
    if differences:
        raise UserError(
            f"{workdir} was made with another config:\n  "
            + "\n  ".join(differences)
            + "\nGive the old values to resume it. To go on from its state with the new values,"
            f" give another --workdir and --config.resume={workdir}. To start again, delete it."
        )
    old_examples = files.read_json(root / "env.json").get("examples")
    if old_examples and examples and old_examples != examples:
        raise UserError(
            f"{workdir} was made with a dataset of {old_examples:,} examples, which has"
            f" {examples:,} now: epochs, order and rates would differ. Give the old data or another"
            f" --workdir, with --config.init_from={workdir} if it is to start from this one"
        )


@contextlib.contextmanager
def nothing_left_if_refused(workdir: str | os.PathLike) -> Iterator[None]:
    """Remove the folders that the body makes for a run, should it refuse the run.

    Only empty folders that were not there before go, on local disks; buckets have no folders.
    """
    folder = Path(os.path.abspath(workdir))
    new = [path for path in (folder / "checkpoints", folder, *folder.parents) if not path.exists()]
    try:
        yield
    except UserError:
        for path in new if jax.process_index() == 0 and "://" not in str(workdir) else ():
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def only_run(workdir: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a workdir while the body runs, where its disk has locks.

    Raises:
      UserError: on all hosts; another run is going on there.
    """
    first = jax.process_index() == 0
    with files.locked(workdir) if first else contextlib.nullcontext(True) as is_free:
        if not multihost_utils.broadcast_one_to_all(np.int32(is_free)):
            raise UserError(
                f"another run is going on in {workdir}: wait until it ends or stop it, and the same"
                " command goes on from there; or give another --workdir"
            )
        yield


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each key whose value keeps a run of the config `old` from resuming.

    Args:
      old: content of a config.json, of any version of this code; {} for none.
      new: the config of today.
    """
    if not old:
        return []
    after = flatten_dict(new, sep=".")
    before = flatten_dict(old, sep=".")
    before = {RENAMED_KEYS.get(key, key): value for key, value in before.items()}
    absent = json.loads(json.dumps(ADDED_KEYS))  # with lists for tuples, as config.json has them
    absent = {key: value for key, value in absent.items() if key in before or key in after}
    before, after = absent | before, absent | after
    return [
        text
        for key, text in _changes(before, after).items()
        if not any(f"{key}.".startswith(f"{free}.") for free in (*FREE_KEYS, *REMOVED_KEYS))
    ]


def _require_shared(root: epath.Path) -> None:
    """Make a folder, and refuse it on all hosts unless each sees what host 0 writes."""
    number = int(multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31)))
    probe, reason = root / f".seen_by_all_hosts-{number}", ""
    if jax.process_index() == 0:
        try:
            for path in (root, *(root / name for name in FOLDERS)):
                if path.exists() and not path.is_dir():
                    raise OSError(f"{path} is a file where a folder is needed: move it away")
            root.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        except OSError as error:
            reason = f": {error.strerror or error}"
            if "://" in os.fspath(root):
                reason = f": is there such a bucket, and may you write to it? ({error})"
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
    """Check a workdir, write its config.json and env.json, and print what changed around it."""
    check_workdir(workdir, config, examples)
    root = epath.Path(workdir)
    new_env = versions() | {
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "examples": examples,
    }
    old_env = files.read_json(root / "env.json")
    changed = _changes(old_env, new_env)
    changed.pop("examples", None)  # checked above
    if old_env and changed:
        log_once(
            f"warning: {workdir} was last used in another environment, results may differ by"
            f" rounding: {', '.join(changed.values())}"
        )
    multihost_utils.sync_global_devices("workdir read")
    if jax.process_index() == 0:
        files.write_json(root / "config.json", json.loads(config.to_json()))
        files.write_json(root / "env.json", new_env)


def versions() -> dict[str, Any]:
    """Return the versions of Python and the packages, and the commit of a checkout."""
    checkout = Path(__file__).parents[1]
    installed: dict[str, Any] = {"python": platform.python_version()}
    for package in ("mae-jax", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            installed["commit"] = output.strip()
    return installed


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Return {key: 'key: old -> new'} where two flat dicts differ."""
    return {
        key: f"{key}: {before.get(key, 'none')!r} -> {after.get(key, 'none')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def note_unfinished(workdir: epath.Path, step: int, names: list[str]) -> None:
    """Write down which evaluators a stop has kept from measuring the state of a step."""
    note = workdir / UNFINISHED
    if jax.process_index() == 0:
        note.unlink(missing_ok=True)
        if names:
            files.write_json(note, {"step": step, "evaluations": names})


def unfinished(workdir: str | os.PathLike, step: int) -> list[str]:
    """Return the evaluators that a stop has kept from measuring the state of a step."""
    noted = files.read_json(epath.Path(workdir) / UNFINISHED)
    return noted["evaluations"] if noted.get("step") == step else []
