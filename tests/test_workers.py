"""Images are read by as many processes as there are cores, and these leave nothing behind."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hosts
import numpy as np
import pytest
from test_pipeline import Noise, assert_same, config, evaluate, stream, train

from mae_jax import distributed
from mae_jax.data import workers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    distributed.announce.cache_clear()


@pytest.mark.parametrize(
    ("asked", "images", "cores", "processes"),
    [
        (-1, 50_000, 1, 0),
        (-1, 50_000, 2, 2),
        (-1, 50_000, 16, 14),
        (-1, 50_000, 96, 84),
        (-1, workers.FEW - 1, 16, 0),
        (-1, workers.FEW, 16, 14),
        (0, 50_000, 16, 0),
        (1, 50_000, 1, 1),
        (3, 10, 16, 3),
        (1000, 50_000, 2, 2),
    ],
)
def test_processes_are_as_many_as_the_cores_allow_and_threads_read_few_images(
    asked, images, cores, processes
):
    assert workers.choose_processes(asked, images, cores) == processes


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 8), ("", 8)],
)
def test_a_containers_limit_counts_as_cores_do(limit, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(limit)
    assert workers.usable_cores(tmp_path / "cpu.max") == cores
    assert workers.usable_cores(tmp_path / "none") == 8


def test_more_processes_than_cores_are_not_started_and_a_line_says_so(two_cores, capfd):
    batches = stream(Noise(21), config(workers=1000))
    assert_same([next(batches)], train(Noise(21), 1))
    assert len(multiprocessing.active_children()) == 2
    assert capfd.readouterr().out == "config.data.workers=1000: 2 read, one for each core\n"


def test_by_default_processes_read_many_images_and_none_is_started_for_few(two_cores):
    few, many = stream(Noise(21), config(workers=-1)), stream(Noise(3000), config(workers=-1))
    next(few)
    assert not multiprocessing.active_children()
    assert_same([next(many)], train(Noise(3000), 1))
    assert len(multiprocessing.active_children()) == 2
    many.close()
    assert not multiprocessing.active_children()


def test_without_shared_memory_threads_read_unless_processes_were_asked_for(
    two_cores, monkeypatch, capfd
):
    def refuse(name):
        raise OSError("not allowed")

    expected = train(Noise(3000), 3)
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert_same(train(Noise(3000), 3, config(workers=-1)), expected)
    line = "threads read the images, since processes cannot share memory here (not allowed)\n"
    assert capfd.readouterr().out == line
    with pytest.raises(ValueError, match="workers=2 cannot share memory here .not allowed.: .*=0"):
        train(Noise(3000), 1, config(workers=2))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_processes_evaluate_the_same_batches(count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    source, rows = Noise(90, bad=(4, 50)), np.array([0, 2, 3, 4, 5, 6, 7])
    expected = evaluate(source, rows=rows, workers=0)
    assert_same(evaluate(source, rows=rows, workers=count), expected)


def broken(picture, size_HW, rng):
    return picture["no such thing"]


def test_what_a_process_raises_is_told_with_where_it_was_raised():
    with pytest.raises(RuntimeError, match=r"(?s)in broken.*no such thing"):
        train(Noise(21), 1, config(workers=1, crop="test_workers.broken"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process_memory_or_warning_behind(number, tmp_path):
    command = [sys.executable, "-m", "mae_jax", "train", "--config=configs/digits.py"]
    command += [f"--workdir={tmp_path}/run", "--config.data.workers=2"]
    command += ["--config.train_for=100000 steps", "--config.log_every=5 steps"]
    command += [f"--config.model.{x}" for x in ("depth=1", "decoder_depth=1", "scan_unroll=1")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    quick = os.environ | {"XLA_FLAGS": hosts.QUICK}
    with subprocess.Popen(command, cwd=ROOT, env=quick, **pipes) as run:
        for line in run.stdout:
            if re.match("step +10/", line):
                run.send_signal(number)
                break
        rest, errors = run.communicate()  # until the last of its processes has ended
    if number != signal.SIGKILL:
        assert "it is saved" in rest
    assert not re.search("(?i)leaked|warning|traceback|buffer", errors), errors
    assert run.returncode == {signal.SIGTERM: 75, signal.SIGINT: 130}.get(number, -number)
