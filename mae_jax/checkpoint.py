"""What outlives a process: the workdir and its checkpoints.

A checkpoint is one directory, WORKDIR/checkpoints/STEP, written by Orbax in the background. It has
the whole state and `digests.json`, the size and SHA-256 of each of its files: made when the files
are complete and before the directory gets its final name, so that no checkpoint lacks them, and
compared before one is read, because Orbax itself restores a flipped byte silently.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_jax import distributed

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
DIGESTS = "digests.json"
SHOWN = 20  # differences in an error message


class _Manager(ocp.CheckpointManager):
    """Orbax's, which never asks whether the run is to stop, and tells of a save that `failed`.

    It would ask with a step, also from its own thread when that step's save has ended: an older one
    than the training loop's, and all hosts would agree to stop at one that the loop has passed. Of
    a save that failed on this host alone it would tell nobody: each host would wait for the others.
    """

    failed: Callable[[Exception], None]

    def reached_preemption(self, step: int) -> bool:
        return False

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failed(error)
            raise


def _writer() -> ocp.PyTreeCheckpointHandler:
    """Writes each array from its first replica.

    Orbax's own way divides an array among its replicas: a slice to compile for each array and
    device, while training waits for the first save of every start.
    """
    kinds = ocp.type_handlers
    registry = kinds.create_type_handler_registry(
        (int, kinds.ScalarHandler()),
        (float, kinds.ScalarHandler()),
        (np.ndarray, kinds.NumpyHandler()),
        (jax.Array, kinds.ArrayHandler(use_replica_parallel=False)),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Checkpointer:
    """The checkpoints of one run, for all hosts to use alike.

    Saves go on in the background; what went wrong there is raised, as an OSError, by the next call
    of `save`, `check`, `wait` or `close`.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        """Opens WORKDIR/checkpoints, and clears what an interrupted save left there.

        Args:
          workdir: a local path, or a bucket such as gs://BUCKET/RUN.
          keep: how many of the newest stay; at least 1.
          keep_every: those of steps that are multiples of this stay for ever; 0: none.

        Raises:
          ValueError: keep or keep_every is out of range.
        """
        if keep < 1 or keep_every < 0:
            raise ValueError(
                f"config.checkpoint.keep={keep} must be at least 1, and"
                f" config.checkpoint.keep_every={keep_every} steps at least 0"
            )
        self.root = _absolute(workdir) / "checkpoints"
        self._writing = 0
        self._bytes = 0
        for left in self._unfinished():
            _say(f"checkpoint {left.name.split('.')[0]}: its save was interrupted; removed")
        policies = ocp.checkpoint_managers
        preserved: list = [policies.LatestN(keep)]
        if keep_every:
            preserved.append(policies.EveryNSteps(keep_every))
        self._manager = _Manager(
            self.root,
            # Named, so that an empty step directory does not change how the others are read.
            item_handlers={"state": _writer()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserved),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # a damaged old checkpoint must not get in the way
                async_options=ocp.AsyncOptions(
                    timeout_secs=3600, post_finalization_callback=self._write_digests
                ),
            ),
        )
        self._manager.failed = self._failed

    def save(self, step: int, state: Any) -> None:
        """Starts writing; returns when the state is copied, or safe from the next update.

        Raises:
          ValueError: there is a checkpoint of this step.
          OSError: it, or the save before it, could not be written; the older ones are intact.
        """
        self.wait()
        if step in self.all_steps():
            raise ValueError(f"there is a checkpoint {self.root}/{step} already")
        self._writing = step
        self._bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        with self._explained():
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), force=True
            )

    def check(self) -> None:
        """Raises what went wrong in the background; never waits."""
        # Not the manager's check_for_errors: it takes the error away from the thread that, when it
        # sees none, goes on to delete older checkpoints.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Closes, also after an error: the save that goes on is not lost.

        Of several hosts others may not come to it, and this one is about to end.
        """
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(OSError):
                self.close()
        else:
            self._manager.failed = lambda error: None

    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, rising."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint."""
        return self._manager.latest_step()

    def restore(self, target: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that is intact, as (step, state); None if there never was one.

        Newer ones that are damaged are moved to WORKDIR/damaged-STEP, and a line says so.

        Raises:
          ValueError: the checkpoint is another config's; or there are some and none is intact.
        """
        steps = self.all_steps()[::-1]
        if not steps:
            return None
        chosen = newest_intact([self.root / str(step) for step in steps])
        state = restore(self.root / str(steps[chosen]), target)
        if chosen:
            if jax.process_index() == 0:
                for step in steps[:chosen]:
                    aside = self.root.parent / f"damaged-{step}"
                    if aside.exists():
                        aside.rmtree()
                    (self.root / str(step)).rename(aside)
                    _say(f"checkpoint {step} was moved to {aside}")
            multihost_utils.sync_global_devices("damaged checkpoints moved")
            self._manager.reload()
        return steps[chosen], state

    def _unfinished(self) -> list[epath.Path]:
        return list(self.root.glob("*.orbax-checkpoint-tmp*"))

    def _write_digests(self) -> None:
        """Called by Orbax, on one host, when all files of a save are written."""
        name = str(self._writing)
        for directory in [*self._unfinished(), self.root / name]:
            if directory.name.split(".")[0] == name and directory.exists():
                _write_json(directory / DIGESTS, digests(directory))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise OSError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        # Free what the failed save took before telling how much is free.
        for left in self._unfinished() if jax.process_index() == 0 else ():
            with contextlib.suppress(OSError):  # somebody still writes to it
                left.rmtree(missing_ok=True)
        room = ""
        with contextlib.suppress(OSError):  # in a bucket, or the directory is gone
            free = shutil.disk_usage(self.root).free
            room = f"; it takes up to {_size(self._bytes)}, and {_size(free)} are free there"
        older = ", ".join(path.name for path in _numbered(self.root)) or "none"
        reason = (str(error).strip() or repr(error)).splitlines()[0].rpartition(": ")[2]
        return (
            f"checkpoint {self._writing} could not be written to {self.root}: {reason}{room}."
            f" Earlier checkpoints, intact: {older}"
        )

    def _failed(self, error: Exception) -> None:
        """Called in the background. One of several hosts ends: the others wait for it in Orbax."""
        if distributed.alone_with(error):
            print(f"host {jax.process_index()}: {self._explain(error)}", file=sys.stderr)
            distributed.leave(1)


def restore_or_init(
    checkpointer: Checkpointer,
    config: ConfigDict,
    target: Any,
    init: Callable[[], Any],
    load: Callable[[epath.Path, Any], Any] | None = None,
) -> tuple[Any, str]:
    """The state to start from, and a line that says which.

    From, in this order: the workdir's own checkpoints; `config.resume`, the whole state of another
    run; `config.init_from`, only the parameters of one, or what `load` takes of it; `init`.

    Args:
      target: shapes and shardings of a TrainState, on any mesh.
      init: () -> a state in its shards.
      load: (path of a checkpoint, a fresh state) -> the state to start from.

    Raises:
      ValueError: a checkpoint does not fit the config; one was asked for and is not there.
    """
    own = checkpointer.restore(target)
    if own is not None:
        step, state = own
        return state, f"resumed at step {step} from {checkpointer.root}/{step}"
    if config.resume:
        path = find(config.resume, "resume")
        state = restore(path, target)
        return state, f"resumed at step {int(state.step)} from {path} (config.resume)"
    if config.init_from:
        path = find(config.init_from, "init_from")
        if load is not None:
            return load(path, init()), f"step 0, encoder of {path} (config.init_from)"
        params = restore(path, {"params": target.params})["params"]
        return init().replace(params=params), f"step 0, parameters of {path} (config.init_from)"
    return init(), "from scratch"


def find(path: str | os.PathLike, key: str) -> epath.Path:
    """The newest intact checkpoint of a run (its workdir), or the one that is named.

    Raises:
      ValueError: there is none; `config.KEY` and what was looked for are named.
    """
    base = _absolute(path)
    if (base / "state").is_dir():
        found = [base]
    else:
        found = _numbered(base / "checkpoints") or _numbered(base)
    if not found:
        other = base.exists() and (not base.is_dir() or (base / "config.json").exists())
        raise ValueError(
            f"config.{key}={str(path)!r} holds no checkpoint: looked for {base}/checkpoints/STEP,"
            f" {base}/STEP and {base}/state"
            + f". Weights of PyTorch are converted first: mae-jax convert {path} DIR --to=ours"
            * other
        )
    return found[newest_intact(found)]


def newest_intact(checkpoints: list[epath.Path]) -> int:
    """The position of the first intact one; process 0 looks, and decides for all.

    Raises:
      ValueError: none is.
    """
    reasons = []
    for path in checkpoints if jax.process_index() == 0 else ():
        reason = damage(path)
        if reason is None:
            break
        reasons.append(f"checkpoint {path.name} is damaged: {reason}")
    chosen = int(multihost_utils.broadcast_one_to_all(np.int32(len(reasons))))
    if chosen == len(checkpoints):
        raise ValueError(
            f"no checkpoint in {checkpoints[0].parent} is intact: {'; '.join(reasons)}. Bring them"
            " back from a copy, or delete them to start again"
        )
    for reason in reasons:
        _say(f"{reason}; using checkpoint {checkpoints[chosen].name} instead")
    return chosen


def digests(checkpoint: epath.Path) -> dict[str, dict]:
    """The size in bytes and SHA-256 of every file of the state, by its path in the checkpoint."""

    def read(file: epath.Path) -> dict:
        with file.open("rb") as opened:
            return {
                "bytes": file.stat().length,
                "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),  # type: ignore[arg-type]
            }

    files = _files(checkpoint / "state")
    with ThreadPoolExecutor(8) as threads:
        return {
            str(file.relative_to(checkpoint)): entry
            for file, entry in zip(files, threads.map(read, files), strict=True)
        }


def damage(checkpoint: epath.Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None: they are those that were written."""
    try:
        expected = json.loads((checkpoint / DIGESTS).read_text())
    except FileNotFoundError:
        return f"it has no {DIGESTS}"
    except ValueError:
        return f"{DIGESTS} cannot be read"
    found = digests(checkpoint)
    for name, entry in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] != entry.get("bytes"):
            return f"{name} has {found[name]['bytes']} of {entry.get('bytes')} bytes"
        if found[name] != entry:
            return f"{name} has other contents than were written"
    return None


def shapes(checkpoint: str | os.PathLike, part: tuple[str, ...] = ()) -> dict[str, Any]:
    """Shape and type of the arrays of a checkpoint, or of the part that keys lead to; {} = none."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(_absolute(checkpoint) / "state").tree
    for key in part:
        saved = saved.get(key) or {}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)


def restore(checkpoint: str | os.PathLike, target: Any, part: tuple[str, ...] = ()) -> Any:
    """The arrays of a checkpoint that are in `target`, in its shardings.

    Args:
      target: shapes with shardings: a TrainState, or {"params": ...} for a part.
      part: keys that lead to what `target` is, such as ("params", "encoder"); what stands beside
        it in the checkpoint is not looked at.

    Raises:
      ValueError: an array is on one side only or has another shape or type; the first are named.
    """
    path = _absolute(checkpoint) / "state"
    # The bare handler: a Checkpointer would look for, and miss, metadata that belong to the step.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(path).tree
        for key in part:
            saved = saved.get(key) or {}
        for key in reversed(part):
            saved, target = {key: saved}, {key: target}
        if isinstance(target, dict):
            saved = {key: saved.get(key, {}) for key in target}
        there, wanted = _described(saved), _described(target)
        differing = [
            f"{name}: {there.get(name, 'none')} in the checkpoint,"
            f" {wanted.get(name, 'none')} by this config"
            for name in [*wanted, *(name for name in there if name not in wanted)]
            if there.get(name) != wanted.get(name)
        ]
        if differing:
            raise ValueError(
                f"{checkpoint} does not fit this config, {len(differing)} arrays differ:\n  "
                + "\n  ".join(differing[:SHOWN] + ["..."] * (len(differing) > SHOWN))
                + "\nThe config that it was made with is config.json in its workdir."
            )
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        found = reader.restore(
            path, args=ocp.args.PyTreeRestore(target, arguments, partial_restore=True)
        )
        for key in part:
            found = found[key]
        return found


def check_workdir(
    workdir: str | os.PathLike, config: ConfigDict, examples: int | None = None
) -> None:
    """Makes the workdir, and refuses that of another run.

    Args:
      examples: how many the dataset has; None = not known.

    Raises:
      ValueError: it cannot be written to, is not one folder for all hosts, or was made with a
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
            raise ValueError(
                f"{workdir} was made with another config:\n  "
                + "\n  ".join(refused)
                + "\nGive the old values, or another --workdir; deleting this one starts it again."
            )
    known = _read_json(root / "env.json").get("examples")
    if known and examples and known != examples:
        raise ValueError(
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
        raise ValueError(f"--workdir={root} cannot be written to{reason}")
    seen = np.atleast_1d(multihost_utils.process_allgather(np.int32(probe.exists())))
    if jax.process_index() == 0:
        probe.unlink()
    if not seen.all():
        raise ValueError(
            f"--workdir={root} is not one folder for all hosts: hosts"
            f" {np.flatnonzero(seen == 0).tolist()} do not see there what host 0 writes. Give a"
            " bucket, or a folder of a disk that all share"
        )


def prepare_workdir(
    workdir: str | os.PathLike, config: ConfigDict, examples: int | None = None
) -> None:
    """Writes config.json and env.json, and prints what changed in the environment.

    Raises:
      ValueError: see `check_workdir`.
    """
    check_workdir(workdir, config, examples)
    root = epath.Path(workdir)
    old_env, new_env = _read_json(root / "env.json"), environment()
    old_env.pop("examples", None)  # which is checked
    changed = _changes(old_env, new_env) if old_env else {}
    if changed:
        _say(
            f"warning: {workdir} was last used in another environment, results may differ by"
            f" rounding: {', '.join(changed.values())}"
        )
    multihost_utils.sync_global_devices("workdir read")
    if jax.process_index() == 0:
        _write_json(root / "config.json", json.loads(config.to_json()))
        _write_json(root / "env.json", new_env | {"examples": examples})


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


def _described(tree: Any) -> dict[str, str]:
    """Path -> type and shape of the arrays of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype)}{[*x.shape]}"
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


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


def _absolute(path: str | os.PathLike) -> epath.Path:
    """As Orbax wants it; the name of a bucket's object already is."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def _files(directory: epath.Path) -> list[epath.Path]:
    inside = sorted(directory.iterdir()) if directory.exists() else []
    return [file for path in inside for file in (_files(path) if path.is_dir() else [path])]


def _numbered(directory: epath.Path) -> list[epath.Path]:
    """The checkpoints in a directory, newest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((p for p in found if p.name.isdigit()), key=lambda p: -int(p.name))


def _read_json(file: epath.Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def _write_json(file: epath.Path, content: dict) -> None:
    """All of it or nothing: a reader never sees half a file."""
    part = file.parent / f"{file.name}.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
