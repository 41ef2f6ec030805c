"""Save the state of a run in WORKDIR/checkpoints/STEP, and restore it on any mesh.

Orbax writes each checkpoint in the background, on all hosts together; `integrity` adds digests.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mae_jax import distributed, integrity
from mae_jax.errors import UserError
from mae_jax.orbax_manager import open_manager

PARAMS, AVERAGED = ("params",), ("extra", "ema")  # keys that lead to parameters


class SaveError(OSError):
    """A checkpoint that could not be written; the message says which are intact."""


class FolderGone(SaveError):
    """The folder of the checkpoints was removed or moved while the run went on."""


class Checkpointer:
    """The checkpoints of one run; every host makes the same calls.

    An error of a background save is raised, as a SaveError, by the next call of `save`, `check`,
    `wait` or `close`.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        """Open WORKDIR/checkpoints, and remove what an interrupted save left there.

        Args:
          keep: number of newest checkpoints that are kept; at least 1.
          keep_every: also keep each checkpoint whose step is a multiple of this; 0 for none.
        """
        if keep < 1:
            raise UserError(f"config.checkpoint.keep={keep} must be at least 1")
        self.root = _absolute(workdir) / "checkpoints"
        self._step, self._mebibytes = 0, 0.0  # of the save in progress
        self._manager = open_manager(
            self.root, keep, keep_every, self._write_digests, self._leave_if_alone
        )
        self._config = self.root.parent / "config.json"
        self._is_local = "://" not in os.fspath(self.root)
        self._had_config = False  # beside the checkpoints, at the save before

    def save(self, step: int, state: Any) -> None:
        """Start a save; return as soon as the next update may overwrite the state's buffers.

        Raises:
          SaveError: this save or the one before it failed; older checkpoints are intact.
        """
        self.wait()
        if self._is_gone():
            raise FolderGone(f"{self.root} is gone; checkpoint {step} was not written")
        self._had_config = self._is_local and self._config.exists()
        self._step = step
        self._mebibytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
        with self._explained():
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), force=True
            )

    def check(self) -> None:
        """Raise the error of a background save, if it failed; never wait."""
        # The manager's own check_for_errors would take the error away from the thread that deletes
        # older checkpoints when it sees none.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save and end the background threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Close. After an error, one host completes its save; several might wait in vain."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(OSError):
                self.close()
        else:
            self._manager.on_error = lambda error: None

    def all_steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Return the newest step that has a checkpoint."""
        return self._manager.latest_step()

    def restore(self, target: Any) -> tuple[int, Any] | None:
        """Return (step, state) of the newest intact checkpoint; None if there is no checkpoint.

        Damaged newer checkpoints are moved to WORKDIR/damaged-STEP.
        """
        steps = self.all_steps()[::-1]
        if not steps:
            return None
        chosen = integrity.newest_intact([self.root / str(step) for step in steps])
        state = restore(self.root / str(steps[chosen]), target)
        if chosen:
            self._move_damaged(steps[:chosen])
        return steps[chosen], state

    def _move_damaged(self, steps: list[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            aside = self.root.parent / f"damaged-{step}"
            aside.rmtree(missing_ok=True)
            (self.root / str(step)).rename(aside)
            distributed.log_once(f"checkpoint {step} was moved to {aside}")
        multihost_utils.sync_global_devices("damaged checkpoints moved")
        self._manager.reload()

    def _write_digests(self) -> None:
        """Write the digests; Orbax calls this on one host when all files of a save are written."""
        # On a disk Orbax renames the directory afterwards; in a bucket it has its final name.
        for directory in [*self.root.glob(f"{self._step}.*"), self.root / str(self._step)]:
            if directory.exists():
                integrity.write_digests(directory)

    def _is_gone(self) -> bool:
        """Return whether the folder was moved, even if the save that was under way made it again.

        Orbax makes missing folders; the config of the run is not in what it made.
        """
        lost_config = self._had_config and not self._config.exists()
        return self._is_local and (lost_config or not self.root.is_dir())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if distributed.from_others(error):
                raise
            kind = FolderGone if self._is_gone() else SaveError
            raise kind(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        earlier = ", ".join(path.name for path in numbered(self.root)) or "none"
        code = re.search(r"os_error_code='(\d+)'", str(error))  # in the words of TensorStore
        reason = os.strerror(int(code[1])) if code else f"{error!r:.300}"
        return (
            f"checkpoint {self._step} could not be written to {self.root}: {reason}. It takes up"
            f" to {self._mebibytes:,.1f} MiB. Earlier checkpoints, intact: {earlier}"
        )

    def _leave_if_alone(self, error: Exception) -> None:
        """End this host if only its save failed: the others wait for it inside Orbax."""
        if distributed.alone_with(error):
            print(f"host {jax.process_index()}: {self._explain(error)}", file=sys.stderr)
            distributed.leave(1)


def restore_or_init(
    checkpointer: Checkpointer,
    target: Any,
    init: Callable[[], Any],
    load: Callable[[epath.Path, Any], Any],
    *,
    resume: str = "",
    init_from: str = "",
) -> tuple[Any, str]:
    """Return the state to start from, and a line that says where it comes from.

    In this order: a checkpoint in the own workdir; the whole state of `resume`, if given; weights
    of `init_from`, if given; `init`.

    Args:
      target: shapes and shardings of a TrainState, on any mesh.
      load: (checkpoint, fresh state) -> the state with the weights to take from `init_from`.
      resume, init_from: a workdir, a checkpoint in it, or "".
    """
    if own := checkpointer.restore(target):
        step, state = own
        return state, f"resumed at step {step} from {checkpointer.root}/{step}"
    if resume:
        path = find(resume, "resume")
        state = restore(path, target)
        return state, f"resumed at step {int(state.step)} from {path} (config.resume)"
    if init_from:
        path = find(init_from, "init_from")
        return load(path, init()), f"step 0, weights of {path} (config.init_from)"
    return init(), "from scratch"


def find(path: str | os.PathLike, key: str) -> epath.Path:
    """Return the newest intact checkpoint of a workdir, or the checkpoint that `path` names.

    Args:
      key: the config key that holds `path`, for the error message.

    Raises:
      UserError: there is none, or none is intact.
    """
    found = candidates(path, key)
    return found[integrity.newest_intact(found)]


def candidates(path: str | os.PathLike, key: str) -> list[epath.Path]:
    """Return the checkpoints of a workdir, newest first, or the checkpoint that `path` names.

    Raises:
      UserError: there is none.
    """
    base = _absolute(path)
    if (base / "state").is_dir():
        found = [base]
    else:
        found = numbered(base / "checkpoints") or numbered(base)
    if not found:
        foreign = base.is_file() or (base / "config.json").exists()
        hint = f". Weights of PyTorch are converted first: mae-jax convert {path} DIR --to=ours"
        raise UserError(
            f"config.{key}={str(path)!r} holds no checkpoint: looked for {base}/checkpoints/STEP,"
            f" {base}/STEP and {base}/state" + hint * foreign
        )
    return found


def shapes(checkpoint: str | os.PathLike, part: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return shapes and types of the arrays under the keys `part`; {} if there are none."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(_absolute(checkpoint) / "state").tree
    for key in part:
        saved = saved.get(key) or {}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)


def restore(checkpoint: str | os.PathLike, target: Any, part: tuple[str, ...] = ()) -> Any:
    """Return the arrays of a checkpoint in the shardings of `target`.

    Args:
      target: shapes with shardings, of a TrainState or of the part of it.
      part: keys that lead to the arrays, such as ("params", "encoder"); the rest is not read.

    Raises:
      UserError: an array is missing on one side, or has another shape or type.
    """
    saved = shapes(checkpoint, part)
    for key in reversed(part):
        saved, target = {key: saved}, {key: target}
    integrity.require_equal(checkpoint, saved, target)
    # The bare handler: an ocp.Checkpointer would require metadata that belong to the step.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        restored = reader.restore(
            _absolute(checkpoint) / "state",
            args=ocp.args.PyTreeRestore(target, arguments, partial_restore=True),
        )
    for key in part:
        restored = restored[key]
    return restored


def _absolute(path: str | os.PathLike) -> epath.Path:
    """Return an absolute path, which Orbax requires; the URL of a bucket already is one."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def numbered(directory: epath.Path) -> list[epath.Path]:
    """Return the checkpoints in a directory, newest first."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((p for p in paths if p.name.isdigit()), key=lambda p: -int(p.name))
