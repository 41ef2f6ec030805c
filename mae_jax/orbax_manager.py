"""Set up Orbax's checkpoint manager for runs of several hosts."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath


class Manager(ocp.CheckpointManager):
    """Orbax's manager with two changes that several hosts need.

    It never asks whether the run was preempted: Orbax asks from a background thread with the step
    of an older save, and all hosts would agree to stop at a step that the loop has passed. And it
    calls `on_error` when a background save fails on this host, for which all other hosts would
    wait in vain.
    """

    on_error: Callable[[Exception], None]

    def reached_preemption(self, step: int) -> bool:
        return False

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.on_error(error)
            raise


@functools.cache
def silence_late_writes() -> None:
    """Silence the late writes of a save that has failed.

    Each of them calls an event loop that is closed by then, and Python would print a traceback: a
    hundred of them around the sentence that says why the save failed.
    """
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def open_manager(
    root: epath.Path,
    keep: int,
    keep_every: int,
    before_commit: Callable[[], None],
    on_error: Callable[[Exception], None],
) -> Manager:
    """Open the checkpoints in `root`; see `checkpoint.Checkpointer`.

    Args:
      before_commit: called on one host when all files of a save are written, before the rename.
      on_error: called in the background with the error of a save that failed on this host.
    """
    silence_late_writes()
    # Orbax logs tracebacks of errors that `on_error` and the next call report in words.
    logging.get_absl_logger().addFilter(lambda x: not (x.exc_info and "orbax" in x.pathname))
    # By default Orbax slices an array among its replicas, and compiles a program for each array and
    # device while training waits for the first save. The first replica alone can write it too.
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (int, handlers.ScalarHandler()),
        (float, handlers.ScalarHandler()),
        (np.ndarray, handlers.NumpyHandler()),
        (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
    )
    policies = ocp.checkpoint_managers
    kept: list = [policies.LatestN(keep)]
    if keep_every:
        kept.append(policies.EveryNSteps(keep_every))
    manager = Manager(
        root,
        # Named, so that an empty step directory does not change how the others are read.
        item_handlers={"state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # a damaged old checkpoint must not get in the way
            async_options=ocp.AsyncOptions(
                timeout_secs=3600, post_finalization_callback=before_commit
            ),
        ),
    )
    manager.on_error = on_error
    return manager
