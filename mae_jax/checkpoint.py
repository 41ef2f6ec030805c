"""What outlives a process: the checkpoints of a workdir.

A checkpoint is one directory, WORKDIR/checkpoints/STEP, written by Orbax in the background. It has
the whole state and `digests.json`, the size and SHA-256 of each of its files: made when the files
are complete and before the directory gets its final name, so that no checkpoint lacks them, and
compared before one is read, because Orbax itself restores a flipped byte silently.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_jax import distributed
from mae_jax.distributed import log_once
from mae_jax.errors import UserError
from mae_jax.provenance import write_json

DIGESTS = "digests.json"
PARAMS, AVERAGED = ("params",), ("extra", "ema")  # keys that lead to a classifier's weights
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
          UserError: keep or keep_every is out of range.
        """
        if keep < 1 or keep_every < 0:
            raise UserError(
                f"config.checkpoint.keep={keep} must be at least 1, and"
                f" config.checkpoint.keep_every={keep_every} steps at least 0"
            )
        self.root = _absolute(workdir) / "checkpoints"
        self._writing = 0
        self._bytes = 0
        for left in self._unfinished():
            log_once(f"checkpoint {left.name.split('.')[0]}: its save was interrupted; removed")
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
          UserError: there is a checkpoint of this step.
          OSError: it, or the save before it, could not be written; the older ones are intact.
        """
        self.wait()
        if step in self.all_steps():
            raise UserError(f"there is a checkpoint {self.root}/{step} already")
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
          UserError: the checkpoint is another config's; or there are some and none is intact.
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
                    log_once(f"checkpoint {step} was moved to {aside}")
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
                write_json(directory / DIGESTS, digests(directory))

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
      UserError: a checkpoint does not fit the config; one was asked for and is not there.
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
      UserError: there is none; `config.KEY` and what was looked for are named.
    """
    base = _absolute(path)
    if (base / "state").is_dir():
        found = [base]
    else:
        found = _numbered(base / "checkpoints") or _numbered(base)
    if not found:
        other = base.exists() and (not base.is_dir() or (base / "config.json").exists())
        raise UserError(
            f"config.{key}={str(path)!r} holds no checkpoint: looked for {base}/checkpoints/STEP,"
            f" {base}/STEP and {base}/state"
            + f". Weights of PyTorch are converted first: mae-jax convert {path} DIR --to=ours"
            * other
        )
    return found[newest_intact(found)]


def newest_intact(checkpoints: list[epath.Path]) -> int:
    """The position of the first intact one; process 0 looks, and decides for all.

    Raises:
      UserError: none is.
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
            f"no checkpoint in {checkpoints[0].parent} is intact: {'; '.join(reasons)}. Bring them"
            " back from a copy, or delete them to start again"
        )
    for reason in reasons:
        log_once(f"{reason}; using checkpoint {checkpoints[chosen].name} instead")
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
      UserError: an array is on one side only or has another shape or type; the first are named.
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
            raise UserError(
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


def _described(tree: Any) -> dict[str, str]:
    """Path -> type and shape of the arrays of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype)}{[*x.shape]}"
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
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


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
