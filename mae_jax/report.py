"""What a run says while it runs: start-up facts, metrics, evaluations and progress."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax import flops
from mae_jax.metrics import writer
from mae_jax.metrics.progress import Progress


class Stopwatch:
    """Time of updates between two reports, without evaluation and saving."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step, self.since, self.waited, self.paused = step, time.perf_counter(), 0.0, 0.0

    def lap(self, step: int) -> tuple[float, float]:
        """Return (updates per second, share of the time spent waiting for batches) and restart."""
        seconds = max(time.perf_counter() - self.since - self.paused, 1e-9)
        speed, waited = (step - self.step) / seconds, self.waited / seconds
        self.restart(step)
        return speed, waited


class Reporter:
    """The voice of a run: metrics.jsonl, TensorBoard, logs and the progress bar.

    A context manager. Metrics of an update are read from the device when the next update has
    started, or at `flush`.

    Args:
      task, schedule: a train.Task and its train.Schedule.
      start: steps that were done before.
      describe: a word about what is running.
      started: how the run began, for result files.
      learning_rate: by 0-based step.
      check: called with (step, scalars) of every update before anything else happens with them.
      heartbeat: called with what just ended, such as "step 12".
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
        describe: str,
        started: str,
        learning_rate: Callable[[int], Any],
        check: Callable[[int, Mapping[str, float]], None],
        heartbeat: Callable[[str], None],
    ):
        self._schedule, self._started = schedule, started
        self._batch_size, self._devices = batch_size, mesh.size
        peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
        work = task.flops_multiplier * task.flops_per_example
        self._mfu_per_rate = work / (peak * mesh.size) if peak else None
        self._learning_rate, self._check, self._heartbeat = learning_rate, check, heartbeat
        self._unread: tuple[int, Mapping[str, Any]] | None = None  # metrics of the last update
        self._writer = writer.Writer(workdir, start)
        self._progress = Progress(schedule.total, start, describe)
        self._stopwatch = Stopwatch(start)

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

    def restart_clock(self, step: int) -> None:
        """Begin to measure speed here, after what only a start does."""
        self._stopwatch.restart(step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the body's time as waiting for images."""
        began = time.perf_counter()
        yield
        self._stopwatch.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the body's time out of the speed."""
        began = time.perf_counter()
        yield
        self._stopwatch.paused += time.perf_counter() - began

    def updated(self, step: int, metrics: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Take the metrics of update `step`, still on the device, and report the one before."""
        self._read()
        self._unread = step, {f"train/{name}": x for name, x in metrics.items()} | dict(scalars)
        self._heartbeat(f"step {step - 1}")

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
        self._heartbeat(f"evaluation at step {step}")

    def _read(self) -> None:
        if self._unread is None:
            return
        (step, metrics), self._unread = self._unread, None
        scalars = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._check(step, scalars)
        if step != 1 and not self._schedule.due(step, self._schedule.log_every):
            return
        speed, waited = self._stopwatch.lap(step)
        rate = speed * self._batch_size
        scalars |= {
            "train/lr": float(self._learning_rate(step - 1)),
            "perf/images_per_sec_per_chip": rate / self._devices,
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


def start_up(
    task: Any,
    step: Any,
    params: Any,
    mesh: Mesh,
    schedule: Any,
    learning_rate: Callable,
    batch_size: int,
    grad_accum: int,
) -> list[str]:
    """Return what a user should know before the first batch, one fact a line.

    Args:
      step: the compiled step.
      params: the parameters, or their shapes.
    """
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"parameters: {sum(math.prod(x.shape) for x in jax.tree.leaves(params)):,} trained",
        f"forward pass: {task.flops_per_example / 1e9:.2f} GFLOPs per image"
        f" ({task.flops_per_example / 2e9:.2f} GMACs)",
        f"mesh: {shape} on {mesh.size} x {mesh.devices.flat[0].device_kind},"
        f" {jax.process_count()} host(s)",
    ]
    if (memory := step.memory_analysis()) is not None:
        arguments = memory.argument_size_in_bytes / 2**20
        temporary = memory.temp_size_in_bytes / 2**20
        lines.append(
            f"memory of the step per device: {arguments + temporary:,.0f} MiB"
            f" ({arguments:,.0f} state and batch, {temporary:,.0f} temporary)"
        )
    lines.append(
        f"batch: {batch_size} in {grad_accum} pass(es); {schedule.steps_per_epoch} steps per epoch"
        f" of {len(task.examples):,} examples; {schedule.total:,} steps"
    )
    rates = np.asarray(jax.vmap(learning_rate)(np.arange(schedule.total + 1)))
    lines.append(f"learning rate: peak {rates[:-1].max():.3g}")
    if rates[-1] > rates[-2]:
        lines[-1] += ", still rising at the end: config.optim.warmup is longer than the run"
    return lines
