"""Two hosts in network namespaces, each with an address and a name of its own. Needs root."""

import os
import subprocess

import hosts
import numpy as np
import pytest

from mae_jax import distributed

BRIDGE = "maebr"
SPACES = ("maeh0", "maeh1")
# Inside a namespace: its own host name and table of names, and then the command.
ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, stderr=None if check else subprocess.DEVNULL)


@pytest.fixture
def network():
    if os.geteuid() != 0:
        pytest.fail("network namespaces need root: run this test as root")
    remove()
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    for host, space in enumerate(SPACES):
        ip("netns", "add", space)
        ip("link", "add", f"{space}out", "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", f"{space}out", "master", BRIDGE, "up")
        ip("-n", space, "addr", "add", f"10.213.0.{host + 1}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
    yield
    remove()


def remove() -> None:
    for space in SPACES:
        ip("link", "del", f"{space}out", check=False)
        ip("netns", "del", space, check=False)
    ip("link", "del", BRIDGE, check=False)


def start(folder, workdir) -> hosts.Processes:
    table = folder / "names"
    table.write_text("127.0.0.1 localhost\n10.213.0.1 maeh0\n10.213.0.2 maeh1\n")
    commands = [
        [
            *("ip", "netns", "exec", space, "unshare", "--uts", "--mount", "bash", "-c", ENTER),
            *("enter", space, str(table), "env", f"NAME=host {host}", "bash", "launch/host.sh"),
            *hosts.flags(folder, workdir),
            *("--coordinator=10.213.0.1:8476", "--num_hosts=2", f"--host={host}"),
        ]
        for host, space in enumerate(SPACES)
    ]
    return hosts.Processes(commands, 2)


def test_hosts_with_addresses_of_their_own_make_one_run_and_survive_a_cut_cable(network, tmp_path):
    """As one host makes it, though the second one's cable was pulled in between."""
    alone = hosts.apart(tmp_path, tmp_path / "alone", 1, 4)
    assert alone.end() == [0], alone.text()

    workdir = tmp_path / "run"
    run = start(tmp_path, workdir)
    run.until(lambda: len(hosts.logged(workdir)) > 4)
    ip("link", "set", "maeh1out", "down")
    assert run.end() == [distributed.PREEMPTED] * 2, run.text()
    assert "host 0: host 1 was lost" in run.text()
    assert "host 1: host 0, the coordinator, is gone" in run.text()

    ip("link", "set", "maeh1out", "up")
    run = start(tmp_path, workdir)
    assert run.end() == [0, 0], run.text()
    assert any("resumed at step" in line for line in run.output[0])
    np.testing.assert_allclose(hosts.losses(workdir), hosts.losses(tmp_path / "alone"), rtol=1e-5)


def test_an_address_that_nobody_answers_is_named_within_a_minute(network, tmp_path):
    ip("link", "set", "maeh1out", "down")
    run = start(tmp_path, tmp_path / "run")
    assert run.end() == [2, 2], run.text()
    for lines in run.output:
        assert "came to the coordinator (host 0) at 10.213.0.1:8476" in "\n".join(lines)
