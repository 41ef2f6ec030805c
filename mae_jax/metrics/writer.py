"""Write what a run measures: metrics.jsonl, TensorBoard, images, result files, a log per host."""

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mae_jax import files

REMOTE_SECONDS = 60  # an object store takes whole files only: we send them at most this often


class Writer:
    """A writer into a workdir. Process 0 writes the metrics, every host its own log.

    A run that goes on drops the metrics of later steps than `start`, which it will write again; a
    new one drops all. A line in a local file survives a kill as soon as the call returns. Object
    stores such as gs://BUCKET/RUN cannot append: a kill can lose what was written since the last
    `flush`, which happens at least once a minute.

    Args:
      workdir: a path, or a URL that etils.epath reads.
      start: the step that the run goes on from; 0 for a new run.
      keep: go on with the metrics that are there, although `start` is 0.
    """

    def __init__(self, workdir: str | os.PathLike, start: int, keep: bool = False):
        self._workdir = epath.Path(workdir)
        self._start = start
        self._log = _Lines(self._workdir / "logs" / f"host_{jax.process_index()}.log")
        self._main = jax.process_index() == 0
        if self._main:
            file = self._workdir / "metrics.jsonl"
            # A new run will write step 0 again; a resumed one wrote its step before it was saved.
            old = read(file) if (start or keep) and file.exists() else []
            kept = [json.dumps(line) for line in old if line["step"] <= start]
            self._metrics = _Lines(file, kept)
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
    """Return the lines of a metrics.jsonl in order, without what a crash cut short or damaged."""
    entries = []
    for line in epath.Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


class _Lines:
    """A text file that only grows: appended to where that is possible, sent whole elsewhere."""

    def __init__(self, path: epath.Path, lines: list[str] | None = None):
        """Open a file; `lines` replace what it holds."""
        self.remote = "://" in os.fspath(path)
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_bytes().decode(errors="replace") if path.exists() else ""
        self._text = old if lines is None else "".join(f"{line}\n" for line in lines)
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
