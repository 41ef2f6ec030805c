"""Several hosts are one run, or none: real processes on this machine, joined over gloo."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent import futures
from pathlib import Path

import hosts
import jax
import numpy as np
import pytest

from mae_jax import checkpoint, distributed

HOSTS, DEVICES = 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def alone(folder):
    """One process with as many devices as the hosts have together."""
    seen = str(folder / "alone-seen")
    own = [[hosts.SAVE_ONCE]]
    run = hosts.apart(folder, folder / "alone", 1, HOSTS * DEVICES, own, seen=seen)
    assert run.end() == [0], run.text()
    return folder / "alone"


def assert_refused(run, words, hosts=HOSTS):
    """Check that every host ends with a mistake of the user, and says so."""
    assert run.end() == [2] * hosts, run.text()
    assert all(words in "\n".join(lines) for lines in run.output), run.text()


def test_two_hosts_make_the_run_of_one_and_read_every_example_once(folder, alone):
    workdir, seen = folder / "two", str(folder / "two-seen")
    own = [[hosts.SAVE_ONCE]] * HOSTS
    run = hosts.apart(folder, workdir, HOSTS, DEVICES, own, seen=seen)
    assert run.end() == [0, 0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)
    assert len({round(loss, 5) for loss in hosts.losses(alone)}) > hosts.STEPS / 2

    given = hosts.examples(seen, HOSTS)
    assert {len(indices) for step, indices in given.items() if step < hosts.STEPS} == {128}
    hosts.assert_read_once(given)
    single = hosts.examples(str(folder / "alone-seen"), 1)
    for step in range(hosts.STEPS):
        assert sorted(given[step]) == sorted(single[step])

    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert not any("loss" in line for line in run.output[1]), "only host 0 reports"


def test_a_lost_host_ends_all_and_the_run_goes_on_to_the_same_losses(folder, alone):
    workdir = folder / "killed"
    for lost, sentence in ((1, "host 1 was lost"), (0, "host 0, the coordinator, is gone")):
        run = hosts.run_until_logged(folder, workdir, HOSTS, DEVICES)
        hosts.signal_host(workdir, lost, signal.SIGKILL)
        assert run.end() == [distributed.PREEMPTED], run.text()
        assert sentence in run.text()
        assert f"host {lost}: killed (SIGKILL)" in run.text()
        assert "Start all hosts again" in run.text()
        assert f"host {lost} ended first" in run.output[0][-1]
    run = hosts.launched(folder, workdir, HOSTS, DEVICES, hosts.SAVE_ONCE)
    assert run.end() == [0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)


def test_sigterm_to_one_host_stops_all_and_the_run_goes_on_with_half_and_twice_as_many(
    folder, alone
):
    workdir = folder / "moved"
    for count in (2, 1):
        run = hosts.run_until_logged(folder, workdir, count, DEVICES)
        hosts.signal_host(workdir, count - 1, signal.SIGTERM)
        assert run.end() == [distributed.PREEMPTED], run.text()
        assert "it is saved" in run.text()
        last = hosts.logged(workdir)[-1]["step"]
        assert (workdir / "checkpoints" / str(last)).is_dir()
    run = hosts.launched(folder, workdir, 2, DEVICES, hosts.SAVE_ONCE)
    assert run.end() == [0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)


def test_a_host_with_another_config_and_other_code_is_refused_by_all_with_the_difference(folder):
    copy = folder / "copy"
    shutil.copytree(hosts.ROOT / "mae_jax", copy / "mae_jax")
    shutil.copytree(hosts.ROOT / "configs", copy / "configs")
    with (copy / "mae_jax/optim.py").open("a") as file:
        file.write("# changed on one host only\n")
    own = [[], ["--config.optim.blr=1.0"]]
    run = hosts.apart(folder, folder / "code", HOSTS, 1, own, [hosts.ROOT, copy])
    assert_refused(run, "host 1: code of mae_jax is")
    assert_refused(run, "host 1: config.optim.blr is 1.0, on host 0 it is 0.00015")
    assert not (folder / "code").exists()


def test_a_host_with_fewer_examples_or_none_is_refused_by_all(folder):
    folders = hosts.checkouts(folder / "six", folder / "five")
    for own, count in zip(folders, (6, 5), strict=True):
        hosts.images(own, count)
    flags = [["--config.data.source=folder:images", "--config.batch_size=2"]] * 2
    run = hosts.apart(folder, folder / "data", HOSTS, 1, flags, folders)
    assert_refused(run, "host 1: the number of examples is 5, on host 0 it is 6")

    shutil.rmtree(folders[1] / "images")
    run = hosts.apart(folder, folder / "data", HOSTS, 1, flags, folders)
    assert_refused(run, "host 1 refuses to start: ")
    assert not (folder / "data").exists()


def test_an_error_of_one_host_ends_it_at_once_and_then_the_others(folder):
    folders = hosts.checkouts(folder / "disk 0", folder / "disk 1")
    for own in folders:
        hosts.images(own, 64)
    for index in range(0, 64, 8):
        (folders[1] / "images" / f"{index}.png").write_bytes(b"damaged")
    flags = [["--config.data.source=folder:images", "--config.batch_size=16"]] * 2
    began = time.monotonic()
    run = hosts.apart(folder, folder / "error", HOSTS, 1, flags, folders)
    assert run.end() == [-signal.SIGABRT, 2], run.text()
    assert time.monotonic() - began < 120  # JAX's barrier at the end would take 300 s
    assert "cannot be read, more than config.data.max_bad_fraction" in "\n".join(run.output[1])


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
    assert "host 0: checkpoint 3 could not be written" in "\n".join(run.output[0])
    assert "No space left on device" in "\n".join(run.output[0])


def test_a_workdir_that_is_not_shared_is_refused_by_all(folder):
    folders = hosts.checkouts(folder / "own 0", folder / "own 1")
    run = hosts.apart(folder, Path("run"), HOSTS, 1, folders=folders)
    assert_refused(run, "hosts [1] do not see there what host 0 writes")


def test_a_host_without_the_others_says_so_and_ends(folder):
    common = [*hosts.flags(folder, folder / "lonely"), "--config.hosts.connect_seconds=3"]
    start = [sys.executable, "-m", "mae_jax", "train", *common, "--num_hosts=2"]
    addresses = [f"localhost:{hosts.free_port()}" for _ in range(2)]
    commands = [
        [*start, f"--host={host}", f"--coordinator={address}"]
        for host, address in enumerate(addresses)
    ]
    run = hosts.Processes(commands, 1)
    assert_refused(run, "not all hosts came to the coordinator (host 0) at localhost:")
    for lines, address in zip(run.output, addresses, strict=True):
        assert f"{address}. Start on all workers" in "\n".join(lines)


@pytest.mark.parametrize(
    "coordinator, num_hosts, host, words",
    [
        (None, 2, 0, "give all three"),
        ("10.0.0.2:8476", 2, None, "give all three"),
        ("10.0.0.2:8476", 2, 2, "from 0 to num_hosts - 1"),
        ("10.0.0.2", 2, 0, "HOST:PORT of host 0"),
        (None, None, None, "found no cluster"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(coordinator, num_hosts, host, words):
    with pytest.raises(ValueError, match=words):
        distributed.join(coordinator, num_hosts, host)


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


def test_the_host_that_differs_from_most_is_the_one_that_is_named():
    usual = {"config.seed": 0}
    assert distributed.describe_differences([{"config.seed": 1}, usual, usual]) == [
        "host 0: config.seed is 1, on host 1 it is 0"
    ]
    assert distributed.describe_differences([usual, usual]) == []


def test_watchdog_is_silent_while_things_end_and_when_it_is_off(capfd):
    for seconds in (1.0, 0):
        with distributed.watchdog(seconds) as heartbeat:
            for _ in range(8):
                time.sleep(0.2)
                heartbeat()
    assert capfd.readouterr().err == ""


def test_watchdog_prints_the_stacks_of_all_threads_when_nothing_ends(capfd):
    stalled, printed = threading.Event(), ""
    waiting = threading.Thread(target=stalled.wait, name="reader")
    waiting.start()
    with distributed.watchdog(0.2) as heartbeat:
        deadline = time.monotonic() + 30
        while "most recent call first" not in printed and time.monotonic() < deadline:
            heartbeat()  # again, should a read have met the writing thread and lost its lines
            time.sleep(0.5)
            printed += capfd.readouterr().err
    stalled.set()
    waiting.join()
    printed += capfd.readouterr().err
    assert "Timeout (0:00:00.2" in printed
    assert printed.count("most recent call first") >= 2
    assert "test_distributed.py" in printed


LOST = (
    jax.errors.JaxRuntimeError("Connection closed by peer"),
    ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
)


@pytest.mark.parametrize("lost", LOST, ids=lambda lost: type(lost).__name__)
def test_an_error_that_a_lost_host_caused_does_not_end_this_host(lost, monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    assert distributed.alone_with(ValueError("only here"))
    assert not distributed.alone_with(lost)
    try:
        try:
            raise lost
        except Exception:
            raise OSError("while it was explained")  # noqa: B904
    except OSError as error:
        assert not distributed.alone_with(error)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 1)
    assert not distributed.from_others(lost)


def test_a_save_that_fails_because_a_host_is_lost_is_not_called_an_error_of_the_disk(
    tmp_path, monkeypatch
):
    saver = checkpoint.Checkpointer(tmp_path)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="Gloo"), saver._explained():
        raise LOST[1]
    with pytest.raises(checkpoint.SaveError, match="No space"), saver._explained():
        raise OSError("No space left on device")


def test_sigterm_is_noticed_and_does_not_kill():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.listening() as stop_requested:
        assert not stop_requested()
        distributed.raise_if_stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        with pytest.raises(distributed.Preempted, match="during an evaluation"):
            distributed.raise_if_stopping()
    distributed.raise_if_stopping()
    assert signal.getsignal(signal.SIGTERM) is before


ASKED_TO_STOP = """
    import contextlib, os, signal, sys, time
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import hosts, jax.numpy as jnp
    from states import State
    from mae_jax import checkpoint, distributed

    workdir, when = sys.argv[1:]
    distributed.join(f"localhost:{hosts.free_port()}", 1, 0)
    stack = contextlib.ExitStack()
    stop_requested = stack.enter_context(distributed.listening())
    if when == "a save ends":
        run = checkpoint.Checkpointer(workdir)
        assert not stop_requested()
        run.save(12, State(jnp.int32(12), {"a": jnp.ones(8)}, {}, {}))
        assert not stop_requested()
        run.wait()  # it ends when the loop is a step further
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # the service looks once a second
    print("MISSED", next((call for call in range(30) if stop_requested()), "for ever"))
"""


@pytest.mark.parametrize("when", ["a save ends", "it compiles"])
def test_hosts_that_are_asked_to_stop_stop_at_the_next_step(tmp_path, when):
    command = [sys.executable, "-c", textwrap.dedent(ASKED_TO_STOP), str(tmp_path), when]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "MISSED 0" in done.stdout.splitlines(), done.stdout + done.stderr


def test_preempted_ends_a_process_with_its_own_exit_status():
    code = "from mae_jax import distributed; raise distributed.Preempted('saved step 3')"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=300)
    assert done.returncode == distributed.PREEMPTED == 75
    assert str(distributed.Preempted("saved step 3")) == "saved step 3"


def test_a_run_in_a_thread_listens_to_no_signal():
    def body():
        with distributed.listening() as stop_requested:
            return stop_requested()

    with futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(body).result() is False
