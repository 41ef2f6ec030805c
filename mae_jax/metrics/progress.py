"""Show how far a run is: a progress bar on a terminal, plain lines elsewhere."""

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
      describe: a word or two about what is running.
    """

    def __init__(self, total: int, start: int, describe: str):
        self._total, self._start, self._describe = total, start, describe
        self._silent = jax.process_index() != 0
        self._bar: Any = None
        self._first: tuple[int, float] | None = None  # step and time of the first update

    def __enter__(self) -> "Progress":
        if not self._silent and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from rich import progress
            from rich.table import Column

            text = "{task.fields[facts]}"
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),
                progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
                progress.TextColumn(text, markup=False, table_column=Column(no_wrap=True)),
                expand=True,
            )
            self._task = self._bar.add_task(
                self._describe, total=self._total, completed=self._start, facts="starting"
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

        The remaining time is extrapolated from everything since the first update: steps,
        evaluations and saves.

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
            facts = {"describe": self._describe} | facts
            room = self._bar.console.width - 2 * width - MIN_BAR - 2
            for name in ("describe", "wait", "lr", "rate"):  # what a narrow terminal does without
                if len("  ".join(facts.values())) > room:
                    del facts[name]
            describe = facts.pop("describe", "")
            text = "  ".join(facts.values())
            self._bar.update(self._task, description=describe, completed=step, facts=text)
        elif not self._silent:
            print(f"step {step:{width}}/{self._total}  {'  '.join(facts.values())}", flush=True)

    def log(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._silent:
            print(text, flush=True)

    def _remaining(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step >= self._total:
            return _clock(0)
        if step <= first_step:
            return "?"
        return _clock((now - first_time) / (step - first_step) * (self._total - step))


def _clock(seconds: float) -> str:
    """Return 3723 seconds as '1:02:03'; a day and more as '2d 03h'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}"
