"""The update step: the same numbers on every mesh, with and without accumulation."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    SHAPES,
    assert_trees_equal,
    batch_of,
    compiled,
    mesh_of,
    task_on,
    tiny_config,
    updates,
)

from mae_jax import sharding, tasks, train
from mae_jax.tasks.examples import TrainImages


@cache
def run_step(shape, steps=1, grad_accum=1):
    """The states before and after, and the metrics of the last step."""
    states, metrics = updates(tiny_config(grad_accum=grad_accum), mesh_of(*shape), steps)
    return states[0], states[-1], metrics[-1]


def relative(a, b):
    worst = jax.tree.map(lambda x, y: np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30), a, b)
    return max(jax.tree.leaves(worst))


def gradients(config, mesh):
    """Loss and gradients of one pass, through the same code as the step."""
    task = task_on(config, mesh)
    shapes = jax.eval_shape(lambda: task.init(train.stream(0, "init", 0))[0])
    shardings = sharding.state_shardings(mesh, shapes)
    params = jax.jit(lambda: task.init(train.stream(0, "init", 0))[0], out_shardings=shardings)()
    rng = partial(train.stream, 0, step=0)

    @jax.jit
    def run(params, batch):
        batch = task.prepare(batch, rng)
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, batch, rng, True)
        return loss, grads, batch["score"]

    batch = {"image": batch_of(config)["image"]}
    return jax.device_get(run(params, sharding.put_batch(mesh, batch, config.batch_size)))


@pytest.fixture(scope="module")
def alone():
    return gradients(tiny_config(), mesh_of(1, 1, 1))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_loss_and_gradients_agree_over_meshes(alone, shape):
    loss, grads, score = gradients(tiny_config(), mesh_of(*shape))
    np.testing.assert_array_equal(score, alone[2])  # masks do not depend on the devices
    assert abs(loss - alone[0]) <= 1e-5 * alone[0]
    # q, k and v are one tensor: alone, the gradient of the key bias would be nothing but rounding
    assert relative(grads, alone[1]) <= 1e-5


def test_masks_differ_between_images_and_steps():
    task, batch = tasks.build(tiny_config()), batch_of(tiny_config())
    first, second = (
        task.prepare(batch, partial(train.stream, 0, step=step))["score"] for step in (0, 1)
    )
    assert len(np.unique(np.argsort(first, 1), axis=0)) == len(first)
    assert not np.any(np.all(np.argsort(first, 1) == np.argsort(second, 1), axis=1))


def test_the_optimizer_given_equal_gradients_agrees_over_meshes():
    task = tasks.build(tiny_config())
    tx, _ = task.optimizer(10, 100)

    def update(state, step):
        grads = jax.tree.map(lambda p: jnp.sin(100 * p + step), state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return state.replace(params=params, opt_state=opt_state)

    def three_updates(update, state):
        for step in range(3):
            state = update(state, step)
        return jax.device_get(state.params)

    state = jax.jit(partial(train.init_state, task, tx, 0))()
    expected = three_updates(jax.jit(update), state)
    for shape in SHAPES:
        shardings = sharding.state_shardings(mesh_of(*shape), state)
        sharded = jax.jit(update, out_shardings=shardings)
        ours = three_updates(sharded, jax.device_put(state, shardings))
        assert relative(ours, expected) <= 1e-6, shape


@pytest.mark.parametrize("passes", [2, 4])
def test_accumulation_equals_the_large_batch(passes):
    whole = run_step((2, 2, 2))[2]
    parts = run_step((2, 2, 2), grad_accum=passes)[2]
    for name in ("loss", "grad_norm"):
        assert abs(parts[name] - whole[name]) <= 1e-5 * whole[name]


def test_initial_state_does_not_depend_on_the_mesh():
    assert_trees_equal(run_step((1, 1, 1), steps=2)[0], run_step((2, 2, 2))[0])


def test_two_updates_give_the_numbers_they_always_gave():
    """Golden numbers of this code (2026-11, CPU). If they change, know why before you replace them:
    runs that people resume or compare will change with them."""
    _, state, metrics = run_step((1, 1, 1), steps=2)
    total = sum(np.abs(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(
        [metrics["loss"], metrics["grad_norm"], total],
        [1.3965765, 0.8752488, 3719.41414],
        rtol=1e-5,
    )


def test_no_text_is_made_of_the_data(monkeypatch):
    """JAX names what it compiles; the name of a `partial` would hold every path of a folder."""
    written = []
    monkeypatch.setattr(TrainImages, "__repr__", lambda self: written.append(1) or "")
    compiled(tiny_config(), mesh_of(1, 1, 1))
    assert not written
