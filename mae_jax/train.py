"""The training loop and its step: what is updated, how, and when it is evaluated and saved.

Knows meshes, checkpoints and metrics; knows no model and no dataset: those come as a Task.
"""

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import checkpoint, distributed, evals, flops, metrics, provenance, sharding
from mae_jax.config import steps
from mae_jax.data.pipeline import steps_per_epoch
from mae_jax.errors import UserError
from mae_jax.evals import results
from mae_jax.optim import peak_lr


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step; arrays only."""

    step: Array  # updates done, int32
    params: Any
    opt_state: Any
    extra: Any  # what the loss keeps beside parameters: batch statistics, averaged weights


class Task(NamedTuple):
    """An objective: pure functions from arrays to arrays, and the examples that they read."""

    inputs: Mapping[str, jax.ShapeDtypeStruct]  # one example of each array that `loss` reads
    num_examples: int
    init: Callable  # rng -> params, extra
    prepare: Callable  # (batch, rng) -> batch, with what is drawn once for the global batch
    loss: Callable  # (params, extra, batch, rng, train) -> loss, (extra, metrics)
    predict: Mapping[str, Callable]  # name -> fn(params, extra, batch)
    optimizer: Callable  # (total_steps, steps_per_epoch) -> transformation, schedule
    batches: Callable  # (start_step, rows) -> iterator of (rows of this host, scalars, log lines)
    flops_per_example: float  # forward pass, matrix products only
    passes: float = 3.0  # what an update costs, in forward passes: 3 with the backward pass
    # (checkpoint, fresh state) -> state: what config.init_from gives; None = all parameters
    load: Callable | None = None
    # (parameters after an update, extra) -> extra, such as averaged weights; None = as it was
    follow: Callable | None = None


class NonFiniteError(FloatingPointError):
    """A loss or a gradient norm is not finite; nothing of it was saved."""


def stream(seed: int, name: str, step: Array | int) -> Array:
    """A random key that depends on nothing but (seed, name, step)."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def init_state(task: Task, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update."""
    params, extra = task.init(stream(seed, "init", 0))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extra)


def update(
    state: TrainState,
    batch: dict[str, Array],
    *,
    task: Task,
    tx: optax.GradientTransformation,
    seed: int,
    grad_accum: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One update from one global batch, in `grad_accum` passes whose gradients are averaged.

    Pass a takes rows a, a + grad_accum, ...: every device keeps its own rows.
    """
    batch = task.prepare(batch, lambda name: stream(seed, name, state.step))

    def one_pass(extra, index, rows):
        def rng(name: str) -> Array:
            return jax.random.fold_in(stream(seed, name, state.step), index)

        grad_fn = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (extra, scalars)), grads = grad_fn(state.params, extra, rows, rng, True)
        return extra, (grads, {"loss": loss} | scalars)

    if grad_accum == 1:
        extra, (grads, scalars) = one_pass(state.extra, 0, batch)
    else:
        passes = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, grad_accum, *x.shape[1:]), 1, 0), batch
        )
        shapes = jax.eval_shape(one_pass, state.extra, 0, jax.tree.map(lambda x: x[0], passes))[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def accumulate(carry, indexed_rows):
            extra, total = carry
            extra, out = one_pass(extra, *indexed_rows)
            return (extra, jax.tree.map(jnp.add, total, out)), None

        (extra, total), _ = jax.lax.scan(
            accumulate, (state.extra, zeros), (jnp.arange(grad_accum), passes)
        )
        grads, scalars = jax.tree.map(lambda x: x / grad_accum, total)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if task.follow is not None:
        extra = task.follow(params, extra)
    scalars = scalars | {"grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state, extra), scalars


def lay_out(
    task: Task, tx: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> tuple[TrainState, Callable]:
    """The shapes of a state with their shardings, and () -> a fresh state in its shards.

    Raises:
      UserError: see `sharding.state_shardings`.
    """
    init = jax.jit(partial(init_state, task, tx, config.seed))  # traced once, for both
    shapes = jax.eval_shape(init)
    shardings = sharding.state_shardings(mesh, shapes)
    state_shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return state_shapes, jax.jit(init, out_shardings=shardings)


class Program(NamedTuple):
    """A compiled step, and what its state looks like and starts from."""

    step: Any  # compiled (state, batch) -> state, scalars
    state_shapes: TrainState  # with shardings
    init: Callable  # () -> state, in its shards


def compile_step(
    task: Task, tx: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> Program:
    """Compile the update for a mesh, ahead of the first batch; the state is donated.

    Raises:
      UserError: see `sharding.state_shardings`.
    """
    state_shapes, init = lay_out(task, tx, config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes)
    batch_shapes = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *x.shape), x.dtype, sharding=sharding.batch_sharding(mesh)
        )
        for name, x in task.inputs.items()
    }
    step = jax.jit(
        partial(update, task=task, tx=tx, seed=config.seed, grad_accum=config.grad_accum),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, P())),
    )
    return Program(step.lower(state_shapes, batch_shapes).compile(), state_shapes, init)


def describe(
    task: Task, program: Program, config: ConfigDict, mesh: Mesh, total: int, per_epoch: int
) -> list[str]:
    """What a user should know before the first batch, one fact a line."""
    params = jax.tree.leaves(program.state_shapes.params)
    count = sum(math.prod(x.shape) for x in params)
    lines = [
        f"parameters: {count:,} trained",
        f"forward pass: {task.flops_per_example / 1e9:.2f} GFLOPs per image"
        f" ({task.flops_per_example / 2e9:.2f} GMACs)",
        "mesh: "
        + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        + f" on {mesh.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} host(s)",
    ]
    memory = program.step.memory_analysis()
    if memory is not None:
        arguments = memory.argument_size_in_bytes / 2**20
        temporary = memory.temp_size_in_bytes / 2**20
        lines.append(
            f"memory of the step per device: {arguments + temporary:,.0f} MiB"
            f" ({arguments:,.0f} state and batch, {temporary:,.0f} temporary)"
        )
    lines.append(
        f"batch: {config.batch_size} in {config.grad_accum} pass(es); {per_epoch} steps per epoch"
        f" of {task.num_examples:,} examples; {total:,} steps"
    )
    peak = peak_lr(config.optim.blr, config.batch_size)
    lines.append(f"learning rate: peak {peak:.3g}")
    warmup = steps(config.optim.warmup, config.batch_size, per_epoch) if total else 0
    if total < warmup:
        lines[-1] += (
            f", which this run does not reach: it ends at {peak * total / warmup:.3g}, since"
            f" config.optim.warmup={config.optim.warmup!r} is longer than it"
        )
    return lines


class Stopwatch:
    """Times updates between two reports, leaving out evaluation and saving."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step, self.since, self.waited, self.paused = step, time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no part of training."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def lap(self, step: int) -> tuple[float, float]:
        """(updates per second, fraction of the time spent waiting for batches) since the last."""
        seconds = max(time.perf_counter() - self.since - self.paused, 1e-9)
        speed, waited = (step - self.step) / seconds, self.waited / seconds
        self.restart(step)
        return speed, waited


def require_finite(step: int, scalars: Mapping[str, float], last_good: Callable[[], str]) -> None:
    """Raises NonFiniteError if the loss or the gradient norm of an update is not finite."""
    loss, norm = scalars["train/loss"], scalars["train/grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {norm}. Nothing of it was saved; the last"
            f" good checkpoint is {last_good()}. A lower config.optim.blr, or"
            " config.model.residual_dtype=float32 if it is not, may help."
        )


def fit(
    config: ConfigDict,
    workdir: str | Path,
    task: Task,
    mesh: Mesh,
    happened: Callable[[str], None] = lambda what: None,
) -> TrainState:
    """Train to the end of `config.train_for`, from wherever the workdir stands.

    Between two updates: evaluate, then save, and only then take the next batch, so that what is
    saved is one moment. The metrics of an update are read after the next one was started, so that
    the device never waits for the host; before a save they are read first.

    Args:
      happened: is told of every step, such as 'step 12'; see `distributed.watchdog`.

    Raises:
      UserError: the config cannot work here, or the workdir belongs to another run.
      NonFiniteError: the loss or the gradient norm is not finite.
      distributed.Preempted: asked to stop; the state was saved.
    """
    per_epoch = 1
    if steps(config.train_for, config.batch_size, per_epoch):  # else no batch is read
        sharding.check_batch(mesh, config.batch_size, config.grad_accum)
        per_epoch = steps_per_epoch(task.num_examples, config.batch_size)
    in_steps = partial(steps, batch_size=config.batch_size, steps_per_epoch=per_epoch)
    total, log_every = in_steps(config.train_for), in_steps(config.log_every)
    save_every = in_steps(config.checkpoint.every)
    keep_every = in_steps(config.checkpoint.keep_every)
    if save_every and keep_every % save_every:
        raise UserError(
            f"config.checkpoint: keep_every={config.checkpoint.keep_every!r} ({keep_every} steps)"
            f" is not a multiple of every={config.checkpoint.every!r} ({save_every} steps)"
        )
    eval_every = {name: in_steps(cfg.every) for name, cfg in config.evals.items()}
    tx, schedule = task.optimizer(total, per_epoch)
    evaluators = evals.build(config, task.predict, mesh)

    provenance.check_workdir(workdir, config, task.num_examples)
    stop_requested = distributed.preemption()
    saver = checkpoint.Checkpointer(workdir, config.checkpoint.keep, keep_every)
    state_shapes, init = lay_out(task, tx, config, mesh)
    state, origin = checkpoint.restore_or_init(saver, config, state_shapes, init, task.load)
    start = int(state.step)
    if start > total or (start == total > 0 and config.resume):
        raise UserError(
            f"{origin}, and config.train_for={config.train_for!r} is {total} steps: nothing is left"
            " to do; give a longer one"
        )
    program = compile_step(task, tx, config, mesh) if start < total else None
    provenance.prepare_workdir(workdir, config, task.num_examples)
    peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
    unread: tuple[int, dict[str, Any]] | None = None  # the metrics of the last update

    def due(step: int, every: int) -> bool:
        return step == total or bool(every and step % every == 0)

    with (
        saver,
        contextlib.closing(metrics.Writer(workdir, start)) as writer,
        metrics.Progress(total, start, config.task) as progress,
    ):

        def say(line: str) -> None:
            writer.log(line)
            progress.log(line)

        def last_good() -> str:
            saver.wait()  # a save that goes on is the last one
            return f"step {saver.latest_step()} in {workdir}"

        def read_metrics() -> None:
            nonlocal unread
            if unread is None:
                return
            (done, values), unread = unread, None
            scalars = {name: float(value) for name, value in values.items()}
            require_finite(done, scalars, last_good)
            if done != 1 and not due(done, log_every):
                return
            speed, waited = stopwatch.lap(done)
            rate = speed * config.batch_size
            scalars |= {
                "train/lr": float(schedule(done - 1)),
                "perf/images_per_sec_per_chip": rate / mesh.size,
                "perf/data_wait_frac": waited,
            }
            if peak:
                work = task.passes * task.flops_per_example * rate
                scalars["perf/mfu"] = work / (peak * mesh.size)
            writer.scalars(done, scalars)
            progress.update(
                done,
                loss=scalars["train/loss"],
                lr=scalars["train/lr"],
                images_per_sec=rate,
                data_wait=waited,
            )

        if program:
            for line in [*describe(task, program, config, mesh, total, per_epoch), origin]:
                say(line)
        elif start:
            say(f"finished: {start} of {total} steps were done before; nothing to do")
        batches: Iterator = iter(())
        if start < total:
            batches = task.batches(start, sharding.host_rows(mesh, config.batch_size))
        stopwatch = Stopwatch(start)

        for step in range(start, total + 1):
            new = step > start
            for name, evaluator in evaluators.items():
                if (new or step == 0) and due(step, eval_every[name]):
                    read_metrics()
                    with stopwatch.pause():
                        scalars, pictures = evaluator.run(state)
                        writer.scalars(step, scalars)
                        writer.images(step, pictures)
                        if (found := getattr(evaluator, "results", None)) is not None:
                            saved = new and due(step, save_every)
                            about = {
                                "step": step,
                                "checkpoint": str(saver.root / str(step)) if saved else None,
                                "started": origin,
                            }
                            results.write(workdir, found, about)
                    say(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in scalars.items()))
            stopping = stop_requested()
            unsaved = stopping and saver.latest_step() is None
            if (new and (stopping or due(step, save_every))) or unsaved:
                read_metrics()
                writer.flush()
                with stopwatch.pause():
                    saver.save(step, state)
            if stopping:
                saver.close()
                say(stopped := f"asked to stop at step {step} of {total}: it is saved")
                raise distributed.Preempted(stopped)
            saver.check()
            if step == total or program is None:
                break

            with stopwatch.waiting():
                batch, reported, lines = next(batches)
            for line in lines:
                say(line)
            inputs = {name: batch[name] for name in task.inputs}
            state, values = program.step(state, sharding.put_batch(mesh, inputs, config.batch_size))
            read_metrics()
            unread = step + 1, {f"train/{k}": v for k, v in values.items()} | reported
            happened(f"step {step}")
    return state
