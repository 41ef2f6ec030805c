"""Show how far a run is: a progress bar on a terminal, plain lines elsewhere."""

import datetime
import os
import sys
import time
from typing import Any

import jax

MIN_BAR = 6  # characters


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; silent on all hosts but the first.

    A context manager, which draws the bar between enter and exit.

    Args:
      total: steps of the whole run.
      start: steps done before.
    """

    def __init__(self, total: int, start: int):
        self._total, self._start = total, start
        self._silent = jax.process_index() != 0
        self._bar: Any = None
        self._first: tuple[int, float] | None = None  # step and time of the first update

    def __enter__(self) -> "Progress":
        if not self._silent and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from rich import progress
            from rich.table import Column

            self._bar = progress.Progress(
                progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),
                progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
                progress.TextColumn(
                    "{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True)
                ),
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=self._total, completed=self._start, facts="starting"
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(
        self, step: int, *, loss: float, lr: float, images_per_sec: float, data_wait: float
    ) -> None:
        """Show the state of the run at a step.

        Args:
          data_wait: fraction of the time that the step waited for images.
        """
        rate = f"{images_per_sec:,.0f}" if images_per_sec >= 10 else f"{images_per_sec:.1f}"
        facts = {
            "loss": f"loss {loss:.4f}",
            "lr": f"lr {lr:.2e}",
            "rate": f"{rate} img/s",
            "wait": f"wait {data_wait:.0%}",
            "remaining": f"{self._remaining(step)} left",
        }
        width = len(str(self._total))
        if self._bar is not None:
            room = self._bar.console.width - 2 * width - MIN_BAR - 3
            for name in ("wait", "lr", "rate"):  # what a narrow terminal does without
                if len("  ".join(facts.values())) > room:
                    del facts[name]
            self._bar.update(self._task, completed=step, facts="  ".join(facts.values()))
        elif not self._silent:
            print(f"step {step:{width}}/{self._total}  {'  '.join(facts.values())}", flush=True)

    def log(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._silent:
            print(text, flush=True)

    def _remaining(self, step: int) -> str:
        """Return the time that is left if all goes on as since the first update."""
        self._first = first_step, first_time = self._first or (step, time.monotonic())
        if step == first_step < self._total:
            return "?"
        seconds = (time.monotonic() - first_time) / max(step - first_step, 1)
        return str(datetime.timedelta(seconds=round(seconds * (self._total - step))))
