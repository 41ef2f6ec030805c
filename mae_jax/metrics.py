"""What a run reports: metrics.jsonl, TensorBoard, pictures, a log per host, a progress bar."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from etils import epath

from mae_jax.errors import UserError

REMOTE_SECONDS = 60  # an object store takes whole files only: they are sent at most this often
MIN_BAR = 6  # characters


class Writer:
    """Writes into a workdir what a run measures; process 0 the metrics, every host its own log.

    metrics.jsonl holds a line for each call of `scalars`. A run that goes on from step `start`
    drops the lines of later steps, which it will write again, and those cut short by a crash;
    TensorBoard is told the same. A local line is safe against a kill as soon as the call returns.
    A workdir such as gs://BUCKET/RUN cannot be appended to: its files are held in memory and sent
    whole, at most once a minute and at `flush` and `close`; a kill can lose that minute.

    Args:
      workdir: a path, or a URL that etils.epath reads.
      start: the step that the run goes on from; 0 for one that starts.
    """

    def __init__(self, workdir: str | os.PathLike, start: int):
        self._workdir = epath.Path(workdir)
        self._start = start
        self._log = _Lines(self._workdir / "logs" / f"host_{jax.process_index()}.log")
        self._main = jax.process_index() == 0
        if self._main:
            self._metrics = _Lines(self._workdir / "metrics.jsonl", lambda x: _is_before(x, start))
        self._tensorboard: Any = None

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report numbers of a step; one that is not finite becomes null in metrics.jsonl."""
        if not self._main:
            return
        values = {name: float(value) for name, value in scalars.items()}
        strict = {name: x if math.isfinite(x) else None for name, x in values.items()}
        self._metrics.append(json.dumps({"step": int(step)} | strict))
        board = self._board()
        for name, value in values.items():
            board.add_scalar(name, value, step)
        if not self._metrics.remote:
            board.flush()

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Report pictures of a step, uint8 HWC, as images/NAME_STEP.png and in TensorBoard."""
        if not self._main or not images:
            return
        from PIL import Image

        folder = self._workdir / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "png")
            (folder / f"{name}_{step:07d}.png").write_bytes(encoded.getvalue())
            self._board().add_image(name, image, step, dataformats="HWC")

    def log(self, text: str) -> None:
        """Add a line to this host's own log, with the time (UTC)."""
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self._log.append(f"{now} {text}")

    def flush(self) -> None:
        """Make everything reported so far safe against a kill."""
        self._log.flush()
        if self._main:
            self._metrics.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _board(self) -> Any:
        # Made on first use: a finished run that is started again should leave no empty file.
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                os.fspath(self._workdir / "tensorboard"),
                # TensorBoard forgets what it had of this step and of those after it.
                purge_step=self._start + 1 if self._start else 0,
                filename_suffix=f".from_step_{self._start}",
            )
        return self._tensorboard


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in their order; a line cut short by a crash is left out."""
    lines = map(_parse, epath.Path(path).read_text().splitlines())
    return [line for line in lines if line is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "step" in values else None


def _is_before(line: str, start: int) -> bool:
    """Whether a line of metrics.jsonl stays when the run goes on from `start`."""
    values = _parse(line)
    # A run that starts will report step 0 again; one that goes on reported its step before saving.
    return values is not None and 0 < start >= values["step"]


class _Lines:
    """A text file that only grows: appended to where that is possible, sent whole elsewhere."""

    def __init__(self, path: epath.Path, keep: Callable[[str], bool] = lambda line: True):
        self.remote = "://" in os.fspath(path)
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text() if path.exists() else ""
        self._text = "".join(f"{line}\n" for line in old.splitlines() if keep(line))
        self._sent = time.monotonic()
        if self._text != old:
            if self.remote:
                path.write_text(self._text)
            else:
                # Whole or not at all: never a shorter file than what should have stayed.
                temporary = Path(f"{path}.tmp")
                temporary.write_text(self._text)
                temporary.replace(path)

    def append(self, line: str) -> None:
        if not self.remote:
            with open(self._path, "a") as file:
                file.write(f"{line}\n")
            return
        self._text += f"{line}\n"
        if time.monotonic() - self._sent > REMOTE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.remote:
            self._path.write_text(self._text)
            self._sent = time.monotonic()


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; silent on all hosts but the first.

    A context manager; the bar is drawn between enter and exit.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(
        self, step: int, *, loss: float, lr: float, images_per_sec: float, data_wait: float
    ) -> None:
        """Show where the run is. `data_wait` is the fraction of time spent waiting for images.

        The time left counts everything since the first update: steps, evaluations and saves.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        done = step - self._first[0]
        left = "?"
        if step >= self._total:
            left = "0:00:00"
        elif done > 0:
            left = _clock((now - self._first[1]) / done * (self._total - step))
        rate = f"{images_per_sec:,.0f}" if images_per_sec >= 10 else f"{images_per_sec:.1f}"
        facts = {
            "loss": f"loss {loss:.4f}",
            "lr": f"lr {lr:.2e}",
            "rate": f"{rate} img/s",
            "wait": f"wait {data_wait:.0%}",
            "left": f"{left} left",
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


def _clock(seconds: float) -> str:
    """3723 -> '1:02:03'; from a day on '2d 03h'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def loss_figure(metrics_jsonl: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw the losses of a run, its learning rate, and its errors on held-out images, as a PNG.

    Raises:
      UserError: the file holds no train/loss yet.
    """
    lines = read(metrics_jsonl)

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    if not series("train/loss")[0]:
        raise UserError(f"{os.fspath(metrics_jsonl)} holds no train/loss yet: nothing to draw")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    errors = {
        "eval/rmse": ("this model", "C1", "-"),
        "eval/rmse_interpolation": ("interpolation of visible patches", "0.35", "--"),
        "eval/rmse_mean_colour": ("mean visible colour", "0.35", ":"),
    }
    panels = 2 if series("eval/rmse")[0] else 1
    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]

    def plot(axis: Any, name: str, label: str, colour: str, style: str = "-") -> None:
        steps, values = series(name)
        marker = "o" if style == "-" and len(steps) < 20 else ""
        axis.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3)

    plot(axes[0], "train/loss", "training images", "C0")
    if series("eval/loss")[0]:
        plot(axes[0], "eval/loss", "evaluation images", "C1")
    axes[0].set(title="Loss on hidden patches" if panels == 2 else "Loss", xlabel="step")
    axes[0].legend(frameon=False)
    rate = axes[0].twinx()
    rate.plot(*series("train/lr"), color="0.8", linewidth=1, zorder=0)
    rate.set_ylabel("learning rate", color="0.5")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.tick_params(colors="0.5", labelsize=8)
    axes[0].set_zorder(rate.get_zorder() + 1)
    axes[0].patch.set_visible(False)
    if panels == 2:
        for name, (label, colour, style) in errors.items():
            plot(axes[1], name, label, colour, style)
        axes[1].set(title="Error of hidden pixels (RMSE, of 255 levels)", xlabel="step")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(frameon=False)
    rate.spines["top"].set_visible(False)
    for axis in axes:
        axis.spines["top"].set_visible(False)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    epath.Path(path).write_bytes(encoded.getvalue())
