"""Four hosts with two devices each: the same promises as with two, in tests/test_distributed.py."""

import signal

import hosts
import numpy as np
import pytest

from mae_jax import distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def alone(folder):
    run = hosts.apart(folder, folder / "alone", 1, 8)
    assert run.end() == [0], run.text()
    return folder / "alone"


def test_four_hosts_make_the_same_run_and_read_every_example_once(folder, alone):
    workdir, seen = folder / "four", str(folder / "four-seen")
    run = hosts.apart(folder, workdir, 4, 2, seen=seen)
    assert run.end() == [0] * 4, run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)
    hosts.assert_read_once(hosts.examples(seen, 4))


def test_lost_hosts_end_all_and_the_run_goes_on_to_the_same_losses(folder, alone):
    workdir = folder / "killed"
    for lost, sentence in ((2, "host 2 was lost"), (0, "host 0, the coordinator, is gone")):
        run = hosts.run_until_logged(folder, workdir, 4, 2)
        hosts.signal_host(workdir, lost, signal.SIGKILL)
        assert run.end() == [distributed.PREEMPTED], run.text()
        assert sentence in run.text()
        assert run.text().count("Start all hosts again") == 4
    run = hosts.launched(folder, workdir, 4, 2)
    assert run.end() == [0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)


def test_a_run_moves_to_half_as_many_hosts_and_to_twice_as_many(folder, alone):
    workdir = folder / "moved"
    for count in (4, 2):
        run = hosts.run_until_logged(folder, workdir, count, 2)
        hosts.signal_host(workdir, count - 1, signal.SIGTERM)
        assert run.end() == [distributed.PREEMPTED], run.text()
    run = hosts.launched(folder, workdir, 4, 2)
    assert run.end() == [0], run.text()
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(alone), rtol=1e-5)


def test_the_one_of_four_that_differs_is_named_by_all(folder):
    own = [[], [], ["--config.seed=1"], []]
    run = hosts.apart(folder, folder / "config", 4, 1, own_flags=own)
    assert run.end() == [2] * 4, run.text()
    for lines in run.output:
        assert "host 2: config.seed is 1, on host 0 it is 0" in "\n".join(lines)


def test_three_of_four_hosts_do_not_start_without_the_fourth(folder):
    common = [*hosts.flags(folder, folder / "three"), "--config.hosts.connect_seconds=15"]
    joined = [f"--coordinator=localhost:{hosts.free_port()}", "--num_hosts=4"]
    start = [hosts.sys.executable, "-m", "mae_jax", "train", *common, *joined]
    run = hosts.Processes([[*start, f"--host={host}"] for host in range(3)], 1)
    assert run.end() == [2] * 3, run.text()
    assert "not all hosts came" in run.text()
    assert "Start on all workers: the same command on all 4 hosts" in run.text()
