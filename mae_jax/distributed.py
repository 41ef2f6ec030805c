"""Several hosts, one run: they find each other, agree on it and its end, and tell when it stalls.

A host is one process; host 0 is the coordinator. What keeps hosts from being one run ends all of
them, with a sentence: hosts that went on alone would be N runs that write to one workdir.
"""

import contextlib
import faulthandler
import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # the hosts' key-value store has no public name
from jax.experimental import multihost_utils

from mae_jax.errors import UserError

COORDINATOR_SECONDS = 5  # that host 0 outlives its error: who has the same one ends by itself first
PREEMPTED = 75  # exit status "try again later": EX_TEMPFAIL of sysexits.h
AGREE_SECONDS = 600  # the longest wait for a host that opens its dataset
# Set for the processes of a job by the program that started them: how many there are.
STARTED_BY = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}


def join(
    coordinator: str | None = None,
    num_hosts: int | None = None,
    host: int | None = None,
    *,
    connect_seconds: int = 50,
    heartbeat_seconds: int = 100,
) -> None:
    """Makes this process one of the hosts; without an address, of the cluster that JAX finds.

    A host that waited for the others in vain says so and ends the process: with status 75 in
    a cluster, whose launcher starts all again, and with 2 where a user gave the address.

    Args:
      coordinator: HOST:PORT of host 0, as the others reach it.
      connect_seconds: how long hosts wait for each other here.
      heartbeat_seconds: after this time without a sign of a host, all end.

    Raises:
      UserError: the three do not belong together, the port is taken, or there is no cluster.
    """
    if coordinator is not None:
        if num_hosts is None or host is None or not 0 <= host < num_hosts:
            raise UserError(
                f"--coordinator={coordinator} --num_hosts={num_hosts} --host={host}: give all"
                " three, with --host from 0 to num_hosts - 1, different on each host"
            )
        name, _, port = coordinator.rpartition(":")
        if not (name and port.isdigit() and 0 < int(port) < 2**16):
            raise UserError(
                f"--coordinator={coordinator}: write HOST:PORT, such as 10.0.0.2:8476, a free port"
                " of host 0"
            )
    elif num_hosts is not None or host is not None:
        raise UserError(
            "--num_hosts and --host need --coordinator=HOST:PORT, the address of host 0"
        )

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would abort the process from C++, in words for its own developers.
    too_late = threading.Timer(connect_seconds, _give_up, [coordinator, num_hosts, connect_seconds])
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            host,
            initialization_timeout=connect_seconds + 60,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        if coordinator is None:
            raise UserError(
                f"--distributed: JAX found no cluster to join ({error}). It knows TPU pods, Slurm,"
                " Open MPI and Kubernetes; elsewhere give each host --coordinator=HOST:PORT"
                " --num_hosts=N --host=I"
            ) from error
        raise UserError(f"--coordinator={coordinator}, host {host}: {error}") from error
    finally:
        too_late.cancel()
    if num_hosts is not None and jax.process_count() != num_hosts:
        raise UserError(f"--num_hosts={num_hosts}, but JAX sees {jax.process_count()} of them")


def refuse_to_run_alone(environ: Mapping[str, str]) -> None:
    """Raises UserError if this was started as one of several processes, and not told to join."""
    several = {
        by: int(environ[name]) for name, by in STARTED_BY.items() if environ.get(name, "").isdigit()
    }
    workers = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    several["a TPU pod"] = len(workers)
    for by, count in several.items():
        if count > 1:
            raise UserError(
                f"this is one of {count} processes of {by}: start on all workers, and add"
                " --distributed, so that they become one run"
            )


def source_digest() -> str:
    """Of the text of this package: what `git describe` does not tell of changed files."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    text = b"".join(str(file.relative_to(root)).encode() + file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:12]


@contextlib.contextmanager
def agreement(about: str) -> Iterator[dict[str, Any]]:
    """Around what every host must do alike; fill the dict with what must be the same on all.

    Keys are 'config.optim.blr' and the like. What one host refuses, all refuse.

    Raises:
      UserError: on all hosts, if they differ, or if the body raised one on some host.
    """
    facts: dict[str, Any] = {}
    refused = None
    try:
        yield facts
    except ValueError as error:
        refused = error
        facts = {"refuses to start": str(error)}
    everyone = _exchange(about, facts)
    if refused is not None and all(theirs == facts for theirs in everyone):
        raise refused
    differences = describe_differences(everyone)
    if differences:
        raise UserError(
            f"the {len(everyone)} hosts must be alike to be one run:\n  "
            + "\n  ".join(differences)
            + "\nNothing was started on any of them. Give all the same command, code and data."
        )


def describe_differences(everyone: list[dict[str, Any]]) -> list[str]:
    """One line for each fact in which a host differs from what most of them have."""
    counts = Counter(json.dumps(facts, sort_keys=True) for facts in everyone)
    usual = json.loads(counts.most_common(1)[0][0])
    usual_host = everyone.index(usual)
    lines = []
    for host, facts in enumerate(everyone):
        if "refuses to start" in facts:
            lines.append(f"host {host} refuses to start: {facts['refuses to start']}")
            continue
        lines += [
            f"host {host}: {key} is {facts.get(key, 'missing')!r},"
            f" on host {usual_host} it is {usual.get(key, 'missing')!r}"
            for key in sorted(facts.keys() | usual.keys())
            if facts.get(key) != usual.get(key) and "refuses to start" not in usual
        ]
    return lines


class Preempted(SystemExit):
    """Asked to stop, and the state was saved: ends the process with exit status PREEMPTED."""

    code = PREEMPTED


def preemption() -> Callable[[], bool]:
    """Listens for SIGTERM, from here on.

    With `jax.distributed` its service listens, and agrees with all hosts on when to stop: a handler
    of ours would switch it off.

    Returns:
      Save and stop now? On all hosts alike; to be asked once at every step.
    """
    if jax.distributed.is_initialized():
        # The service stops all at the call after the furthest one that a host had made when the
        # signal came. It forgets a signal that came before the first call, so that is made here.
        calls = itertools.count()

        def requested() -> bool:
            return multihost_utils.reached_preemption_sync_point(next(calls))

        requested()
        return requested
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked.is_set


@contextlib.contextmanager
def watchdog(stall_seconds: float) -> Iterator[Callable[[str], None]]:
    """Prints the stacks of all threads when nothing happened for a while; 0: never.

    Yields a function to call with what just happened, such as 'step 12'.
    """
    last = (time.monotonic(), "the start")
    ended = threading.Event()

    def happened(what: str) -> None:
        nonlocal last
        last = time.monotonic(), what

    def watch() -> None:
        told = None
        while not ended.wait(min(stall_seconds / 4, 5)):
            since, what = last
            if told != since and time.monotonic() - since > stall_seconds:
                told = since
                print(
                    f"host {global_state.process_id}: nothing ended for {stall_seconds:g} s after"
                    f" {what} (config.stall_seconds); all threads are at:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.__stderr__ or 2)

    if stall_seconds:
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield happened
    finally:
        ended.set()


def alone_with(error: BaseException) -> bool:
    """Whether other hosts may not have this error: there are some, and it is none of JAX's.

    Theirs may be that another host is gone, which the heartbeats are to tell: see launch/host.sh.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError):
            return False
        cause = cause.__cause__ or cause.__context__
    return jax.process_count() > 1


def leave(status: int) -> NoReturn:
    """Ends this process at once, after an error that the other hosts may not have.

    The ordinary way out waits for the others, in barriers of JAX and of a save, while they wait for
    this host in a collective. Now they notice that it is gone, and end as they do without it.
    """
    if global_state.process_id == 0:
        time.sleep(COORDINATOR_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exchange(about: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What each host has to say; through the coordinator, so that no device is needed."""
    client = global_state.client
    if client is None:
        return [json.loads(json.dumps(facts))]
    client.key_value_set(f"mae_jax/{about}/{global_state.process_id}", json.dumps(facts))
    said = []
    for host in range(global_state.num_processes):
        try:
            text = client.blocking_key_value_get(f"mae_jax/{about}/{host}", AGREE_SECONDS * 1000)
        except RuntimeError as error:
            raise UserError(
                f"host {host} did not get as far as the agreement on its {about} within"
                f" {AGREE_SECONDS} s: see what it printed ({error})"
            ) from error
        said.append(json.loads(text))
    return said


def _give_up(coordinator: str | None, num_hosts: int | None, seconds: float) -> None:
    """Says why the others did not come, and ends the process."""
    status = PREEMPTED if coordinator is None else 2
    coordinator = coordinator or getattr(global_state, "coordinator_address", None)
    host = global_state.process_id
    all_hosts = "all" if num_hosts is None else f"all {num_hosts}"
    reason = ""
    if coordinator and host:
        name, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            reason = (
                f" it cannot reach the coordinator (host 0) at {coordinator} ({error}). Is host 0"
                " running, is the address right, and is the port open in the firewall?"
            )
    if not reason:
        reason = f" not all hosts came to the coordinator at {coordinator}."
    print(
        f"host {host} gives up after {seconds:g} s:{reason} Start on all workers: the same command"
        f" on {all_hosts} hosts, within that time of each other.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(status)


def log_once(line: str) -> None:
    """Print a line, on host 0 only."""
    if jax.process_index() == 0:
        print(line, flush=True)
