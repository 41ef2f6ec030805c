"""Read examples ahead of the training step, in threads or in processes, and keep their order."""

import contextlib
import math
import mmap
import multiprocessing
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import grain
import numpy as np

from mae_jax.data.process import follow_parent
from mae_jax.distributed import announce
from mae_jax.errors import UserError

THREADS = 16  # the most that read images, where no processes do
# With images of up to SMALL_IMAGE bytes, Python's own work takes most of the time, and threads wait
# for each other: on 2 cores, one thread read 3,850 JPEGs of 32 pixels per second, 16 threads 870.
SMALL_IMAGE, THREADS_FOR_SMALL = 64 * 64 * 3, 1
PREFETCH = 4  # batches that are read ahead of the training step
TOGETHER = 16  # images that a process reads by one call of Grain
# Processes take a second to start; in that time threads read a thousand photographs.
FEW = 2000  # images; threads read a smaller source, unless processes are asked for


class WorkerLost(RuntimeError):
    """The loss of a process that reads images; the run goes on when it is started again."""


class Slots(NamedTuple):
    """Shape and type of the images of all batches that are in memory at a time."""

    shape: tuple[int, ...]  # batches, rows, and the shape of an image
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_ahead(
    examples: grain.MapDataset,
    batch_size: int,
    rows: np.ndarray,
    shape: tuple[int, ...],
    workers: int,
    images: int,
    dtype: type[np.number] = np.uint8,
) -> Iterator[dict[str, np.ndarray]]:
    """Return this host's rows of consecutive global batches; PREFETCH batches are read ahead.

    Dropping the iterator stops its threads and processes.

    Args:
      examples: dicts of one `image` and of scalars. Every `batch_size` are a global batch;
        others than `rows` are not read.
      shape: of an image.
      workers: config.data.workers: how many processes read; 0 = threads of this process, -1 = see
        `choose_processes`.
      images: how many different images there are to read.
      dtype: of an image.

    Raises:
      UserError: the processes that were asked for cannot share memory.
    """
    local = _Rows(examples, batch_size, rows)
    cores = usable_cores()
    processes = choose_processes(workers, images, cores)
    if processes < workers:
        announce(f"config.data.workers={workers}: {processes} read, one for each core")
    processes = min(processes, len(rows))
    slots = Slots((PREFETCH, len(rows), *shape), np.dtype(dtype))
    if processes and (lack := _lack_of_memory(slots.nbytes)):
        if workers > 0:
            way_out = "lower config.batch_size, or read by threads (config.data.workers=0)"
            raise UserError(f"config.data.workers={workers} {lack}: {way_out}")
        announce(f"threads read the images, since processes {lack}")
        processes = 0
    if processes:
        return _read_in_processes(local, slots, processes)
    small = math.prod(shape) * slots.dtype.itemsize <= SMALL_IMAGE
    return _read_in_threads(local, len(rows), THREADS_FOR_SMALL if small else min(THREADS, cores))


def choose_processes(workers: int, images: int, cores: int) -> int:
    """Return how many processes read images; 0 = threads do.

    One eighth of the cores, rounded down, is left to the process that trains. Few images are read
    by threads, and so are all where there is one core.

    Args:
      workers: config.data.workers; -1 = automatic.
      images: how many different images there are to read.
      cores: those that this process may use.
    """
    if workers >= 0:
        return min(workers, cores)
    return 0 if cores == 1 or images < FEW else cores - cores // 8


def usable_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many cores this process may use, by its affinity and its container's limit."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no limit: no file, or "max"
        quota, period = map(int, cpu_max.read_text().split())
        cores = min(cores, max(quota // period, 1))
    return cores


class _Rows(grain.MapDataset):
    """The elements at `rows` of every `batch_size` elements of the parent."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[self._parent_index(index)]

    def read(self, indices: Iterable[int]) -> Sequence[dict[str, Any]]:
        """Return several elements: of JPEGs of 32 pixels, a fifth faster than one by one."""
        return self._parent._getitems([self._parent_index(index) for index in indices])

    def _parent_index(self, index: int) -> int:
        batch, row = divmod(index, len(self._rows))
        return batch * self._batch_size + self._rows[row]


class _Batches(grain.MapDataset):
    """Batches of `size` consecutive elements of `_Rows`."""

    def __init__(self, parent: _Rows, size: int):
        super().__init__(parent)
        self._size = size

    def __len__(self) -> int:
        return len(self._parent) // self._size

    def __getitem__(self, index: Any) -> Any:
        start = index * self._size
        return _stack(self._parent.read(range(start, start + self._size)))


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([x[name] for x in examples]) for name in examples[0]}


def _read_in_threads(
    local: _Rows, batch_size: int, threads: int
) -> Iterator[dict[str, np.ndarray]]:
    # The thread of ThreadPrefetchIterDataset makes the batches. It reads, too, if it is to be the
    # only one: to hand single examples over takes half as long as to read a small one.
    if threads > 1:
        ahead = PREFETCH * batch_size
        options = grain.ReadOptions(min(threads, ahead), ahead)
        batches, buffer = local.to_iter_dataset(options).batch(batch_size), 1
    else:
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        batches, buffer = _Batches(local, batch_size).to_iter_dataset(options), PREFETCH
    dataset = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=buffer)
    with contextlib.closing(iter(dataset)) as iterator:
        yield from iterator


def _read_in_processes(local: _Rows, slots: Slots, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches that `workers` processes read.

    Worker w reads examples w, w + workers, ... and writes each image where it stands in its batch,
    in memory that all share. It sends the other values of its rows through its pipe, which says
    that these rows are complete; the answer says that the place of the batch is free again. The
    memory has no name and the pipes end with their processes, so nothing is left behind, however a
    run ends.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mae_jax.data.pipeline"])  # imported once for all processes
    pickled = cloudpickle.dumps(local)
    readers: list[tuple[Any, Connection]] = []
    # At the end of a program, multiprocessing would wait for the workers for ever.
    stop = util.Finalize(None, _stop, (readers,), exitpriority=1)
    places, batch_size = slots.shape[:2]
    file = _share_memory(slots.nbytes)
    images = _open_memory(file, slots)
    try:
        for worker in range(workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, slots, pickled, worker, workers)
            process = context.Process(target=_work, args=arguments, daemon=True)
            _start(process)
            readers.append((process, ours))
            theirs.close()
            reduction.send_handle(ours, file, process.pid)
        for batch in range(len(local) // batch_size):
            columns = [_receive(*reader) for reader in readers]
            rows = [_rows_of(worker, workers, batch, batch_size) for worker in range(workers)]
            order = np.argsort(np.concatenate(rows))
            result = {"image": images[batch % places].copy()}
            for _, connection in readers:
                with contextlib.suppress(OSError):  # a lost worker is met at its next rows
                    connection.send_bytes(b"free")
            for name in columns[0]:
                result[name] = np.concatenate([column[name] for column in columns])[order]
            yield result
    finally:
        os.close(file)
        stop()


def _start(process: Any) -> None:
    """Start a process that does not run the user's script again; nothing of it is needed there."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = script


def _work(connection: Connection, slots: Slots, pickled: bytes, worker: int, workers: int) -> None:
    """Read one worker's rows of all batches; leave signals to the parent, which saves first."""
    follow_parent(signal.SIGINT, signal.SIGTERM)
    places, batch_size = slots.shape[:2]
    with contextlib.suppress(EOFError, ConnectionError):  # the parent reads no more
        images = _open_memory(reduction.recv_handle(connection), slots)
        try:
            local = cloudpickle.loads(pickled)
            for batch in range(len(local) // batch_size):
                if batch >= places:
                    connection.recv_bytes()
                rows = _rows_of(worker, workers, batch, batch_size)
                columns: list[dict[str, np.ndarray]] = []
                for start in range(0, len(rows), TOGETHER):
                    some = rows[start : start + TOGETHER]
                    values = _stack(local.read((batch * batch_size + some).tolist()))
                    images[batch % places, some] = values.pop("image")
                    columns.append(values)
                connection.send(
                    {name: np.concatenate([x[name] for x in columns]) for name in columns[0]}
                )
        except (UserError, EOFError, ConnectionError) as error:
            connection.send(error)
        except Exception:
            connection.send(RuntimeError(f"in a process that reads:\n{traceback.format_exc()}"))


def _rows_of(worker: int, workers: int, batch: int, batch_size: int) -> np.ndarray:
    """Return the rows of a batch that a worker reads; at least one if there are enough."""
    return np.arange((worker - batch * batch_size) % workers, batch_size, workers)


def _receive(process: Any, connection: Connection) -> dict[str, np.ndarray]:
    """Return the values that a worker read, or raise what it raised."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        if process.exitcode > 0:
            raise RuntimeError(
                "a process that reads images failed to start, see above; config.data.workers=0"
                " reads by threads"
            ) from None
        raise WorkerLost(
            "a process that reads images was killed, perhaps for its memory: lower"
            f" config.data.workers (exit code {process.exitcode})"
        ) from None
    if isinstance(message, Exception):
        raise message
    return message


def _stop(readers: list[tuple[Any, Connection]]) -> None:
    """End the workers at once: they hold nothing that would be left behind."""
    for process, connection in readers:
        connection.close()
        process.kill()
    for process, _ in readers:
        process.join()


def _share_memory(size: int) -> int:
    """Return the file descriptor of memory without a name, which goes with its last user."""
    file = os.memfd_create("batches")
    try:
        os.ftruncate(file, size)
    except OSError:
        os.close(file)
        raise
    return file


def _open_memory(file: int, slots: Slots) -> np.ndarray:
    return np.ndarray(*slots, mmap.mmap(file, slots.nbytes))


def _lack_of_memory(needed: int) -> str:
    """Return why processes cannot share `needed` bytes, or ''."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(found[1]) * 1024 if found else needed
    if needed > free:
        return f"would share {needed / 2**20:,.0f} MiB of memory, {free / 2**20:,.0f} are free"
    try:
        os.close(_share_memory(needed))
    except (AttributeError, OSError) as error:  # another system than Linux; a container's rules
        return f"cannot share memory here ({error})"
    return ""
