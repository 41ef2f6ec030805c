"""Read examples ahead of the training step, in threads or in processes, and keep their order."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from mae_jax.data.process import follow_parent
from mae_jax.data.sources import Unreadable
from mae_jax.errors import UserError

THREADS = 16  # that read images if no processes do
# Of images up to so many bytes, Python's own work takes most of the time, and threads wait for each
# other: on 2 cores, 2 threads read 2,500 digits of 8 x 8 pixels per second, 16 threads 670.
SMALL_IMAGE, THREADS_FOR_SMALL = 32 * 32 * 3, 2
PREFETCH = 4  # batches that are read ahead of the training step
SHARED_MEMORY = Path("/dev/shm")


class WorkerLost(RuntimeError):
    """The loss of a process that reads images; the run goes on when it is started again."""


def read_ahead(
    examples: grain.MapDataset, batch_size: int, rows: np.ndarray, image_bytes: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Return this host's rows of consecutive global batches; PREFETCH batches are read ahead.

    Dropping the iterator stops its threads and processes.

    Args:
      examples: of which every `batch_size` are a global batch. Others than `rows` are not read.
      image_bytes: the size of an example's pixels.
      workers: how many processes read; 0 = threads of this process.

    Raises:
      UserError: the processes need more shared memory than is free.
    """
    local = _Rows(examples, batch_size, rows)
    if not workers:
        threads = THREADS if image_bytes > SMALL_IMAGE else THREADS_FOR_SMALL
        ahead = PREFETCH * len(rows)
        options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
        batches = local.to_iter_dataset(options).batch(len(rows))
        # This thread copies the examples into batches in the background, too.
        return _closing(
            grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
        )

    ahead = -(-PREFETCH // workers)
    _require_shared_memory(workers, (ahead + 2) * workers * len(rows) * image_bytes)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags when it starts processes
    # Each process makes whole batches: Grain divides among processes what stands before
    # to_iter_dataset, and dividing examples would mix the batches.
    batches = local.batch(len(rows)).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    return _closing(batches.mp_prefetch(options, worker_init_fn=_start_worker))


class _Rows(grain.MapDataset):
    """Those elements at `rows` of every `batch_size` elements of the parent."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def _require_shared_memory(workers: int, needed: int) -> None:
    """Check that batches fit into shared memory: without it, processes die of a bus error."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"config.data.workers={workers} needs {needed / 2**20:,.0f} MiB of shared memory,"
            f" {SHARED_MEMORY} has {free / 2**20:,.0f} free: set config.data.workers=0 (threads"
            " need none), lower workers, or give the container more (docker run --shm-size)"
        )


def _start_worker(worker: int, workers: int) -> None:
    """Leave both signals to the parent, which saves a checkpoint before it stops its workers."""
    del worker, workers
    follow_parent(signal.SIGINT, signal.SIGTERM)


def _closing(dataset: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    """Iterate, and stop threads and processes as soon as the iterator is dropped."""
    iterator = iter(dataset)
    try:
        yield from iterator
    except Unreadable as error:
        # The error of another process carries its traceback in its text: only the words are told.
        raise Unreadable(str(error)) from error
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise WorkerLost(
            "a process that reads images was killed, perhaps for its memory: lower"
            f" config.data.workers ({error})"
        ) from error
    finally:
        iterator.close()
