"""Report on a run while it runs: start-up facts, metrics, evaluations and progress."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from mae_jax import flops
from mae_jax.metrics import start_up, writer
from mae_jax.metrics.progress import Progress


class Reporter:
    """Writer of all that a run says: metrics.jsonl, TensorBoard, logs and the progress bar.

    A context manager. Metrics of an update are read from the device when the next update has
    started, or at `flush`.

    Args:
      task, schedule: a train.Task and its Schedule.
      start: steps that were done before.
      started: how the run began, for the log and result files.
      learning_rate: by 0-based step.
      check: called with (step, scalars) of every update before anything else happens with them.
      heartbeat: called when an update or an evaluation has ended.
      keep_metrics: go on with the metrics that are there, although `start` is 0.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        mesh: Mesh,
        task: Any,
        schedule: Any,
        *,
        start: int,
        batch_size: int,
        started: str,
        learning_rate: Callable[[Any], Any],
        check: Callable[[int, Mapping[str, float]], None],
        heartbeat: Callable[[], None],
        keep_metrics: bool = False,
    ):
        self._schedule, self._started = schedule, started
        self._task, self._mesh, self._batch_size = task, mesh, batch_size
        peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
        work = task.flops_multiplier * task.flops_per_example
        self._mfu_per_rate = work / (peak * mesh.size) if peak else None
        self._learning_rate = jax.jit(learning_rate)
        self._check, self._heartbeat = check, heartbeat
        self._unread: tuple[int, Mapping[str, Any]] | None = None  # metrics of the last update
        self._writer = writer.Writer(workdir, start, keep_metrics)
        self._progress = Progress(schedule.total, start)
        self._restart_clock(start)

    def __enter__(self) -> "Reporter":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._writer.close()

    def log(self, line: str) -> None:
        """Print a line and keep it in this host's log."""
        self._writer.log(line)
        self._progress.log(line)

    def start_up(self, step: Any, params: Any, grad_accum: int) -> None:
        """Log what a user should know before the first batch, and measure speed from here on.

        Args:
          step: the compiled step.
          params: the parameters, or their shapes.
        """
        settings = self._batch_size, grad_accum, self._learning_rate
        for line in start_up.facts(self._task, self._mesh, self._schedule, step, params, *settings):
            self.log(line)
        self.log(self._started)
        self._restart_clock(self._since_step)

    def _restart_clock(self, step: int) -> None:
        self._since_step, self._since = step, time.perf_counter()
        self._seconds = {"waited": 0.0, "paused": 0.0}

    @contextlib.contextmanager
    def _count(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - began

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Count the body's time as waiting for images."""
        return self._count("waited")

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Leave the body's time out of the speed."""
        return self._count("paused")

    def updated(self, step: int, metrics: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Take the metrics of update `step`, still on the device, and report the one before."""
        self._read()
        self._unread = step, {f"train/{name}": x for name, x in metrics.items()} | dict(scalars)
        self._heartbeat()

    def flush(self) -> None:
        """Report everything, and make it safe against a kill."""
        self._read()
        self._writer.flush()

    def evaluation(self, step: int, evaluator: Any, state: Any, saved_as: str | None) -> None:
        """Run an evaluator and report what it found.

        Args:
          saved_as: the checkpoint that this state is about to be saved as.
        """
        self._read()
        with self.pause():
            result = evaluator.run(state)
            self._writer.scalars(step, result.scalars)
            self._writer.images(step, result.images)
            facts = {"step": step, "checkpoint": saved_as, "started": self._started}
            for name, content in result.files.items() if jax.process_index() == 0 else ():
                self._writer.file(name, content(facts))
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.scalars.items())
        self.log(f"step {step}: {numbers}")
        self._heartbeat()

    def _read(self) -> None:
        if self._unread is None:
            return
        (step, metrics), self._unread = self._unread, None
        scalars = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._check(step, scalars)
        if step != 1 and not self._schedule.due(step, self._schedule.log_every):
            return
        seconds = max(time.perf_counter() - self._since - self._seconds["paused"], 1e-9)
        rate = (step - self._since_step) * self._batch_size / seconds
        waited = self._seconds["waited"] / seconds
        self._restart_clock(step)
        scalars |= {
            "train/lr": float(self._learning_rate(step - 1)),
            "perf/images_per_sec_per_chip": rate / self._mesh.size,
            "perf/data_wait_frac": waited,
        }
        if self._mfu_per_rate is not None:
            scalars["perf/mfu"] = self._mfu_per_rate * rate
        self._writer.scalars(step, scalars)
        self._progress.update(
            step,
            loss=scalars["train/loss"],
            lr=scalars["train/lr"],
            images_per_sec=rate,
            data_wait=waited,
        )
