"""What a run writes can be trusted after a crash, and read while it runs."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from mae_jax.metrics.figure import loss_figure
from mae_jax.metrics.progress import Progress
from mae_jax.metrics.writer import Writer, read


def steps(workdir: Path) -> list[int]:
    return [line["step"] for line in read(workdir / "metrics.jsonl")]


def events(workdir: Path) -> list[Event]:
    """All TensorBoard events of a workdir, in the order of writing."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: length, its checksum, the event, its checksum
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def run(workdir: Path, start: int, reported: list[int]) -> Writer:
    writer = Writer(workdir, start)
    for step in reported:
        writer.scalars(step, {"train/loss": 1.0 / (step + 1), "train/lr": 1e-3})
    return writer


def test_a_resumed_run_has_each_step_once(tmp_path):
    # Killed after step 50, saved at step 20, and cut short while writing a line.
    run(tmp_path, 0, [0, 10, 20, 30, 40, 50])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "train/lo')
    run(tmp_path, 20, [30, 40, 50, 60])
    assert steps(tmp_path) == [0, 10, 20, 30, 40, 50, 60]
    assert all(
        line["train/loss"] == 1 / (line["step"] + 1) for line in read(tmp_path / "metrics.jsonl")
    )


def test_lines_of_something_else_are_dropped(tmp_path):
    run(tmp_path, 0, [0, 10])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"a": 5}\n[1]\n\xff\xfe\x00\n')
    run(tmp_path, 10, [20])
    assert steps(tmp_path) == [0, 10, 20]


def test_a_run_that_starts_again_before_its_first_checkpoint_reports_step_0_once(tmp_path):
    run(tmp_path, 0, [0, 10])
    run(tmp_path, 0, [0, 10])
    assert steps(tmp_path) == [0, 10]


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    run(tmp_path, 0, [0, 10]).close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(tmp_path, 10, []).close()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_line_is_on_disk_when_the_call_returns(tmp_path):
    writer = run(tmp_path, 0, [7])
    writer.log("hello")
    assert steps(tmp_path) == [7]
    assert (tmp_path / "logs/host_0.log").read_text().endswith("hello\n")


def test_tensorboard_forgets_exactly_the_steps_that_are_written_again(tmp_path):
    run(tmp_path, 0, [10, 20, 30]).close()
    run(tmp_path, 20, [30]).close()
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    # TensorBoard drops what it has of the step of a new session and of later ones.
    assert starts == [0, 21]


def test_metrics_that_are_not_finite_stay_readable_by_strict_parsers(tmp_path):
    Writer(tmp_path, 0).scalars(1, {"a": float("nan"), "b": float("inf"), "c": 2.0})

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": 2.0}


def test_pictures_arrive_unchanged(tmp_path):
    image = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    writer = Writer(tmp_path, 0)
    writer.images(120, {"reconstruction": image})
    writer.file("tables/results.json", b"{}")
    writer.close()
    assert (tmp_path / "tables/results.json").read_bytes() == b"{}"
    stored = Image.open(tmp_path / "images/reconstruction_0000120.png")
    np.testing.assert_array_equal(np.asarray(stored), image)
    shown = [(e.step, v.image) for e in events(tmp_path) for v in e.summary.value]
    assert [(step, i.height, i.width) for step, i in shown] == [(120, 5, 4)]


def test_only_the_first_host_reports_and_every_host_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    writer = run(tmp_path, 0, [1])
    writer.images(1, {"a": np.zeros((2, 2, 3), np.uint8)})
    writer.file("results.json", b"{}")
    writer.log("hello")
    writer.close()
    with Progress(10, 0) as progress:
        progress.log("hello")
        progress.update(1, loss=1.0, lr=1.0, images_per_sec=1.0, data_wait=0.0)
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert files == ["logs/host_3.log"]
    assert capsys.readouterr().out == ""


def test_an_object_store_gets_whole_files(monkeypatch):
    """Against fsspec's store in memory, which, as the real ones, cannot append."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    fsspec.register_implementation("s3", MemoryFileSystem, clobber=True)
    monkeypatch.setattr(Writer, "_board", lambda self: pytest.fail("not of this test"))
    first = Writer("s3://bucket/run", 0)
    first._metrics.append('{"step": 10}')
    first._metrics.append('{"step": 20}')
    first.flush()
    first.close()
    second = Writer("s3://bucket/run", 10)
    second._metrics.append('{"step": 20, "again": true}')
    second.log("hello")
    second.flush()
    lines = read("s3://bucket/run/metrics.jsonl")
    assert lines == [{"step": 10}, {"step": 20, "again": True}]


SHOW = """
from mae_jax.metrics.progress import Progress
with Progress(2000, 0) as progress:
    progress.log("parameters: 1,000 [not markup]")
    for step in (1, 1000, 2000):
        progress.update(step, loss=0.51234, lr=1.5e-4, images_per_sec=1234.4, data_wait=0.03)
    progress.log("done")
"""


def shown(terminal: bool, columns: int = 80) -> str:
    """What a person sees of SHOW, without the terminal's control sequences."""
    env = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHOW]
    root = Path(__file__).parents[1]
    if not terminal:
        return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True).stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=env, cwd=root, stdout=theirs, stderr=theirs):
        os.close(theirs)
        output = b""
        try:
            while data := os.read(ours, 4096):
                output += data
        except OSError:  # Linux says so when the other side has closed
            pass
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())


def test_progress_is_plain_lines_where_there_is_no_terminal():
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "parameters: 1,000 [not markup]"
    assert lines[1].startswith("step    1/2000  loss 0.5123  lr 1.50e-04  1,234 img/s  wait 3%")
    assert lines[3].endswith("0:00:00 left")
    assert lines[4:] == ["done"]


@pytest.mark.parametrize("columns", [80, 120])
def test_progress_on_a_terminal_shows_everything_in_one_line(columns):
    text = shown(terminal=True, columns=columns)
    rows = [row for row in re.split(r"[\r\n]+", text) if "2000/2000" in row]
    assert rows
    for part in ("━", "loss 0.5123", "lr 1.50e-04", "1,234 img/s", "wait 3%", "0:00:00 left"):
        assert part in rows[-1]
    assert len(rows[-1].rstrip()) <= columns
    assert "parameters: 1,000 [not markup]" in text


def test_loss_figure_draws_what_there_is(tmp_path):
    writer = run(tmp_path, 0, range(0, 100, 10))
    loss_figure(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    narrow = Image.open(tmp_path / "loss.png").size
    writer.scalars(50, {"eval/loss": 0.5, "eval/rmse": 30.0, "eval/rmse_mean_colour": 50.0})
    loss_figure(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    wide = Image.open(tmp_path / "loss.png").size
    assert wide[0] > 1.8 * narrow[0]


def test_loss_figure_of_nothing_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n')
    with pytest.raises(ValueError, match="holds no train/loss yet"):
        loss_figure(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_importing_metrics_does_not_import_what_draws():
    code = (
        "import sys; from mae_jax.metrics import figure, progress, writer;"
        " print([m for m in sys.modules if m in %r])"
    )
    heavy = ["matplotlib", "tensorboardX", "rich", "PIL"]
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code % heavy], cwd=root, capture_output=True)
    assert out.stdout.decode().strip() == "[]", out.stderr.decode()
