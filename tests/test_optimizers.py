"""Optimizers and schedules by name: what only each of them does."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SHAPES, finetune_config, mesh_of, tiny_config, updates

from mae_jax import optim, optimizers, tasks
from mae_jax.errors import UserError
from mae_jax.tasks import common


def config_with(**changes):
    config = tiny_config()
    config.optim.update(changes, warmup="0 steps", blr=16.0)  # a rate of 1 at batch 16
    return config


@cache
def plain_init():
    """Return the first parameters of the tiny pre-training, which no optimizer changes."""
    return jax.jit(tasks.build(tiny_config()).init)(jax.random.key(0))


def first_updates(config):
    """Return the parameters of a task and its first update by random gradients."""
    task = tasks.build(config)
    tx, _ = task.optimizer(100, 10)
    params, _ = plain_init()
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    update = jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])
    return params, grads, update(params, grads)


def blocks(tree):
    return tree["encoder"]["stack"]["blocks"]


def test_muon_makes_the_singular_values_of_each_matrix_nearly_equal():
    _, _, update = first_updates(config_with(name="muon", weight_decay=0.0))
    update = blocks(update)
    depth, width = update["mlp"]["fc1"]["kernel"].shape[:2]
    qkv = np.moveaxis(update["attn"]["qkv"]["kernel"], 2, 1).reshape(depth, 3, width, width)
    matrices = [
        *qkv.reshape(-1, width, width),
        *update["attn"]["proj"]["kernel"].reshape(depth, width, width),
        *update["mlp"]["fc1"]["kernel"],
        *update["mlp"]["fc2"]["kernel"],
    ]
    assert len(matrices) == 6 * depth
    for matrix in matrices:
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / np.median(values) < 1.6
        assert np.sqrt(np.square(matrix).mean()) == pytest.approx(0.2, rel=0.35)
    _, _, by_adam = first_updates(config_with(name="adamw", weight_decay=0.0))
    proj = blocks(by_adam)["attn"]["proj"]["kernel"][0].reshape(width, width)
    values = np.linalg.svd(proj, compute_uv=False)
    assert values.max() / np.median(values) > 1.8


def test_muon_of_stacked_blocks_is_muon_of_each_and_adam_of_all_else():
    _, grads, update = first_updates(config_with(name="muon", weight_decay=0.0))
    kernel = blocks(grads)["mlp"]["fc1"]["kernel"][1]
    alone = optax.contrib.muon(1.0, consistent_rms=0.2)
    wanted, _ = alone.update({"w": kernel}, alone.init({"w": kernel}), {"w": kernel})
    np.testing.assert_allclose(blocks(update)["mlp"]["fc1"]["kernel"][1], wanted["w"], atol=1e-5)
    by_adam = first_updates(config_with(weight_decay=0.0))[2]
    for name in ("patch_embed", "cls_token", "norm"):
        ours, theirs = update["encoder"][name], by_adam["encoder"][name]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("name", ["lion", "muon", "adamw"])
def test_decay_is_decoupled_and_by_role(name):
    params, _, with_decay = first_updates(config_with(name=name, weight_decay=0.5, clip_norm=1.0))
    _, _, without = first_updates(config_with(name=name, weight_decay=0.0, clip_norm=1.0))

    def check(path, p, a, b):
        decayed = optim.role(path) in optim.DECAYED
        np.testing.assert_allclose(a - b, -0.5 * p * decayed, atol=1e-5)

    jax.tree_util.tree_map_with_path(check, params, with_decay, without)


def test_lion_moves_every_parameter_by_the_rate():
    _, grads, update = first_updates(config_with(name="lion", weight_decay=0.0))
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -np.sign(g), atol=1e-6), update, grads)


def test_a_gradient_is_clipped_by_its_whole_norm():
    o = dict(name="adamw", clip_norm=1.0, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0)
    tx = optimizers.by_name(o, lambda _: 1e6)  # a step of Adam is the gradient then
    grads = {"head": {"kernel": jnp.array([30.0]), "bias": jnp.array([40.0])}}
    update, _ = tx.update(grads, tx.init(grads), grads)
    assert float(optax.tree.norm(update)) == pytest.approx(1.0, rel=1e-5)
    small = jax.tree.map(lambda x: x / 1000, grads)
    update, _ = tx.update(small, tx.init(small), small)
    assert float(optax.tree.norm(update)) == pytest.approx(0.05, rel=1e-4)


def test_by_name_adamw_without_clipping_is_the_published_one():
    config = config_with()
    _, _, plain = first_updates(config)
    schedule = common.learning_rate(config.optim, 16, 100, 10)
    params, grads, _ = first_updates(config)
    tx = optimizers.by_name(config.optim, schedule)
    by_name = jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])
    named = by_name(params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), named, plain)


def test_runs_of_other_lengths_share_their_rates_until_the_shorter_one_falls():
    short = optimizers.stable_decay(1.0, 100, 10, 0.01)
    long = optimizers.stable_decay(1.0, 1000, 10, 0.01)
    steps = np.arange(81)
    np.testing.assert_array_equal(short(steps), long(steps))
    assert short(0) == 0
    assert short(5) == pytest.approx(0.5)
    assert (short(steps[10:]) == 1.0).all()
    falling = np.asarray(short(np.arange(80, 101)))
    assert (np.diff(falling) < 0).all()
    assert falling[-1] == pytest.approx(0.01)
    assert falling[5] == pytest.approx(0.01 + 0.99 * (1 - 0.25**0.5))


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_an_optimizer_does_the_same_on_every_mesh(name):
    config = tiny_config()
    config.optim.update(name=name, clip_norm=1.0, schedule="wsd")
    ends = [updates(config, mesh_of(*shape), 2)[0][-1].params for shape in SHAPES[::3]]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *ends)


def test_fine_tuning_takes_them_too():
    config = finetune_config()
    config.optim.name = "lion"
    tx, _ = tasks.build(config).optimizer(10, 10)
    assert tx.init(jax.eval_shape(tasks.build(config).init, jax.random.key(0))[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(name="moun"), "config.optim.name='moun'; nearest: muon"),
        (dict(schedule="step"), "config.optim.schedule='step': give cosine or wsd"),
        (dict(clip_norm=-1.0), "config.optim.clip_norm=-1.0: give a number from 0"),
        (dict(cooldown=0.0), "config.optim.cooldown=0.0"),
    ],
)
def test_what_there_is_not_is_refused(changes, words):
    config = tiny_config()
    config.optim.update(changes)
    with pytest.raises(UserError, match=words):
        tasks.build(config).optimizer(10, 10)


def test_muon_refuses_a_kernel_of_a_block_that_it_does_not_know():
    params = {"encoder": {"stack": {"blocks": {"gate": {"head": {"kernel": jnp.ones((2, 3, 3))}}}}}}
    with pytest.raises(UserError, match="muon: add '.*gate/head/kernel' to MATRICES"):
        optimizers.dimension_numbers(params)
