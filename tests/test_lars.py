"""LARS gives the numbers of the official linear probe, and each head of a sweep its own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax import optim, optimizers

GOLDEN = np.load(Path(__file__).parent / "data" / "lars.npz")
STEPS = len(GOLDEN["lrs"])


def start():
    return {"head": {"kernel": jnp.asarray(GOLDEN["W0"].T), "bias": jnp.asarray(GOLDEN["b0"])}}


def gradients(step):
    return {
        "head": {
            "kernel": jnp.asarray(GOLDEN["gradW"][step].T),
            "bias": jnp.asarray(GOLDEN["gradb"][step]),
        }
    }


def schedule(step):
    return jnp.asarray(GOLDEN["lrs"], jnp.float32)[step]


def trajectory(tx, params, grads=gradients):
    state, seen = tx.init(params), []
    for step in range(STEPS):
        updates, state = tx.update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params["head"])
    return seen


def relative(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def test_six_steps_are_the_official_ones():
    for step, head in enumerate(trajectory(optimizers.lars(schedule), start())):
        assert relative(head["kernel"].T, GOLDEN["W"][step]) <= 1e-5
        assert relative(head["bias"], GOLDEN["b"][step]) <= 1e-5


def test_the_lars_of_optax_is_another_one():
    theirs = trajectory(optax.lars(schedule, trust_coefficient=0.001, momentum=0.9), start())
    assert relative(theirs[-1]["kernel"].T, GOLDEN["W"][-1]) > 1e-3
    assert relative(theirs[-1]["bias"], GOLDEN["b"][-1]) > 1e-3


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_a_matrix_that_is_zero_or_has_no_gradient_is_not_scaled(zero):
    params = jax.tree.map(jnp.zeros_like, start()) if zero == "parameter" else start()
    grads = gradients(0) if zero == "parameter" else jax.tree.map(jnp.zeros_like, gradients(0))
    tx = optimizers.lars(lambda step: 0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.5 * grads["head"]["kernel"])


def test_decay_joins_the_gradient_of_matrices_before_it_is_scaled():
    tx = optimizers.lars(lambda step: 1.0, weight_decay=0.1, trust=0.01)
    updates, _ = tx.update(gradients(0), tx.init(start()), start())
    weight, grad = GOLDEN["W0"].T, GOLDEN["gradW"][0].T
    grad = grad + 0.1 * weight
    expected = -grad * 0.01 * np.linalg.norm(weight) / np.linalg.norm(grad)
    np.testing.assert_allclose(updates["head"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["bias"], -GOLDEN["gradb"][0])


@pytest.mark.parametrize("make", [optimizers.lars, optim.adamw], ids=["lars", "adamw"])
def test_side_by_side_each_goes_its_own_way(make):
    scales = (1.0, 0.25, 4.0)

    def of(scale):
        return make(lambda step: scale * schedule(step))

    def stacked(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * len(scales)), tree)

    together = trajectory(
        optimizers.side_by_side(of, scales), stacked(start()), lambda step: stacked(gradients(step))
    )
    for i, scale in enumerate(scales):
        alone = trajectory(of(scale), start())
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours["kernel"][i], theirs["kernel"], rtol=2e-5, atol=1e-7)
            np.testing.assert_allclose(ours["bias"][i], theirs["bias"], rtol=2e-5, atol=1e-7)
