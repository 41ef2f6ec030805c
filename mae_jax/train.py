"""The update step and the training loop.

Knows meshes, checkpoints and reports; knows no model and no dataset: those come as a `Task`.
"""

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax import checkpoint, distributed, provenance, sharding
from mae_jax.report import Reporter
from mae_jax.schedule import Schedule

Rng = Callable[[str], Array]  # the name of a stream -> a random key


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step; arrays only."""

    step: Array  # updates done, int32
    params: Any
    opt_state: Any
    extra: Any  # what a task keeps beside parameters: batch statistics, averaged weights


class Examples(Protocol):
    """The training examples; `len` is the number of examples of an epoch."""

    @property
    def inputs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and type of one example of each array that a task reads."""
        ...

    def __len__(self) -> int: ...

    def batches(self, start_step: int, rows: np.ndarray) -> Iterator[tuple[dict, dict, list[str]]]:
        """Yield (these rows of a global batch, scalars to report, lines to log) from a step on."""
        ...


class Task(Protocol):
    """An objective: pure functions of arrays, and the examples that they read."""

    examples: Any  # Examples

    @property
    def flops_per_example(self) -> float:
        """FLOPs of a forward pass, matrix products only."""
        ...

    @property
    def flops_multiplier(self) -> float:
        """The cost of an update in forward passes: 3 with the whole backward pass."""
        return 3.0

    def init(self, rng: Array) -> tuple[dict, dict]:
        """Return fresh (params, extra)."""
        ...

    def prepare(self, batch: dict, rng: Rng) -> dict:
        """Return the batch with what is random and must not depend on the mesh, such as masks."""
        ...

    def loss(self, params: dict, extra: dict, batch: dict, rng: Rng, train: bool) -> Any:
        """Return (loss, (extra, metrics)); a metric named "loss" replaces the reported loss."""
        ...

    def predict(self) -> Mapping[str, Callable]:
        """Return the functions (params, extra, batch) -> outputs that evaluators use, by name.

        `reconstruction`: latent_BND, pred_BLT, target_BLT, mask_BL; loss_BL, if the loss is not the
        mean of the squared errors of a patch. `features`: name -> (B, D).
        `block_features`, if there are any: name -> (depth, B, D), after each block.
        `patch_features`, if there are any: (B, L, D), after the block given as fourth argument.
        `logits`: (B, Y). `segmentation`: logits of patches (B, rows, columns, Y).
        """
        ...

    def optimizer(
        self, total_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """Return the optimizer and its learning rate by step."""
        ...

    def after_update(self, state: TrainState) -> TrainState:
        """Return the state after an update, such as with averaged weights moved along."""
        return state

    def load(self, path: epath.Path, state: TrainState) -> TrainState:
        """Return `state`, a fresh one, with the parameters of a checkpoint (config.init_from)."""
        params = {
            name: checkpoint.restore(path, shapes, (*checkpoint.PARAMS, name))
            for name, shapes in state.params.items()
        }
        return dataclasses.replace(state, params=params)


def stream(seed: int, name: str, step: Array | int) -> Array:
    """Return a random key that depends on nothing but (seed, name, step)."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def init_state(task: Task, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Return the state before the first update."""
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
    """Return the state after one update from one global batch, and its metrics.

    The batch goes through in `grad_accum` passes, whose gradients are averaged. Pass i takes rows
    i, i + grad_accum, ..., so that each device keeps its own rows.
    """
    batch = task.prepare(batch, lambda name: stream(seed, name, state.step))

    def one_pass(extra: Any, index: Any, rows: dict) -> tuple[Any, Any]:
        def rng(name: str) -> Array:
            return jax.random.fold_in(stream(seed, name, state.step), index)

        grad_fn = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (extra, metrics)), grads = grad_fn(state.params, extra, rows, rng, True)
        return extra, (grads, {"loss": loss} | metrics)

    if grad_accum == 1:
        extra, (grads, metrics) = one_pass(state.extra, 0, batch)
    else:
        passes = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, grad_accum, *x.shape[1:]), 1, 0), batch
        )
        first = jax.tree.map(lambda x: x[0], passes)
        zeros = optax.tree.zeros_like(jax.eval_shape(one_pass, state.extra, 0, first)[1])

        def accumulate(carry: Any, indexed_rows: Any) -> tuple[Any, None]:
            extra, total = carry
            extra, out = one_pass(extra, *indexed_rows)
            return (extra, jax.tree.map(jnp.add, total, out)), None

        indexed = (jnp.arange(grad_accum), passes)
        (extra, total), _ = jax.lax.scan(accumulate, (state.extra, zeros), indexed)
        grads, metrics = jax.tree.map(lambda x: x / grad_accum, total)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = task.after_update(TrainState(state.step + 1, params, opt_state, extra))
    return state, metrics | {"grad_norm": optax.tree.norm(grads)}


def lay_out(
    task: Task, tx: optax.GradientTransformation, seed: int, mesh: Mesh
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Return the shapes of a state with their shardings, and () -> a fresh state in its shards.

    Raises:
      UserError: see `sharding.state_shardings`.
    """
    # Traced once, for both. A lambda: of a partial JAX would write out the task, with all its data.
    init = jax.jit(lambda: init_state(task, tx, seed))
    shapes = jax.eval_shape(init)
    shardings = sharding.state_shardings(mesh, shapes)
    state_shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return state_shapes, jax.jit(init, out_shardings=shardings)


def compile_step(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    state_shapes: TrainState,
    *,
    batch_size: int,
    seed: int,
    grad_accum: int = 1,
) -> Any:
    """Return the compiled `update` (state, batch) -> (state, metrics); the state is donated.

    Args:
      state_shapes: with shardings, from `lay_out`.
    """
    by_batch = sharding.batch_sharding(mesh)
    batch_shapes = {
        name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype, sharding=by_batch)
        for name, x in task.examples.inputs.items()
    }
    shardings = jax.tree.map(lambda x: x.sharding, state_shapes)
    step = jax.jit(
        partial(update, task=task, tx=tx, seed=seed, grad_accum=grad_accum),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, P())),
    )
    return step.lower(state_shapes, batch_shapes).compile()


class NonFiniteError(FloatingPointError):
    """A loss or a gradient norm that is not finite; nothing of its update was saved."""


def require_finite(step: int, scalars: Mapping[str, float], saver: checkpoint.Checkpointer) -> None:
    """Raise NonFiniteError if the loss or the gradient norm of an update is not finite."""
    loss, norm = scalars["train/loss"], scalars["train/grad_norm"]
    if math.isfinite(loss) and math.isfinite(norm):
        return
    saver.wait()  # a save that is still going on is the last one
    last = saver.latest_step()
    good = (
        "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last}"
    )
    raise NonFiniteError(
        f"step {step}: loss {loss}, gradient norm {norm}. Nothing of it was saved; {good} in"
        f" {saver.root.parent}. A lower config.optim.blr, or config.model.residual_dtype=float32 if"
        " it is not, may help."
    )


def global_batches(
    task: Task, mesh: Mesh, start: int, batch_size: int
) -> Iterator[tuple[dict[str, Array], dict, list[str]]]:
    """Yield the global batches of a task on the mesh, each with its scalars and lines to log."""
    for batch, scalars, lines in task.examples.batches(start, sharding.host_rows(mesh, batch_size)):
        inputs = {name: batch[name] for name in task.examples.inputs}
        yield sharding.put_batch(mesh, inputs, batch_size), scalars, lines


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, dict], tuple[TrainState, dict]],
    batches: Iterator[tuple[dict[str, Array], dict, list[str]]],
    schedule: Schedule,
    *,
    evaluators: Mapping[str, Any],
    unfinished: Sequence[str] = (),
    saver: checkpoint.Checkpointer,
    report: Reporter,
    stop_requested: Callable[[], bool],
) -> TrainState:
    """Train from the step of `state` to the end of `schedule`.

    Between two updates: evaluate, then save. The metrics of an update are read after the next one
    has started, so that the device does not wait for the host; before a save they are read first,
    so that no state that is not finite is saved.

    Args:
      step_fn: from `compile_step`.
      batches: from `global_batches`, starting with that of the state's step.
      unfinished: evaluators that a stop kept from measuring the first state; they do so now.
      stop_requested: asked once a step, on all hosts alike.

    Raises:
      NonFiniteError: the loss or the gradient norm is not finite.
      distributed.Preempted: a stop was requested; the state was saved.
    """
    start = int(state.step)
    for step in range(start, schedule.total + 1):
        is_new = step > start
        save_due = is_new and schedule.due(step, schedule.save_every)
        due = [
            name
            for name in evaluators
            if (name in unfinished and not is_new)
            or ((is_new or step == 0) and schedule.due(step, schedule.eval_every[name]))
        ]
        is_saved = save_due or step == saver.latest_step()
        saved_as = str(saver.root / str(step)) if is_saved else None
        with contextlib.suppress(distributed.Preempted):  # the state is saved first
            while due:
                report.evaluation(step, evaluators[due[0]], state, saved_as)
                del due[0]
        stopping = stop_requested()
        if save_due or (stopping and (is_new or saver.latest_step() is None)):
            report.flush()
            with report.pause():
                saver.save(step, state)
        if stopping:
            saver.close()
            provenance.note_unfinished(saver.root.parent, step, due)
            report.log(reason := f"asked to stop at step {step} of {schedule.total}: it is saved")
            raise distributed.stopped(reason)
        if unfinished and not is_new:
            provenance.note_unfinished(saver.root.parent, step, [])
        saver.check()
        if step == schedule.total:
            break

        with report.waiting():
            batch, scalars, lines = next(batches)
        for line in lines:
            report.log(line)
        state, metrics = step_fn(state, batch)
        report.updated(step + 1, metrics, scalars)
    return state


def evaluate(
    state: TrainState,
    *,
    evaluators: Mapping[str, Any],
    unfinished: Sequence[str] = (),
    saver: checkpoint.Checkpointer,
    report: Reporter,
    stop_requested: Callable[[], bool],
) -> TrainState:
    """Run every evaluator once, or those that a stop kept from it: all that a run of 0 steps does.

    Raises:
      distributed.Preempted: a stop was requested.
    """
    due = [name for name in evaluators if name in unfinished] or list(evaluators)
    try:
        while due:
            if stop_requested():
                raise distributed.Preempted
            report.evaluation(0, evaluators[due[0]], state, None)
            del due[0]
    except distributed.Preempted:
        provenance.note_unfinished(saver.root.parent, 0, due)
        report.log(reason := "asked to stop: start again to measure what is missing")
        raise distributed.stopped(reason) from None
    if unfinished:
        provenance.note_unfinished(saver.root.parent, 0, [])
    return state
