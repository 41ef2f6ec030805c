"""Tasks do what their configs say: whole updates written out in NumPy, and no key without effect.

The parts have tests of their own; these hold what joins them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GREY, tiny_config

from mae_jax import optim, tasks, train
from mae_jax.config import OPTIONAL_KEYS
from mae_jax.configs import camvid, digits, finetune, linprobe, quickstart
from mae_jax.data import augment, pipeline, transforms, workers
from mae_jax.data.sources import open_source
from mae_jax.models import mixup


def tiny(config, **changes):
    config.model.update(width=32, depth=3, heads=4, patch_size=(8, 8), image_size=(16, 16))
    config.model.update(channels=1, dtype="float32")
    config.data.update(GREY, source="bundled:digits")
    config.update(changes)
    return config


def tuned(**changes):
    config = tiny(finetune.get_config("batch_size=16,variant=B/16"), start="xavier")
    config.mix.group = 8
    config.update(changes)
    return config


def draws(rng, params, scale=1.0):
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), params)


@pytest.mark.parametrize(
    ("make", "b2", "warmup", "layer_decay", "decayed"),
    [(tiny_config, 0.95, 2, 1.0, ("kernel", "token")), (tuned, 0.999, 100, 0.65, "kernel")],
)
def test_updates_are_adamw_with_decay_by_layer_and_role(make, b2, warmup, layer_decay, decayed):
    config = make()
    config.optim.blr = 0.5  # large enough that float32 parameters show each update
    depth, task, rng = config.model.depth, tasks.build(config), np.random.default_rng(0)
    tx, _ = task.optimizer(100 * 20, 20)
    params = draws(rng, jax.eval_shape(task.init, jax.random.key(0))[0])
    opt_state, step_by = tx.init(params), jax.jit(tx.update)
    wide = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    ours, theirs = params, wide(params)
    first = second = jax.tree.map(np.zeros_like, theirs)
    for step in range(3):
        grads = draws(rng, params)
        updates, opt_state = step_by(grads, opt_state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        grad = wide(grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grad)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, second, grad)
        rate = 0.5 * 16 / 256 * step / warmup

        def update(path, w, m, v, rate=rate, step=step):
            name = optim.path_name(path)
            if name.startswith("encoder/stack"):
                layers = [layer_decay ** (depth - i) for i in range(depth)]
                rate = rate * np.reshape(layers, (depth, *[1] * (w.ndim - 1)))
            elif name.startswith("encoder/"):  # patches, positions, cls token; no norm with "avg"
                rate = rate * layer_decay ** (depth + 1)
            w = w * (1 - rate * 0.05) if name.endswith(decayed) else w
            mean, square = m / (1 - 0.9 ** (step + 1)), v / (1 - b2 ** (step + 1))
            return w - rate * mean / (np.sqrt(square) + 1e-8)

        theirs = jax.tree_util.tree_map_with_path(update, theirs, first, second)
    before = jax.tree.leaves(params)
    for found, wanted, start in zip(*map(jax.tree.leaves, (ours, theirs)), before, strict=True):
        assert np.abs(wanted - start).max() > 1e-4
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7)


def test_fine_tuning_ends_at_its_lowest_rate():
    _, schedule = tasks.build(tuned()).optimizer(2000, 20)
    assert schedule(1999) == pytest.approx(1e-6, rel=0.1)


def test_fine_tuning_erases_before_it_mixes_and_drops_paths_in_training_only():
    config = tuned(erase=1.0)
    config.model.drop_path = 0.9
    task, rng = tasks.build(config), np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 16, 1), np.uint8)
    batch = {"image": image, "label": rng.integers(0, 10, 16).astype(np.int32)}
    stream = partial(train.stream, 0, step=0)
    prepared = task.prepare(batch, stream)
    erased = mixup.erase(jnp.asarray((image / 255 - 0.5) / 0.5, jnp.float32), stream("erase"), 1.0)
    drawn = mixup.draw_mix(stream("mix"), 2, 16, 16, mixup=0.8, cutmix=1.0)
    wanted = mixup.mix_images(erased, drawn)
    np.testing.assert_allclose(prepared["normalized"], wanted, atol=1e-5)

    params = draws(rng, jax.eval_shape(task.init, jax.random.key(0))[0], 0.2)

    def loss(key, training):
        return float(task.loss(params, {}, prepared, lambda _: jax.random.key(key), training)[0])

    assert loss(0, True) != loss(1, True)
    assert loss(0, False) == loss(1, False)


def probe_config(name="lars"):
    config = tiny(linprobe.get_config("batch_size=32,select=0,epochs=90"), features="pixels")
    config.model.update(image_size=(8, 8), patch_size=(4, 4))
    config.probe.bn_group = 8
    config.optim.name = name
    return config


def test_the_linear_probe_is_batch_norm_and_lars():
    config = probe_config()
    config.optim.blr = 100.0  # large enough that float32 parameters show each update
    task, rng = tasks.build(config), np.random.default_rng(0)
    tx, _ = task.optimizer(20 * 90, 20)
    state = train.init_state(task, tx, 0)
    update = jax.jit(partial(train.update, task=task, tx=tx, seed=0))
    kernel = np.asarray(state.params["probe"]["head"]["kernel"][0], np.float64)
    bias, mean, var = np.zeros(10), np.zeros(64), np.ones(64)
    kernel_trace, bias_trace = np.zeros_like(kernel), np.zeros(10)
    for step in range(6):
        image, label = rng.integers(0, 256, (32, 8, 8, 1), np.uint8), rng.integers(0, 10, 32)
        batch = {"image": image, "label": label.astype(np.int32)}
        state, scalars = update(state, batch)
        x = ((image / 255.0 - 0.5) / 0.5).reshape(32, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4)
        x = x.reshape(4, 8, 64)
        x_mean, x_var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        normed = ((x - x_mean) / np.sqrt(x_var + 1e-6)).reshape(32, 64)
        mean = 0.9 * mean + 0.1 * x_mean[0, 0]
        var = 0.9 * var + 0.1 * x_var[0, 0] * 8 / 7
        logits = normed @ kernel + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(scalars["loss"], -np.log(p[range(32), label]).mean(), rtol=1e-5)
        p[range(32), label] -= 1
        kernel_grad, bias_grad = normed.T @ (p / 32), (p / 32).sum(0)
        trust = 0.001 * np.linalg.norm(kernel) / np.linalg.norm(kernel_grad)
        kernel_trace = 0.9 * kernel_trace + trust * kernel_grad
        bias_trace = 0.9 * bias_trace + bias_grad
        rate = 100 * 32 / 256 * (step / 20) / 10
        kernel, bias = kernel - rate * kernel_trace, bias - rate * bias_trace
    head, stats = state.params["probe"]["head"], state.extra["batch_norm"]
    start = train.init_state(task, tx, 0).params["probe"]["head"]["kernel"][0]
    assert np.abs(kernel - start).max() > 1e-5
    np.testing.assert_allclose(head["kernel"][0], kernel, atol=1e-7)
    np.testing.assert_allclose(head["bias"][0], bias, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(stats.mean, mean, atol=1e-6)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)


ADAMW = {
    "b1": 0.5, "b2": 0.5, "weight_decay": 9.0, "blr": 1.0, "warmup": "4 steps", "min_lr": 1.0
}  # fmt: skip
LARS = {"momentum": 0.5, "weight_decay": 9.0, "blr": 1.0, "warmup": "4 steps", "min_lr": 1.0}
CASES = [
    (tiny_config, ADAMW | {"eps": 1.0}),
    (tuned, ADAMW | {"eps": 1.0, "layer_decay": 0.5}),
    (probe_config, LARS | {"name": "adamw"}),
    (partial(probe_config, name="adamw"), ADAMW),
]


@pytest.mark.parametrize(("make", "changes"), CASES)
def test_every_key_of_the_optimizer_changes_the_updates(make, changes):
    def updates(change):
        config = make()
        config.optim.warmup = "1 steps"
        config.optim.update(change)
        task, rng = tasks.build(config), np.random.default_rng(0)
        tx, _ = task.optimizer(8, 8)
        params = draws(rng, jax.eval_shape(task.init, jax.random.key(0))[0])
        state, found = tx.init(params), []
        for _ in range(4):
            given, state = tx.update(draws(rng, params), state, params)
            found += [np.asarray(x) for x in jax.tree.leaves(given)]
        return np.concatenate([x.ravel() for x in found])

    usual = updates({})
    for key, value in changes.items():
        assert key in make().optim or f"optim.{key}" in OPTIONAL_KEYS
        assert not np.allclose(updates({key: value}), usual, rtol=1e-3, atol=0), key


def test_an_image_is_flipped_before_it_is_distorted(monkeypatch):
    done = []

    def note(what, function):
        return lambda *arguments: done.append(what) or function(*arguments)

    for what in ("random_box", "random_flip"):
        monkeypatch.setattr(transforms, what, note(what, getattr(transforms, what)))
    distort = augment.RandAugment.__call__
    monkeypatch.setattr(augment.RandAugment, "__call__", note("augment", distort))
    config = tuned()
    monkeypatch.setattr(workers, "THREADS_FOR_SMALL", 1)
    batches = pipeline.train_batches(
        open_source("bundled:digits", "train[:1]"), config.data,
        batch_size=1, image_size=(16, 16), channels=1, seed=0,
    )  # fmt: skip
    next(batches)
    batches.close()
    assert done[:3] == ["random_box", "random_flip", "augment"]


@pytest.mark.parametrize(
    ("recipe", "arg", "words"),
    [
        (camvid, "task=frozen,features=pixles,data=x", "features='pixles'"),
        (linprobe, "select=150", "select=150: give a percentage"),
        (quickstart, "variant=L/16", "variant"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(recipe, arg, words):
    with pytest.raises(ValueError, match=words):
        recipe.get_config(arg)


def test_seeds_beyond_the_last_images_begin_again():
    first, last = (digits.get_config(f"task=finetune,labels=10,seed={n}") for n in (0, 9))
    assert first.data.split == last.data.split == "train[0:144]"
    assert digits.get_config("task=finetune,labels=10,seed=1").data.split == "train[144:288]"
    assert digits.get_config("task=finetune,labels=100,seed=5").data.split == "train[0:1437]"
