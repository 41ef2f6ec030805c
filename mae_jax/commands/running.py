"""Make the run that a config asks for: what `mae-jax train` and `mae-jax sweep` share."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from mae_jax.commands import explain
from mae_jax.errors import UserError

MAX_CPU_DEVICES = 4  # each holds the whole state
MIN_CPU_BATCH = 32


def define(values: flags.FlagValues) -> None:
    """Define the flags of a run."""
    text = "folder of the run; the same again goes on where it stopped; '' = workdir/RECIPE"
    flags.DEFINE_string("workdir", None, text, flag_values=values)
    text = "FIRST:LAST; write a trace of these steps, as host 0 sees them, into WORKDIR/profile"
    flags.DEFINE_string("profile", "", text, flag_values=values)
    text = "keep compiled programs in the user's cache folder, or beside the workdir in a bucket"
    flags.DEFINE_bool("compilation_cache", True, text, flag_values=values)
    text = "run as one of several hosts, of a TPU pod or a cluster"
    flags.DEFINE_bool("distributed", False, text, flag_values=values)
    text = "HOST:PORT of host 0, where no pod or cluster is detected"
    flags.DEFINE_string("coordinator", None, text, flag_values=values)
    text = "with --coordinator: how many hosts"
    flags.DEFINE_integer("num_hosts", None, text, flag_values=values)
    text = "with --coordinator: which host this is, from 0"
    flags.DEFINE_integer("host", None, text, flag_values=values)


def compilation_cache(workdir: str) -> str:
    """Return where compiled programs are kept: the user's cache; of a bucket, beside the workdir.

    So the second run of a program starts warm, wherever the run's workdir lies.
    """
    if "://" in workdir:
        return f"{os.path.dirname(workdir.rstrip('/'))}/compilation_cache"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "mae_jax", "compiled")


class Parts(NamedTuple):
    """The parts of a run, before anything is written."""

    mesh: Any
    task: Any
    num_examples: int
    schedule: Any
    tx: Any
    learning_rate: Callable[[Any], Any]
    evaluators: dict[str, Any]


def build(config: ConfigDict, devices: Sequence[Any] | None = None) -> Parts:
    """Build what a config asks for.

    Raises:
      UserError: the config cannot work here.
    """
    from mae_jax import distributed, evals, sharding, tasks
    from mae_jax.config import steps
    from mae_jax.data.pipeline import steps_per_epoch
    from mae_jax.evals.features import require_features
    from mae_jax.mesh import make_mesh
    from mae_jax.schedule import Schedule

    with distributed.agreement("data") as facts:
        mesh = make_mesh(**config.mesh, devices=devices)
        task = tasks.build(config, mesh)
        num_examples = facts["the number of examples"] = len(task.examples)
    per_epoch = 1
    if steps(config.train_for, config.batch_size, per_epoch):  # else no batch is read
        sharding.check_batch(mesh, config.batch_size, config.grad_accum)
        per_epoch = steps_per_epoch(num_examples, config.batch_size)
    schedule = Schedule.from_config(config, per_epoch)
    tx, learning_rate = task.optimizer(schedule.total, per_epoch)
    require_features(config, task)
    evaluators = evals.build(config, task.predict(), mesh)
    return Parts(mesh, task, num_examples, schedule, tx, learning_rate, evaluators)


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    heartbeat: Callable[[], None] = lambda: None,
    devices: Sequence[Any] | None = None,
    profile: str = "",
) -> Any:
    """Run a config in a workdir, from where an earlier run stopped there; return the state.

    Args:
      heartbeat: called when an update or an evaluation has ended.
      devices: of the mesh; None = all.
      profile: FIRST:LAST, the steps to trace; '' = none.

    Raises:
      UserError: the config cannot work here, the workdir belongs to another run, or one is going on
        there.
      train.NonFiniteError: the loss or the gradient norm is not finite.
      distributed.Preempted: a stop was requested; the state was saved.
    """
    from etils import epath

    from mae_jax import checkpoint, distributed, provenance

    with distributed.listening() as stop_requested:
        with distributed.agreement("weights to start from"):
            key = "resume" if config.get("resume") else "init_from"
            if config.get(key) and not checkpoint.numbered(epath.Path(workdir) / "checkpoints"):
                checkpoint.candidates(config[key], key)
        parts = build(config, devices)
        with provenance.nothing_left_if_refused(workdir):
            provenance.check_workdir(workdir, config, parts.num_examples)
            with provenance.only_run(workdir):
                return _run(parts, config, workdir, heartbeat, profile, stop_requested)


def _run(
    parts: Parts,
    config: ConfigDict,
    workdir: str | os.PathLike,
    heartbeat: Callable[[], None],
    profile: str,
    stop_requested: Callable[[], bool],
) -> Any:
    import jax

    from mae_jax import checkpoint, profiling, provenance, report, train

    mesh, task, num_examples, schedule, tx, learning_rate, evaluators = parts
    saver = checkpoint.Checkpointer(workdir, config.checkpoint.keep, schedule.keep_every)
    shapes, init = train.lay_out(task, tx, config.seed, mesh)
    state, started = checkpoint.restore_or_init(
        saver, shapes, init, task.load, resume=config.resume, init_from=config.init_from
    )
    start = int(state.step)
    is_new = saver.latest_step() is None
    if start > schedule.total or (start == schedule.total > 0 and config.resume and is_new):
        raise UserError(
            f"{started}, and config.train_for={config.train_for!r} is {schedule.total} steps:"
            " nothing is left to do; give a longer one"
        )
    profiled = profiling.window(profile, start, schedule.total)
    step: Any = None
    if start < schedule.total:
        sizes = {name: config[name] for name in ("batch_size", "seed", "grad_accum")}
        step = train.compile_step(task, tx, mesh, shapes, **sizes)
    provenance.prepare_workdir(workdir, config, num_examples)
    unfinished = provenance.unfinished(workdir, start)

    with (
        saver,
        report.Reporter(
            workdir,
            mesh,
            task,
            schedule,
            start=start,
            batch_size=config.batch_size,
            started=started,
            learning_rate=learning_rate,
            check=partial(train.require_finite, saver=saver),
            heartbeat=heartbeat,
            keep_metrics=bool(unfinished) and not schedule.total,
        ) as reporter,
    ):
        common: dict[str, Any] = dict(
            evaluators=evaluators,
            unfinished=unfinished,
            saver=saver,
            report=reporter,
            stop_requested=stop_requested,
        )
        if schedule.total == 0:
            return train.evaluate(state, **common)
        if step is None and not unfinished:
            reporter.log(f"finished: {start} of {start} steps were done before; nothing to do")
            return state
        if step is not None:
            reporter.start_up(step, state.params, config.grad_accum)
        tracing: Any = contextlib.nullcontext(step)
        if profiled and jax.process_index() == 0:
            tracing = profiling.traced(step, profiled, start, workdir, reporter.log)
        elif profile and not profiled:
            reporter.log(f"--profile={profile}: these steps were made before; none is traced")
        batches = train.global_batches(task, mesh, start, config.batch_size)
        with tracing as step:
            return train.fit(state, step, batches, schedule, **common)


def disk_failure(error: OSError, workdir: str) -> str | None:
    """Return what is wrong with the disk of a run, and how to go on; None for other errors."""
    from etils import epath

    from mae_jax import checkpoint

    root, is_local = epath.Path(workdir), "://" not in workdir
    if isinstance(error, checkpoint.FolderGone) or (is_local and not root.exists()):
        text = f"{workdir} is gone; the same command starts the run again, from"
    else:
        if isinstance(error, checkpoint.SaveError):
            reason = str(error)
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            reason = f"{error.filename or workdir}: {error.strerror}"
        else:
            return None
        if is_local:
            reason += f" ({shutil.disk_usage(workdir).free / 2**20:,.0f} MiB are free there)"
        text = f"{reason}. Make room: the same command goes on from"
    saved = checkpoint.numbered(root / "checkpoints")  # the newest first
    start = f"checkpoint {saved[0].name}" if saved else "the first step, for there is no checkpoint"
    return f"{text} {start}"


def connect(runs: Sequence[ConfigDict], values: flags.FlagValues, workdir: str) -> None:
    """Start JAX for runs as the flags say: its cache of programs, other hosts, a CPU's devices."""
    import jax

    from mae_jax import distributed

    hosts = (values.coordinator, values.num_hosts, values.host)
    if not values.compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", compilation_cache(workdir))
    if values.distributed or hosts != (None, None, None):
        distributed.join(
            *hosts,
            connect_seconds=runs[0].hosts.connect_seconds,
            heartbeat_seconds=runs[0].hosts.heartbeat_seconds,
        )
    else:
        distributed.refuse_to_run_alone(os.environ)
        asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        if not asked and getattr(jax.config, "jax_num_cpu_devices", -1) < 0:
            jax.config.update("jax_num_cpu_devices", cpu_devices(runs))


def cpu_devices(runs: Sequence[ConfigDict]) -> int:
    """Return into how many devices a CPU is divided, for runs that find no TPU or GPU.

    Each core is a device, up to MAX_CPU_DEVICES that divide the batches, unless config.mesh.data
    says otherwise: cores of one device wait for each other after every small operation. Fewer than
    MIN_CPU_BATCH images each do not pay for the state that every device updates.
    """
    from mae_jax.data.workers import usable_cores

    if any(run.mesh.data != -1 for run in runs):
        return 1
    sizes = [run.batch_size // max(run.grad_accum, 1) for run in runs]
    most = min(usable_cores(), MAX_CPU_DEVICES, min(sizes) // MIN_CPU_BATCH)
    return max((n for n in range(1, most + 1) if math.gcd(n, *sizes) == n), default=1)


def silence_stderr() -> None:
    """Silence the end of a run whose disk is full: every writer would try again, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def supervise(config: ConfigDict, workdir: str, profile: str = "") -> int:
    """Run a config; print why it fails, if it does, and return the exit status."""
    import jax
    from flax.traverse_util import flatten_dict

    from mae_jax import distributed, provenance, train
    from mae_jax.data.workers import WorkerLost

    try:
        with distributed.watchdog(config.hosts.stall_seconds) as heartbeat:
            with distributed.agreement("config and code") as facts:
                facts |= flatten_dict({"config": json.loads(config.to_json())}, sep=".")
                facts["workdir"] = workdir
                facts |= provenance.versions() | {"code of mae_jax": distributed.source_digest()}
            run(config, workdir, heartbeat, profile=profile)
    except (train.NonFiniteError, WorkerLost) as error:
        print(f"mae-jax train: {error}", file=sys.stderr)
        if isinstance(error, train.NonFiniteError):  # on all hosts alike
            return 1
        if jax.process_count() > 1:
            distributed.leave(distributed.PREEMPTED)
        return distributed.PREEMPTED
    except (Exception, KeyboardInterrupt) as error:
        alone, status = distributed.alone_with(error), 1
        if isinstance(error, OSError) and (reason := disk_failure(error, workdir)):
            print(f"mae-jax train: {reason}", file=sys.stderr, flush=True)
            silence_stderr()
        elif not alone:
            raise
        elif (known := explain("train", error)) is not None:
            status = known
        else:
            traceback.print_exc()
        if alone:
            distributed.leave(status)
        return status
    return 0
