"""Write what a run measures: metrics.jsonl, TensorBoard, images, result files, a log per host."""

import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mae_jax import files

REMOTE_SECONDS = 60  # an object store takes whole files only: we send them at most this often


class Writer:
    """A writer into a workdir. Process 0 writes the metrics, every host its own log.

    metrics.jsonl gets one line per call of `scalars`. A run that resumes from step `start` drops
    the lines of later steps, which it will write again, and a line cut short by a crash;
    TensorBoard drops the same steps. A line in a local file survives a kill as soon as the call
    returns. Object stores such as gs://BUCKET/RUN cannot append: there the writer holds its files
    in memory and sends them whole, at most once a minute and at `flush` and `close`, so that a kill
    can lose that minute.

    Args:
      workdir: a path, or a URL that etils.epath reads.
      start: the step that the run resumes from; 0 for a new run.
    """

    def __init__(self, workdir: str | os.PathLike, start: int):
        self._workdir = epath.Path(workdir)
        self._start = start
        self._log = _Lines(self._workdir / "logs" / f"host_{jax.process_index()}.log")
        self._main = jax.process_index() == 0
        if self._main:
            self._metrics = _Lines(
                self._workdir / "metrics.jsonl", lambda line: _is_before(line, start)
            )
        self._tensorboard: Any = None

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers of a step. A number that is not finite becomes null in metrics.jsonl."""
        if not self._main:
            return
        numbers = {name: float(value) for name, value in scalars.items()}
        strict = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._metrics.append(json.dumps({"step": int(step)} | strict))
        board = self._board()
        for name, number in numbers.items():
            board.add_scalar(name, number, step)
        if not self._metrics.remote:
            board.flush()

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images of a step, uint8 HWC, as images/NAME_STEP.png and to TensorBoard."""
        if not self._main or not images:
            return
        from PIL import Image

        for name, image in images.items():
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "png")
            self.file(f"images/{name}_{step:07d}.png", encoded.getvalue())
            self._board().add_image(name, image, step, dataformats="HWC")

    def file(self, name: str, content: bytes) -> None:
        """Write a whole file of the workdir, such as results.json, over an older one."""
        if self._main:
            path = self._workdir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, content)

    def log(self, text: str) -> None:
        """Add a line to this host's own log, with the time (UTC)."""
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self._log.append(f"{now} {text}")

    def flush(self) -> None:
        """Make everything written so far survive a kill."""
        self._log.flush()
        if self._main:
            self._metrics.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush, and close TensorBoard's file."""
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _board(self) -> Any:
        # Made on first use: a finished run that is started again should add no empty file.
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                os.fspath(self._workdir / "tensorboard"),
                # TensorBoard drops what it has of this step and of later ones.
                purge_step=self._start + 1 if self._start else 0,
                filename_suffix=f".from_step_{self._start}",
            )
        return self._tensorboard


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl in order, without a line cut short by a crash."""
    lines = map(_parse, epath.Path(path).read_text().splitlines())
    return [line for line in lines if line is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None


def _is_before(line: str, start: int) -> bool:
    """Return whether a line of metrics.jsonl stays when the run resumes from `start`."""
    entry = _parse(line)
    # A new run will write step 0 again; a resumed one wrote its step before it was saved.
    return entry is not None and 0 < start >= entry["step"]


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
            files.write_bytes(path, self._text.encode())

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
