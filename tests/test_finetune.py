"""Fine-tuning: targets, checkpoints that are started from, exact accuracy, and real runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import (
    DECODER,
    MODEL,
    assert_trees_equal,
    batch_of,
    finetune_config,
    fresh_state,
    load_encoder_into,
    mesh_of,
    save_workdir,
    task_on,
    updates,
)

from mae_jax import checkpoint, evals, layer_decay, optim, sharding, tasks, train
from mae_jax.commands import train as command
from mae_jax.configs import finetune
from mae_jax.data import eval_pipeline, pipeline, sources
from mae_jax.evals import results
from mae_jax.metrics import writer
from mae_jax.models import classifier, posemb, resize

# --- recipes ---


@pytest.mark.parametrize(
    "variant, epochs, lr, layer_decay, drop_path, group",
    [
        ("B/16", 100, 2e-3, 0.65, 0.1, 32),
        ("L/16", 50, 4e-3, 0.75, 0.2, 32),
        ("H/14", 50, 4e-3, 0.75, 0.3, 16),
    ],
)
def test_recipes_are_those_of_the_official_repository(
    variant, epochs, lr, layer_decay, drop_path, group
):
    config = finetune.get_config(f"variant={variant}")
    o = config.optim
    assert config.train_for == f"{epochs} epochs"
    assert optim.peak_lr(o.blr, config.batch_size) == pytest.approx(lr)
    assert (o.layer_decay, config.model.drop_path) == (layer_decay, drop_path)
    assert (o.b1, o.b2, o.weight_decay, o.warmup, o.min_lr) == (0.9, 0.999, 0.05, "5 epochs", 1e-6)
    assert (config.smoothing, config.erase, config.ema, config.model.pool) == (0.1, 0.25, 0, "avg")
    assert config.mix.to_dict() == {"mixup": 0.8, "cutmix": 1.0, "group": group}
    assert config.data.augment == "rand-m9-mstd0.5-inc1"
    assert tuple(config.data.crop_scale) == (0.08, 1.0)


@pytest.mark.parametrize(
    "variant, epochs, drop_path", [("B/16", 300, 0.1), ("L/16", 200, 0.2), ("H/14", 200, 0.2)]
)
def test_the_recipe_from_scratch_is_that_of_table_11(variant, epochs, drop_path):
    config = finetune.get_config(f"variant={variant},scratch=true")
    o = config.optim
    assert config.train_for == f"{epochs} epochs"
    assert (config.batch_size, o.blr, o.b1, o.b2) == (4096, 1e-4, 0.9, 0.95)
    assert (o.weight_decay, o.warmup, o.layer_decay) == (0.3, "20 epochs", 1.0)
    assert (config.ema, config.smoothing, config.model.drop_path) == (0.9999, 0.1, drop_path)


def test_h_at_448_has_a_grid_of_32():
    config = finetune.get_config("variant=H/14,image_size=448")
    assert tuple(config.model.image_size) == (448, 448)
    assert tuple(config.model.patch_size) == (14, 14)


# --- what is prepared on the device ---


def prepared(config, mesh):
    task = task_on(config, mesh)
    batch = sharding.put_batch(mesh, batch_of(config), config.batch_size)
    draw = jax.jit(lambda batch, step: task.prepare(batch, lambda n: train.stream(0, n, step)))
    return [jax.device_get(draw(batch, step)) for step in (0, 1)], draw.lower(batch, 0)


def test_erasing_and_mixing_are_the_same_on_every_mesh_and_new_at_every_step():
    config = finetune_config()
    config.erase = 0.5
    (one, other), _ = prepared(config, mesh_of(1, 1, 1))
    (eight, _), _ = prepared(config, mesh_of(8, 1, 1))
    assert not np.allclose(one["normalized"], other["normalized"])
    for name in ("normalized", "target"):
        np.testing.assert_allclose(one[name], eight[name], atol=1e-6)
    np.testing.assert_allclose(one["target"].sum(1), 1, rtol=1e-5)


def test_without_mixing_targets_are_smoothed_labels_and_images_normalized():
    config = finetune_config()
    config.mix.update(mixup=0.0, cutmix=0.0)
    config.erase = 0.0
    (out, _), _ = prepared(config, mesh_of(1, 1, 1))
    batch = batch_of(config)
    np.testing.assert_allclose(out["normalized"], (batch["image"] / 255 - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_allclose(out["target"], 0.9 * np.eye(10)[batch["label"]] + 0.01, atol=1e-6)


def test_mixing_gathers_no_batch_on_a_device():
    config = finetune_config()
    config.batch_size, config.mix.group = 64, 32
    _, lowered = prepared(config, mesh_of(8, 1, 1))
    text = lowered.compile().as_text()
    height, width = config.model.image_size
    assert f"f32[8,{height},{width},1]" in text
    assert f"f32[64,{height},{width},1]" not in text
    assert f"f32[2,32,{height},{width},1]" not in text


# --- an update ---


@pytest.fixture(scope="module")
def states():
    """Mesh -> the states before the first and after each of three updates."""
    config = finetune_config()
    config.ema = 0.6
    by_mesh = {}
    for shape in [(1, 1, 1), (2, 4, 1)]:
        by_mesh[shape], metrics = updates(config, mesh_of(*shape), 3)
        assert all(np.isfinite(x["loss"]) for x in metrics)
    return by_mesh


def test_updates_are_the_same_on_every_mesh(states):
    """Compared with the size of an update: Adam amplifies the rounding of tiny gradients."""
    one, many = states[1, 1, 1], states[2, 4, 1]
    assert_trees_equal(many[0].params, one[0].params, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b), one[-1].params, one[0].params)
    apart = jax.tree.map(lambda a, b: np.linalg.norm(a - b), one[-1].params, many[-1].params)
    assert sum(jax.tree.leaves(moved)) > 1e-3
    assert sum(jax.tree.leaves(apart)) < 0.01 * sum(jax.tree.leaves(moved))


def test_averaged_weights_follow_the_weights(states):
    first, *others = states[1, 1, 1]
    expected = first.params
    for state in others:
        expected = jax.tree.map(lambda a, p: 0.6 * a + 0.4 * p, expected, state.params)
        assert_trees_equal(state.extra["ema"], expected, rtol=1e-4, atol=1e-6)


def test_a_partial_fine_tuning_moves_what_it_trains_and_nothing_else():
    config = finetune_config()
    assert tasks.build(config).flops_multiplier == 3
    config.trained_blocks, config.ema = 1.0, 0.0
    task = tasks.build(config)
    assert task.flops_multiplier == 2  # forward, and twice that for one block of two
    tx, _ = task.optimizer(10, 100)
    state = train.init_state(task, tx, 0)
    state = state.replace(params=jax.tree.map(lambda x: x + 0.1, state.params))
    step = jax.jit(partial(train.update, task=task, tx=tx, seed=0))
    after, _ = step(step(state, batch_of(config))[0], batch_of(config))  # the first has rate 0
    share = classifier.trained_share(state.params, 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(share):
        old, new = (
            dict(jax.tree_util.tree_leaves_with_path(x.params))[path] for x in (state, after)
        )
        moved = np.asarray(old != new)
        np.testing.assert_array_equal(moved & (np.asarray(leaf) == 0), False)
        for trained, layer in zip(leaf, moved, strict=True) if leaf.ndim else [(leaf, moved)]:
            assert layer.any() == bool(trained), optim.path_name(path)


def test_the_rate_of_each_layer_is_scaled_floor_included():
    """With a schedule that is all floor, Adam's first update is the rate itself."""
    params = {
        "encoder": {"cls_token": jnp.ones((1, 1, 2)), "stack": {"blocks": {"fc1": {
            "bias": jnp.ones((2, 3))}}}},
        "head": {"bias": jnp.ones(3)},
    }  # fmt: skip
    schedule = optim.cosine_schedule(1e-2, 1, 0, min_lr=1e-2)
    tx = optim.adamw(schedule, scales=partial(layer_decay.layer_scales, layer_decay=0.5))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["bias"], -1e-2, rtol=1e-5)
    blocks = updates["encoder"]["stack"]["blocks"]["fc1"]["bias"]
    np.testing.assert_allclose(blocks, -1e-2 * np.array([[0.25] * 3, [0.5] * 3]), rtol=1e-5)


def test_augmentation_changes_batches_and_not_their_labels():
    config = finetune_config()
    source = sources.open_source("bundled:digits", "train")
    shape = dict(batch_size=32, image_size=(16, 16), channels=1, seed=0)
    plain, augmented = (
        next(pipeline.train_batches(source, data, **shape))
        for data in (ConfigDict(config.data.to_dict() | {"augment": ""}), config.data)
    )
    np.testing.assert_array_equal(plain["label"], augmented["label"])
    same = (plain["image"] == augmented["image"]).all((1, 2, 3)).mean()
    assert 0.05 < same < 0.6  # neither operation fires for a quarter; some change nothing


# --- accuracy ---


def test_ranks_and_losses_are_those_of_numpy():
    logits = np.array([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [np.nan, 1.0, 2.0]])
    found = results.measure(logits, np.array([2, 0, 2, 0]))
    np.testing.assert_array_equal(found.rank_N, [1, 0, 2, 3])
    expected = [np.log(np.exp([1, 3, 2]).sum()) - 2, *[np.log(3)] * 2]
    np.testing.assert_allclose(found.loss_N[:3], expected)


def test_accuracy_is_the_same_for_any_devices_and_batch_size():
    config = finetune_config()
    config.evals.accuracy.split = "test[:50]"
    del config.evals.averaged
    params, extra = jax.jit(tasks.build(config).init)(jax.random.key(0))
    params["head"]["kernel"] *= 100
    found = []
    for shape, batch_size in [((1, 1, 1), 50), ((2, 1, 1), 8), ((8, 1, 1), 16)]:
        mesh = mesh_of(*shape)
        task = task_on(config, mesh)
        state = train.TrainState(jnp.zeros(()), params, (), extra)
        config.evals.accuracy.batch_size = batch_size
        scalars = evals.build(config, task.predict(), mesh)["accuracy"].run(state).scalars
        found.append(scalars)
    source = sources.open_source("bundled:digits", "test[:50]")
    (batch,) = eval_pipeline.eval_batches(source, batch_size=50, image_size=(16, 16), channels=1)
    logits = np.asarray(task.predict()["logits"](params, extra, {"image": batch["image"]}))
    top1 = 100 * (logits.argmax(1) == batch["label"]).mean()
    top5 = 100 * (np.argsort(-logits)[:, :5] == batch["label"][:, None]).any(1).mean()
    for scalars in found:
        assert scalars["eval/images"] == 50
        assert scalars["eval/top1"] == pytest.approx(top1)
        assert scalars["eval/top5"] == pytest.approx(top5)
        assert scalars["eval/loss"] == pytest.approx(found[0]["eval/loss"], rel=1e-5)


# --- runs ---

PRETRAIN = f"""
from mae_jax.configs.pretrain import get_config as recipe

def get_config(arg=None):
    config = recipe("batch_size=16,image_size=16")
    config.model.update({MODEL | DECODER})
    config.data.update(source="bundled:digits", mean=(0.5,), std=(0.5,))
    config.train_for, config.optim.warmup, config.log_every = "2 steps", "1 steps", "1 steps"
    config.checkpoint.every, config.evals = "2 steps", {{}}
    return config
"""
FLAGS = (
    "--config.train_for=6 steps", "--config.optim.warmup=1 steps",
    "--config.log_every=1 steps", "--config.checkpoint.every=6 steps",
    "--config.evals.accuracy.every=6 steps", "--config.evals.accuracy.batch_size=64",
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "tiny.py").write_text(PRETRAIN)
    assert command.main([f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def saved_encoder(workdir):
    path = checkpoint.find(workdir, "init_from")
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        checkpoint.shapes(path, ("params", "encoder")),
    )
    return path, checkpoint.restore(path, shapes, ("params", "encoder"))


def test_the_train_command_fine_tunes_a_pretrained_run(pretrained, tmp_path, capsys):
    arg = f"init={pretrained},source=bundled:digits,test=test,batch_size=16"
    run = tmp_path / "run"
    argv = [f"--config=configs/finetune.py:{arg}", f"--workdir={run}", *FLAGS]
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    assert f"weights of {pretrained}/checkpoints/2" in said
    last = {k: v for line in writer.read(run / "metrics.jsonl") for k, v in line.items()}
    assert last["step"] == 6 and np.isfinite(last["train/loss"])
    assert 0 <= last["eval/top1"] <= last["eval/top5"] <= 100
    assert last["eval/images"] == 360
    assert f"{last['eval/top1']:.2f} %" in said  # the summary tells the accuracy
    assert command.main(argv) == 0  # and again: finished
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("pool, image_size", [("cls", (16, 16)), ("avg", (32, 24))], ids=str)
def test_a_run_starts_from_the_encoder_and_positions_of_its_grid(pretrained, pool, image_size):
    config = finetune_config(f"init={pretrained}", pool=pool, image_size=image_size)
    config.ema = 0.9
    task, fresh = fresh_state(config, mesh_of(2, 2, 1))
    path, saved = saved_encoder(pretrained)
    state = task.load(path, fresh)
    table = posemb.sincos_2d(32, (2, 2))[None]
    saved["pos_embed"] = resize.positions(table, (2, 2), (image_size[0] // 8, image_size[1] // 8))
    if pool == "avg":
        saved.pop("norm")
    ours = jax.device_get(state.params)
    assert_trees_equal(ours["encoder"], dict(saved), atol=1e-6)
    np.testing.assert_array_equal(ours["head"]["kernel"], fresh.params["head"]["kernel"])
    assert_trees_equal(jax.device_get(state.extra["ema"]), ours)
    shardings = [jax.tree.map(lambda x: x.sharding, s.params) for s in (fresh, state)]
    assert shardings[0] == shardings[1]


@pytest.mark.parametrize(
    "model, message",
    [
        ({"width": 64}, r"cls_token: float32\[1, 1, 32\] in the .*float32\[1, 1, 64\] by this"),
        ({"depth": 3}, r"blocks/attn/proj/bias: float32\[2, 32\] in the .*\[3, 32\] by this"),
        ({"heads": 2}, r"blocks/attn/qkv/bias: float32\[2, 3, 4, 8\] in the .*\[2, 3, 2, 16\] by"),
    ],
    ids=str,
)
def test_an_encoder_that_does_not_fit_is_refused_with_both_sides_shown(pretrained, model, message):
    config = finetune_config(f"init={pretrained}", **model)
    with pytest.raises(ValueError, match=message):
        load_encoder_into(config, pretrained)


def test_a_checkpoint_without_the_final_norm_cannot_be_pooled_by_cls(pretrained, tmp_path):
    """Such as one of a fine-tuned model; its trained positions are taken, also resized."""
    config = finetune_config()
    config.ema = 0.0
    _, state = fresh_state(config, mesh_of(1, 1, 1))
    workdir = save_workdir(config, tmp_path / "finetuned", state)
    config = finetune_config(f"init={workdir}", image_size=(24, 24))
    found = load_encoder_into(config, workdir)
    table = resize.positions(state.params["encoder"]["pos_embed"], (2, 2), (3, 3))
    np.testing.assert_allclose(found["pos_embed"], table, atol=1e-6)
    config.model.pool = "cls"
    with pytest.raises(ValueError, match="no final norm, which this task reads"):
        load_encoder_into(config, workdir)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint: looked for"):
        load_encoder_into(finetune_config(f"init={tmp_path / 'nothing'}"), tmp_path / "nothing")


# --- what cannot work ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": "pretrained"}, "which encoder is fine-tuned"),
        ({"start": "warm"}, "config.start='warm': unknown"),
        ({"init_from": "somewhere"}, "not used with start='normal'"),
        ({"smoothing": 1.5}, "config.smoothing=1.5"),
        ({"erase": -0.1}, "config.erase=-0.1"),
        ({"ema": 1.0}, "config.ema=1.0"),
        ({"trained_blocks": 1.5}, "config.trained_blocks=1.5"),
        ({"trained_blocks": 3.0}, "config.trained_blocks=3.0: give .* 0 to 2 blocks"),
        ({"mix": {"group": 6}}, "config.mix.group=6"),
        ({"mix": {"group": 1}}, "config.mix.group=1"),
        ({"mix": {"mixup": -1.0}}, "config.mix.mixup=-1.0"),
        ({"optim": {"layer_decay": 0.0}}, "config.optim.layer_decay=0.0"),
        ({"data": {"augment": "auto"}}, "config.data.augment='auto'"),
        ({"data": {"mean": (0.5, 0.5)}}, "has 2 numbers for images of 1 channels: give one"),
        ({"data": {"source": "bundled:photos"}}, "has no labels"),
        ({"model": {"pool": "max"}}, "pool='max' is unknown"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(change, message):
    config = finetune_config()
    for key, value in change.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    with pytest.raises(ValueError, match=message):
        tasks.build(config)
