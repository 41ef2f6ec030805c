"""Several hosts are one run, or none: real processes on this machine, joined over gloo."""

import shutil
import signal
import threading
import time
from pathlib import Path

import hosts
import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax import distributed
from mae_jax.commands import train

HOSTS, DEVICES = 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def alone(folder):
    """One process with as many devices as the hosts have together."""
    run = hosts.apart(folder, folder / "alone", 1, HOSTS * DEVICES, seen=str(folder / "alone-seen"))
    assert run.end() == [0], run.text()
    return folder / "alone"


def test_two_hosts_make_the_run_of_one_and_read_every_example_once(folder, alone):
    workdir, seen = folder / "two", str(folder / "two-seen")
    run = hosts.apart(folder, workdir, HOSTS, DEVICES, seen=seen)
    assert run.end() == [0, 0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)
    assert len({round(loss, 5) for loss in hosts.losses(alone)}) > hosts.STEPS / 2

    given = hosts.examples(seen, HOSTS)
    assert {len(indices) for step, indices in given.items() if step < hosts.STEPS} == {128}
    for epoch in (range(hosts.PER_EPOCH), range(hosts.PER_EPOCH, 2 * hosts.PER_EPOCH)):
        read = [index for step in epoch for index in given[step]]
        assert len(set(read)) == len(read) == 128 * hosts.PER_EPOCH
    single = hosts.examples(str(folder / "alone-seen"), 1)
    for step in range(hosts.STEPS):
        assert sorted(given[step]) == sorted(single[step])

    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert not any("loss" in line for line in run.said[1]), "only host 0 reports"
    assert (folder / "compilation_cache").is_dir()


def test_a_lost_host_ends_all_and_the_run_goes_on_as_if_nothing_had_happened(folder, alone):
    workdir = folder / "killed"
    for lost, sentence in ((1, "host 1 was lost"), (0, "host 0, the coordinator, is gone")):
        run = hosts.launched(folder, workdir, HOSTS, DEVICES)
        before = len(hosts.logged(workdir))
        run.until(lambda before=before: len(hosts.logged(workdir)) > before + 2)
        hosts.signal_host(workdir, lost, signal.SIGKILL)
        assert run.end() == [distributed.PREEMPTED], run.text()
        assert sentence in run.text()
        assert f"host {lost}: killed (SIGKILL)" in run.text()
        assert "Start all hosts again" in run.text()
        assert f"host {lost} ended first" in run.said[0][-1]
    run = hosts.launched(folder, workdir, HOSTS, DEVICES)
    assert run.end() == [0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)


def test_sigterm_to_one_host_stops_all_and_the_run_goes_on_with_half_and_twice_as_many(
    folder, alone
):
    workdir = folder / "moved"
    for count in (2, 1):
        run = hosts.launched(folder, workdir, count, DEVICES)
        before = len(hosts.logged(workdir))
        run.until(lambda before=before: len(hosts.logged(workdir)) > before + 2)
        hosts.signal_host(workdir, count - 1, signal.SIGTERM)
        assert run.end() == [distributed.PREEMPTED], run.text()
        assert "it is saved" in run.text()
        last = hosts.logged(workdir)[-1]["step"]
        assert (workdir / "checkpoints" / str(last)).is_dir()
    run = hosts.launched(folder, workdir, 2, DEVICES)
    assert run.end() == [0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)


def test_a_host_with_another_config_is_refused_by_all_with_the_difference(folder):
    own = [[], ["--config.optim.blr=1.0"]]
    run = hosts.apart(folder, folder / "config", HOSTS, 1, own_flags=own)
    assert run.end() == [2, 2], run.text()
    for lines in run.said:
        assert "host 1: config.optim.blr is 1.0, on host 0 it is 0.00015" in "\n".join(lines)
    assert not (folder / "config").exists()


def test_a_host_with_other_code_is_refused_by_all(folder):
    copy = folder / "copy"
    shutil.copytree(hosts.ROOT / "mae_jax", copy / "mae_jax")
    shutil.copytree(hosts.ROOT / "configs", copy / "configs")
    with (copy / "mae_jax/optim.py").open("a") as file:
        file.write("# changed on one host only\n")
    run = hosts.apart(folder, folder / "code", HOSTS, 1, places=[hosts.ROOT, copy])
    assert run.end() == [2, 2], run.text()
    for lines in run.said:
        assert "host 1: code of mae_jax is" in "\n".join(lines)


def test_a_host_with_fewer_examples_or_none_is_refused_by_all(folder):
    places = [folder / "place 0", folder / "place 1"]
    for place, count in zip(places, (6, 5), strict=True):
        (place / "photos").mkdir(parents=True)
        shutil.copytree(hosts.ROOT / "configs", place / "configs")
        for index in range(count):
            Image.new("L", (40, 40), index).save(place / "photos" / f"{index}.png")
        (place / "mae_jax").symlink_to(hosts.ROOT / "mae_jax")
    own = [["--config.data.source=folder:photos", "--config.batch_size=2"]] * 2
    run = hosts.apart(folder, folder / "data", HOSTS, 1, own_flags=own, places=places)
    assert run.end() == [2, 2], run.text()
    for lines in run.said:
        assert "host 1: the number of examples is 5, on host 0 it is 6" in "\n".join(lines)

    shutil.rmtree(places[1] / "photos")
    run = hosts.apart(folder, folder / "data", HOSTS, 1, own_flags=own, places=places)
    assert run.end() == [2, 2], run.text()
    for lines in run.said:
        assert "host 1 refuses to start: " in "\n".join(lines)
    assert not (folder / "data").exists()


def test_an_error_of_one_host_ends_it_at_once_and_then_the_others(folder):
    places = [folder / "disk 0", folder / "disk 1"]
    for host, place in enumerate(places):
        (place / "photos").mkdir(parents=True)
        shutil.copytree(hosts.ROOT / "configs", place / "configs")
        for index in range(64):
            Image.new("L", (40, 40), index).save(place / "photos" / f"{index}.png")
        (place / "mae_jax").symlink_to(hosts.ROOT / "mae_jax")
        if host == 1:
            for index in range(0, 64, 8):
                (place / "photos" / f"{index}.png").write_bytes(b"damaged")
    own = [["--config.data.source=folder:photos", "--config.batch_size=16"]] * 2
    began = time.monotonic()
    run = hosts.apart(folder, folder / "error", HOSTS, 1, own_flags=own, places=places)
    assert run.end() == [-signal.SIGABRT, 2], run.text()
    assert time.monotonic() - began < 120  # JAX's barrier at the end would take 300 s
    assert "cannot be read, more than config.data.max_bad_fraction" in "\n".join(run.said[1])


FAILING_SAVE = """
import errno, os, sys
sys.path.insert(0, os.getcwd())
from mae_jax import __main__, checkpoint

def full(self):
    raise OSError(errno.ENOSPC, "No space left on device")

checkpoint.Checkpointer._write_digests = full
sys.exit(__main__.main(["train", *sys.argv[2:]]))
"""


def test_a_save_that_fails_on_one_host_ends_all(folder, monkeypatch):
    monkeypatch.setattr(hosts, "RECORDING", FAILING_SAVE)
    began = time.monotonic()
    run = hosts.apart(folder, folder / "full", HOSTS, 1, seen="unused")
    assert run.end() == [1, -signal.SIGABRT], run.text()
    assert time.monotonic() - began < 120
    assert "host 0: checkpoint 3 could not be written" in "\n".join(run.said[0])
    assert "No space left on device" in "\n".join(run.said[0])


def test_a_workdir_that_is_not_shared_is_refused_by_all(folder):
    places = [folder / "own 0", folder / "own 1"]
    for place in places:
        place.mkdir()
        for name in ("mae_jax", "configs"):
            (place / name).symlink_to(hosts.ROOT / name)
    run = hosts.apart(folder, Path("run"), HOSTS, 1, places=places)
    assert run.end() == [2, 2], run.text()
    for lines in run.said:
        assert "hosts [1] do not see there what host 0 writes" in "\n".join(lines)


def test_a_host_without_the_others_says_so_and_ends(folder):
    port = hosts.free_port()
    common = [*hosts.flags(folder, folder / "lonely"), "--config.hosts.connect_seconds=3"]
    start = [hosts.sys.executable, "-m", "mae_jax", "train", *common, "--num_hosts=2"]
    run = hosts.Processes(
        [
            [*start, "--host=0", f"--coordinator=localhost:{hosts.free_port()}"],
            [*start, "--host=1", f"--coordinator=localhost:{port}"],
        ],
        1,
    )
    assert run.end() == [2, 2], run.text()
    first, second = ("\n".join(lines) for lines in run.said)
    assert "not all hosts came" in first and "Start on all workers" in first
    assert f"cannot reach the coordinator (host 0) at localhost:{port}" in second


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_hosts=2", "--host=0"], "--coordinator=HOST:PORT"),
        (["--coordinator=10.0.0.2:8476", "--num_hosts=2"], "give all three"),
        (["--coordinator=10.0.0.2:8476", "--num_hosts=2", "--host=2"], "from 0 to num_hosts - 1"),
        (["--coordinator=10.0.0.2", "--num_hosts=2", "--host=0"], "write HOST:PORT"),
        (["--distributed"], "found no cluster"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(flags, words):
    values = dict(flag.removeprefix("--").split("=") for flag in flags if "=" in flag)
    given = {
        name: int(value) if value.isdigit() else value
        for name, value in ((key, values[key]) for key in values)
    }
    renamed = {"coordinator": None, "num_hosts": None, "host": None} | given
    with pytest.raises(ValueError, match=words):
        distributed.join(**renamed)


@pytest.mark.parametrize(
    "environ, by",
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "4 processes of srun"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "2 processes of a TPU pod"),
    ],
)
def test_one_of_several_processes_is_told_to_join_them(environ, by):
    with pytest.raises(ValueError, match=f"{by}: start on all workers, and add --distributed"):
        distributed.refuse_to_run_alone(environ)
    distributed.refuse_to_run_alone({"TPU_WORKER_HOSTNAMES": "localhost"})


@pytest.mark.parametrize(
    "workdir, cache",
    [
        ("gs://bucket/runs/one", "gs://bucket/runs/compilation_cache"),
        ("gs://bucket/one/", "gs://bucket/compilation_cache"),
        ("/data/one", "/data/compilation_cache"),
    ],
)
def test_what_was_compiled_is_kept_beside_the_workdir(workdir, cache):
    assert train.compilation_cache(workdir) == cache


def test_the_host_that_differs_from_most_is_the_one_that_is_named():
    usual = {"config.seed": 0}
    assert distributed.describe_differences([{"config.seed": 1}, usual, usual]) == [
        "host 0: config.seed is 1, on host 1 it is 0"
    ]
    assert distributed.describe_differences([usual, usual]) == []


def test_watchdog_prints_the_stacks_of_all_threads_when_nothing_ends(capfd):
    stalled, printed = threading.Event(), ""
    waiting = threading.Thread(target=stalled.wait, name="reader")
    waiting.start()
    with distributed.watchdog(0.2) as happened:
        happened("step 7")
        while "most recent call first" not in printed:
            printed += capfd.readouterr().err
    stalled.set()
    waiting.join()
    printed += capfd.readouterr().err
    assert "nothing ended for 0.2 s after step 7" in printed
    assert printed.count("most recent call first") >= 2
    assert "test_distributed.py" in printed


def test_an_error_that_a_lost_host_caused_is_not_taken_for_ones_own(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    assert distributed.alone_with(ValueError("one's own"))
    for wrap in (lambda error: OSError("explained"), lambda error: None):
        try:
            try:
                raise jax.errors.JaxRuntimeError("Connection closed by peer")
            except jax.errors.JaxRuntimeError as lost:
                if (cause := wrap(lost)) is not None:
                    raise cause from lost
                raise OSError("while it was explained")  # noqa: B904
        except OSError as error:
            assert not distributed.alone_with(error)
