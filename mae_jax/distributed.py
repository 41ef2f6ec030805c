"""Make one run of several hosts: they join, agree on their command, stop together, report stalls.

A host is one process; host 0 is the coordinator. Whatever keeps the hosts from being one run ends
all of them with an error: hosts that went on alone would be N runs that write to one workdir.
"""

import contextlib
import faulthandler
import functools
import hashlib
import itertools
import json
import os
import re
import signal
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

COORDINATOR_SECONDS = 5  # host 0 outlives its error, so that hosts with the same error report it
PREEMPTED = 75  # exit status "try again later": EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
AGREE_SECONDS = 600  # the longest wait for a host that opens its dataset
REFUSAL = "refuses to start"  # key of what a host cannot agree to
# Environment variable with the number of processes -> the program that sets it.
STARTED_BY = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}


def join(
    coordinator: str | None = None,
    num_hosts: int | None = None,
    host: int | None = None,
    *,
    connect_seconds: int = 50,
    heartbeat_seconds: int = 100,
) -> None:
    """Make this process one of the hosts; without an address, of the cluster that JAX detects.

    A host that waits for the others in vain prints why and ends its process: with status 75 in a
    cluster, whose launcher starts all hosts again, and with 2 if a user gave the address.

    Args:
      coordinator: HOST:PORT of host 0, as the other hosts reach it.
      connect_seconds: how long hosts wait for each other here.
      heartbeat_seconds: all hosts end when one gives no sign for this time.
    """
    own = f"--coordinator={coordinator} --num_hosts={num_hosts} --host={host}"
    complete = re.fullmatch(r".+:\d{1,5}", coordinator or "") and host in range(num_hosts or 0)
    if (coordinator, num_hosts, host) != (None, None, None) and not complete:
        raise UserError(
            f"{own}: give all three: HOST:PORT of host 0, such as 10.0.0.2:8476; the number of"
            " hosts; and which one this is, from 0 to num_hosts - 1"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # On a timeout of its own, JAX would abort the process from C++ with a stack trace.
    give_up = threading.Timer(connect_seconds, _give_up, [coordinator, num_hosts, connect_seconds])
    give_up.daemon = True
    give_up.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            host,
            initialization_timeout=connect_seconds + 60,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        if coordinator is not None:
            raise UserError(f"{own}: {error}") from error
        raise UserError(
            f"--distributed: JAX found no cluster to join ({error}). It knows TPU pods, Slurm,"
            " Open MPI and Kubernetes; elsewhere give each host --coordinator=HOST:PORT"
            " --num_hosts=N --host=I"
        ) from error
    finally:
        give_up.cancel()
    if num_hosts is not None and jax.process_count() != num_hosts:
        raise UserError(f"--num_hosts={num_hosts}, but JAX sees {jax.process_count()} hosts")


def refuse_to_run_alone(
    environ: Mapping[str, str],
    way_out: str = "start on all workers, and add --distributed, so that they become one run",
) -> None:
    """Raise a UserError if a launcher started this as one of several processes."""
    counts = {by: environ.get(name, "") for name, by in STARTED_BY.items()}
    counts["a TPU pod"] = str(len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")))
    for launcher, count in counts.items():
        if count.isdigit() and int(count) > 1:
            raise UserError(f"this is one of {count} processes of {launcher}: {way_out}")


def source_digest() -> str:
    """Return a digest of this package's source: `git describe` does not show what was edited."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    text = b"".join(str(file.relative_to(root)).encode() + file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:12]


@contextlib.contextmanager
def agreement(about: str) -> Iterator[dict[str, Any]]:
    """Compare facts between hosts after the body, and refuse to start on all hosts if they differ.

    The body fills the dict with what must be equal, such as {"config.optim.blr": 1e-4}. A
    ValueError of the body on one host ends all hosts too.

    Args:
      about: name of the facts, unique among agreements.
    """
    facts: dict[str, Any] = {}
    refusal = None
    try:
        yield facts
    except ValueError as error:  # ours, or that of a library that opens the dataset
        refusal = error
        facts = {REFUSAL: str(error)}
    all_facts = _exchange(about, facts)
    if refusal is not None and all(theirs == facts for theirs in all_facts):
        raise refusal
    if differences := describe_differences(all_facts):
        raise UserError(
            f"the {len(all_facts)} hosts must be alike to be one run:\n  "
            + "\n  ".join(differences)
            + "\nNo host has started. Give all hosts the same command, code and data."
        )


def describe_differences(all_facts: list[dict[str, Any]]) -> list[str]:
    """Return a line for each refusal, or for each fact that differs from what most hosts have."""
    refusals = {host: facts[REFUSAL] for host, facts in enumerate(all_facts) if REFUSAL in facts}
    if refusals:
        return [f"host {host} {REFUSAL}: {reason}" for host, reason in refusals.items()]
    counts = Counter(json.dumps(facts, sort_keys=True) for facts in all_facts)
    usual = json.loads(counts.most_common(1)[0][0])
    usual_host = all_facts.index(usual)
    return [
        f"host {host}: {key} is {facts.get(key, 'missing')!r},"
        f" on host {usual_host} it is {usual.get(key, 'missing')!r}"
        for host, facts in enumerate(all_facts)
        for key in sorted(facts.keys() | usual.keys())
        if facts.get(key) != usual.get(key)
    ]


class Preempted(SystemExit):
    """The end of a run that was asked to stop and saved its state, with exit status PREEMPTED."""

    code = PREEMPTED


class Interrupted(Preempted):
    """A `Preempted` by Ctrl-C, with a status for which no launcher starts the run again."""

    code = INTERRUPTED


_stop_requested: Callable[[], bool] | None = None  # of the run that this process is making
_interrupts: list[int] = []  # signals of Ctrl-C that came during it


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Listen for SIGTERM and Ctrl-C; a second Ctrl-C ends the process at once.

    Yields:
      A function to call once per step and per batch of an evaluation: whether to save and stop
      now, equal on all hosts. Once True, it stays True.
    """
    global _stop_requested
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python hears signals in its main thread only
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    requested = _listen_for_sigterm()
    _interrupts.clear()
    signal.signal(signal.SIGINT, _interrupt)
    stopping = False

    def stop_requested() -> bool:
        nonlocal stopping
        stopping = stopping or requested()
        return stopping

    _stop_requested = stop_requested
    try:
        yield stop_requested
    finally:
        _stop_requested = None
        for number, handler in before.items():
            # A handler that is not Python's is that of JAX's service.
            if handler is not None and not jax.distributed.is_initialized():
                signal.signal(number, handler)


def _listen_for_sigterm() -> Callable[[], bool]:
    if jax.distributed.is_initialized():
        # JAX's service listens; a signal handler of ours would disable it. All hosts stop at the
        # call after the furthest one that a host had made when the signal came. The service forgets
        # a signal that came before the first call: make that one here.
        calls = itertools.count()

        def requested() -> bool:
            return multihost_utils.reached_preemption_sync_point(next(calls))

        requested()
        return requested
    sigterm = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: sigterm.set())
    return sigterm.is_set


def _interrupt(number: int, _: Any) -> None:
    """Ask the run to stop, as SIGTERM does; the second time, end the process."""
    _interrupts.append(number)
    if len(_interrupts) > 1:
        os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"\n")  # a progress bar hides the cursor
        os._exit(INTERRUPTED)
    os.write(2, b"\nstopping at the next step or batch; Ctrl-C again stops at once\n")
    signal.raise_signal(signal.SIGTERM)


def stopped(reason: str) -> Preempted:
    """Return the exception that ends a run which was asked to stop."""
    return (Interrupted if _interrupts else Preempted)(reason)


def raise_if_stopping() -> None:
    """Raise Preempted if this run was asked to stop; all hosts call this alike."""
    if _stop_requested is not None and _stop_requested():
        raise stopped("asked to stop during an evaluation")


@contextlib.contextmanager
def watchdog(stall_seconds: float) -> Iterator[Callable[[], None]]:
    """Print the stacks of all threads if there is no heartbeat for a while; 0 never prints.

    Yields:
      The heartbeat: a function to call whenever a step ends.
    """

    def heartbeat() -> None:
        if stall_seconds:
            faulthandler.dump_traceback_later(stall_seconds, file=sys.__stderr__ or 2)

    heartbeat()
    try:
        yield heartbeat
    finally:
        faulthandler.cancel_dump_traceback_later()


def from_others(error: BaseException) -> bool:
    """Return whether the cause may be that another host is gone, which JAX's heartbeats report.

    That may be with any error of a collective: a JaxRuntimeError, or a ValueError that begins
    with a status of XLA, such as "UNKNOWN: Gloo AllGather failed" (see launch/host.sh).
    """
    cause: BaseException | None = error
    while cause is not None and jax.process_count() > 1:
        status = type(cause) is ValueError and re.match(r"[A-Z_]{2,}: ", str(cause))
        if isinstance(cause, jax.errors.JaxRuntimeError) or status:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def alone_with(error: BaseException) -> bool:
    """Return whether other hosts may not have this error, so that `leave` must end them."""
    return jax.process_count() > 1 and not from_others(error)


def leave(status: int) -> NoReturn:
    """End this process at once, after an error that the other hosts may not have.

    An ordinary exit would wait for the others in barriers of JAX and Orbax, while they wait for
    this host in a collective. Once it is gone, JAX's heartbeats end them.
    """
    if global_state.process_id == 0:
        time.sleep(COORDINATOR_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exchange(about: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the facts of each host, exchanged through the coordinator without any device."""
    client = global_state.client
    if client is None:
        return [json.loads(json.dumps(facts))]
    client.key_value_set(f"mae_jax/{about}/{global_state.process_id}", json.dumps(facts))
    texts = []
    for host in range(global_state.num_processes):
        try:
            key, milliseconds = f"mae_jax/{about}/{host}", AGREE_SECONDS * 1000
            texts.append(client.blocking_key_value_get(key, milliseconds))
        except RuntimeError as error:
            raise UserError(
                f"host {host} did not get as far as the agreement on its {about} within"
                f" {AGREE_SECONDS} s: see what it printed ({error})"
            ) from error
    return [json.loads(text) for text in texts]


def _give_up(coordinator: str | None, num_hosts: int | None, seconds: float) -> None:
    """Print why this host does not start, and end the process."""
    address = coordinator or getattr(global_state, "coordinator_address", None)
    print(
        f"host {global_state.process_id} gives up after {seconds:g} s: not all hosts came to the"
        f" coordinator (host 0) at {address}. Start on all workers: the same command on"
        f" {'all' if num_hosts is None else f'all {num_hosts}'} hosts, within that time of each"
        " other. If host 0 runs, is the address right, and is the port open in the firewall?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PREEMPTED if coordinator is None else 2)


def log_once(line: str) -> None:
    """Print a line, on host 0 only."""
    if jax.process_index() == 0:
        print(line, flush=True)


@functools.cache
def announce(line: str) -> None:
    """Print a line the first time that it is passed, on host 0 only."""
    log_once(line)
