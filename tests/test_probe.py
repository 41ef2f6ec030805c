"""Linear and attentive probes: the head by hand, the encoder untouched, a whole run."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import (
    assert_trees_equal,
    batch_of,
    compiled,
    mesh_of,
    probe_config,
    probe_of,
    run,
    save_workdir,
    tiny_config,
)
from tiny import finetune_config as tiny_finetune_config
from tiny import updates as all_updates

from mae_jax import checkpoint, evals, optim, provenance, tasks, train
from mae_jax.configs.finetune import get_config as finetune_config
from mae_jax.configs.knn import get_config as knn_config
from mae_jax.configs.linprobe import get_config
from mae_jax.data import eval_pipeline, labels, pipeline, settings, transforms
from mae_jax.evals.probe import Evaluator
from mae_jax.metrics import summary, writer
from mae_jax.models import probe
from mae_jax.models.posemb import sincos_2d
from mae_jax.tasks import pretrain


def features(rows=24, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) * 3 + 2).astype(np.float32)


# --- the heads ---


def test_batch_norm_in_training_uses_the_statistics_of_each_group():
    x = features()
    got, _ = probe.batch_norm(jnp.asarray(x), probe.initial_stats(8), 6, train=True)
    for rows, normalised in zip(x.reshape(4, 6, 8), got.reshape(4, 6, 8), strict=True):
        expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-6)
        np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-5)
    whole, _ = probe.batch_norm(jnp.asarray(x), probe.initial_stats(8), 24, train=True)
    assert np.max(np.abs(whole - got)) > 0.1


def test_running_statistics_follow_the_first_group_with_the_unbiased_variance():
    stats = probe.initial_stats(8)
    mean, var = np.zeros(8), np.ones(8)
    for seed in range(3):
        x = features(seed=seed)
        _, stats = probe.batch_norm(jnp.asarray(x), stats, 6, train=True)
        mean = 0.9 * mean + 0.1 * x[:6].mean(0)
        var = 0.9 * var + 0.1 * x[:6].var(0, ddof=1)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)
    x = features(seed=9)
    got, after = probe.batch_norm(jnp.asarray(x), stats, 6, train=False)
    np.testing.assert_allclose(got, (x - mean) / np.sqrt(var + 1e-6), rtol=1e-4, atol=1e-5)
    assert after is stats


def test_the_linear_head_starts_with_deviation_001_and_all_heads_alike():
    params = probe.init_heads(
        probe.LinearHead(100), jax.random.key(0), jnp.zeros((1, 400)), count=3
    )
    kernel = np.asarray(params["head"]["kernel"])
    assert kernel.shape == (3, 400, 100)
    assert abs(kernel.std() - 0.01) < 1e-4
    np.testing.assert_array_equal(kernel[0], kernel[2])
    assert not np.any(params["head"]["bias"])


def test_the_attentive_head_is_softmax_pooling_written_out():
    head, x = probe.AttentiveHead(5, heads=2), features(2 * 7).reshape(2, 7, 8)
    params = probe.init_heads(head, jax.random.key(1), jnp.asarray(x), count=1)
    got = probe.apply_heads(head, params, jnp.asarray(x))[:, 0]
    p = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params)
    key_value = np.einsum("bld,dcsf->blcsf", x, p["kv"]["kernel"]) + p["kv"]["bias"]
    score = np.einsum("sf,blsf->bsl", p["query_token"][0], key_value[:, :, 0]) / np.sqrt(4)
    weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    pooled = np.einsum("bsl,blsf->bsf", weight, key_value[:, :, 1]).reshape(2, 8)
    normed = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(
        pooled.var(-1, keepdims=True) + 1e-6
    )
    linear = p["linear"]["head"]
    np.testing.assert_allclose(got, normed @ linear["kernel"] + linear["bias"], atol=1e-5)


# --- the crop ---


def test_the_crop_is_drawn_once_and_cut_to_the_picture():
    """Written out from REFERENCE section 4, with the same draws."""
    rng, ours = np.random.default_rng(0), np.random.default_rng(0)
    clipped = 0
    for width, height in [(100, 30), (30, 100), (64, 64), (1, 1)] * 50:
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        clipped += w > width or h > height
        w, h = max(min(w, width), 1), max(min(h, height), 1)
        box = (rng.integers(width - w + 1), rng.integers(height - h + 1), w, h)
        assert transforms.probe_box(width, height, (0.08, 1.0), (3 / 4, 4 / 3), ours) == box
    assert clipped > 20


def test_the_pipeline_knows_the_crop_of_the_probe():
    data = get_config("init=x").data
    assert (data.crop, data.crop_scale, data.flip) == ("probe", (0.08, 1.0), 0.5)
    picture = np.arange(3000, dtype=np.uint8).reshape(25, 40, 3)
    crop = settings.make_crop(data)(picture, (8, 16), np.random.default_rng(3))
    left, top, w, h = transforms.probe_box(
        40, 25, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(3)
    )
    part = Image.fromarray(picture).crop((left, top, left + w, top + h))
    np.testing.assert_array_equal(crop, part.resize((16, 8), Image.Resampling.BICUBIC))


# --- the task ---


ATTENTIVE = {"probe.head": "attentive", "optim.name": "adamw"}


def updates(config, mesh, steps=3):
    """The states before and after some updates, and the metrics of the last."""
    states, metrics = all_updates(config, mesh, steps)
    return states[0], states[-1], metrics[-1]


@pytest.fixture(scope="module")
def swept():
    return updates(probe_config(), mesh_of(1, 1, 1))


def heads(state):
    return jax.tree.leaves(state.params)


def test_heads_learn_and_the_encoder_stays_as_it_is(swept):
    before, after, scalars = swept
    jax.tree.map(np.testing.assert_array_equal, before.extra["encoder"], after.extra["encoder"])
    assert all(np.abs(a - b).max() > 0 for a, b in zip(heads(before), heads(after), strict=True))
    assert np.abs(after.extra["batch_norm"].mean).max() > 0
    assert not any("encoder" in str(path) for path, _ in jax.tree.leaves_with_path(after.params))
    assert np.isfinite(scalars["loss"])


@pytest.mark.parametrize("changes", [{}, ATTENTIVE], ids=["linear", "attentive"])
def test_the_published_rate_gives_the_same_in_a_sweep_and_alone(changes, swept):
    _, together, scalars = updates(probe_config(**changes), mesh_of(1, 1, 1)) if changes else swept
    config = probe_config(**changes)
    config.optim.sweep = ()
    _, alone, lone_scalars = updates(config, mesh_of(1, 1, 1))
    assert scalars["loss"] == pytest.approx(lone_scalars["loss"], rel=1e-6)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(together.params), heads(alone), strict=True
    ):
        if "kv" in str(path) and "bias" in str(path):
            continue  # the gradient of the key bias is nothing but rounding, which Adam scales up
        largest = np.abs(theirs).max()
        assert np.abs(ours[0] - theirs[0]).max() <= 1e-5 * largest
        assert np.abs(ours[1] - theirs[0]).max() > 1e-5 * largest


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_updates_agree_over_meshes(swept, shape):
    _, other, _ = updates(probe_config(), mesh_of(*shape))
    for ours, theirs in zip(heads(other), heads(swept[1]), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    np.testing.assert_allclose(
        other.extra["batch_norm"].var, swept[1].extra["batch_norm"].var, rtol=1e-5
    )


def test_the_forward_pass_alone_is_paid_for():
    """A backward pass through the encoder would triple the work of the step."""

    def work(width_of_mlp):
        config = probe_config()
        config.optim.sweep = ()
        config.model.update(mlp_ratio=width_of_mlp, scan_unroll=config.model.depth)
        task, _, step = compiled(config, mesh_of(1, 1, 1))
        return step.cost_analysis()["flops"], task

    (small, task), (large, other) = work(2.0), work(8.0)
    forward = 32 * (other.flops_per_example - task.flops_per_example)
    assert task.flops_multiplier == 1
    assert 0.95 * forward < large - small < 2 * forward


@pytest.mark.parametrize(
    ("features", "changes"), [("random", {}), ("pixels", {}), ("pixels", ATTENTIVE)], ids=str
)
def test_what_learned_nothing_can_be_probed_too(features, changes):
    config = probe_config(features=features, init_from="", **changes)
    config.optim.sweep = ()
    before, after, scalars = updates(config, mesh_of(1, 1, 1), steps=2)
    assert np.isfinite(scalars["loss"])
    assert ("encoder" in after.extra) == (features == "random")
    assert all(np.abs(a - b).max() > 0 for a, b in zip(heads(before), heads(after), strict=True))


def test_average_pooling_norms_the_pooled_tokens_by_a_norm_that_is_never_trained():
    pooled = tasks.build(probe_config(**{"probe.pool": "global_pool"}))
    cls = tasks.build(probe_config())
    params, extra = jax.jit(pooled.init)(jax.random.key(0))
    moved = {"scale": jnp.full(32, 3.0), "bias": jnp.full(32, 1.0)}
    other = extra | {"encoder": extra["encoder"] | {"norm": moved}}
    batch = batch_of(probe_config())
    for task, changes in ((pooled, False), (cls, True)):
        logits = jax.jit(task.predict()["logits"])
        difference = np.abs(logits(params, extra, batch) - logits(params, other, batch)).max()
        assert (difference > 1e-3) == changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": ""}, "init=WORKDIR"),
        ({"features": "radom"}, "nearest: random"),
        ({"features": "random"}, "not used with features='random'"),
        ({"probe.bn_group": 12}, "divide the 32 images of a pass"),
        ({"probe.bn_group": 1}, "at least 2"),
        ({"probe.head": "attentiv"}, "nearest: attentive"),
        ({"probe.pool": "max"}, "config.probe.pool='max'"),
        (ATTENTIVE | {"probe.attention_heads": 5}, "must divide the width, 32"),
        ({"optim.sweep": (0.1, 0.0)}, "config.optim.sweep=.0.1, 0.0.: give numbers, each above 0"),
        ({"optim.name": "sgd"}, "config.optim.name='sgd'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(probe_config(**changes))


def test_images_without_labels_cannot_be_probed(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="has no labels"):
        tasks.build(probe_config(**{"data.source": f"folder:{tmp_path}"}))


# --- the evaluator ---


def known_logits(params, extra, batch):
    """Three heads: the first reads a pixel, the second always says 7, the third is NaN."""
    pixel_B = batch["image"][:, 0, 0, 0].astype(jnp.int32)
    ten_Y = jnp.arange(10)
    first = jax.nn.one_hot(pixel_B % 10, 10)
    second = jnp.broadcast_to(jax.nn.one_hot(7, 10) + 0.01 * ten_Y, first.shape)
    return jnp.stack([first, second, first * jnp.nan], 1)


def evaluate(config, shape=(1, 1, 1)):
    evaluator = Evaluator(config.evals.probe, config, {"logits": known_logits}, mesh_of(*shape))
    return evaluator.run(SimpleNamespace(params={}, extra={})).scalars


def test_accuracies_of_each_head_are_those_counted_by_hand():
    config = probe_config()
    config.evals.probe.split = "test[:100]"
    found = evaluate(config)
    source = labels.open_labelled("bundled:digits", "test[:100]", "")
    (batch,) = eval_pipeline.eval_batches(source, batch_size=100, image_size=(32, 32), channels=1)
    label, guess = batch["label"], batch["image"][:, 0, 0, 0] % 10
    assert found["eval/top1"] == pytest.approx(100 * (guess == label).mean())
    # All the others are equal: of them the first four win.
    others = np.array([[y for y in range(10) if y != g][:4] for g in guess])
    top5 = (guess == label) | (others == label[:, None]).any(1)
    assert found["eval/top5"] == pytest.approx(100 * top5.mean())
    assert found["eval/images"] == 100
    assert found["eval/best_blr"] in (0.1, 0.02)  # never the head that is not a number
    assert found["eval/select_top1_blr0.5"] == 0
    loss = np.log(np.exp(1) + 9) - (guess == label)
    assert found["eval/loss"] == pytest.approx(loss.mean(), rel=1e-6)


def test_among_few_classes_there_is_no_top5(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("L", (8, 8), i).save(tmp_path / name / f"{i}.png")
    config = probe_config(
        **{"data.source": f"folder:{tmp_path}", "data.split": "train[:50%]"},
        **{"evals.probe.split": "train[70%:]", "evals.probe.select_split": "train[50%:70%]"},
    )
    found = evaluate(config)
    assert {"eval/top1", "eval/best_top1"} <= found.keys()
    assert not any("top5" in name for name in found)


def test_the_best_rate_is_chosen_on_training_images_and_not_on_those_measured():
    config = probe_config()
    fives = [f"test[{i}:{i + 1}]" for i in range(40)]
    digits = [labels.open_labelled("bundled:digits", x, "")[0]["label"] for x in fives]
    config.evals.probe.split = fives[digits.index(7)]
    found = evaluate(config)
    select = {rate: found[f"eval/select_top1_blr{rate:g}"] for rate in (0.1, 0.02, 0.5)}
    assert found["eval/best_blr"] == max(select, key=select.get)
    assert found["eval/best_top1"] == (
        100 if found["eval/best_blr"] == 0.02 else found["eval/top1"]
    )


@pytest.mark.parametrize("shape", [(2, 1, 1), (8, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("batch_size", [7, 64])
def test_metrics_are_the_same_on_any_mesh_and_for_any_batch_size(shape, batch_size):
    config = probe_config()
    config.evals.probe.split = "test[:50]"
    expected = evaluate(config)
    config.evals.probe.batch_size = batch_size
    assert evaluate(config, shape) == pytest.approx(expected, rel=1e-12)


def test_a_variant_beside_a_run_keeps_what_the_run_says_of_its_images(tmp_path):
    config = tiny_config()
    config.model.image_size, config.model.mlp_ratio = (40, 48), 3.0
    provenance.prepare_workdir(tmp_path, config)
    for recipe in (get_config, finetune_config, knn_config):
        found = recipe(f"init={tmp_path},variant=L/8")
        assert (found.model.width, found.model.patch_size) == (1024, (8, 8))
        assert (found.model.image_size, found.model.channels) == ((40, 48), 1)
        assert (found.model.mlp_ratio, found.data.mean, found.data.std) == (3.0, (0.5,), (0.5,))
    assert finetune_config(f"init={tmp_path},image_size=32").model.image_size == (32, 32)


@pytest.mark.parametrize(
    ("select_split", "words"),
    [
        ("", "is chosen on what. train on some images"),
        ("test", "split='test.*' and select_split='test' have .* images in common"),
        ("train[:80%]", "data.split='train.:80%.' and select_split='train.:80%.' have"),
        ("train[79%:]", "data.split='train.:80%.' and select_split='train.79%:.' have"),
    ],
)
def test_a_sweep_that_would_be_chosen_on_the_wrong_images_is_refused(select_split, words):
    config = probe_config()
    config.evals.probe.select_split = select_split
    with pytest.raises(ValueError, match=words):
        evaluate(config)


def test_a_probe_is_not_measured_on_what_it_was_trained_on():
    config = probe_config()
    config.evals.probe.split = "train[70%:90%]"
    with pytest.raises(ValueError, match="data.split='train.:80%.' and split='train.70%:90%.'"):
        evaluate(config)


# --- a whole run ---


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir of a run of no updates, and its encoder."""
    config = tiny_config()
    task = tasks.build(config)
    state = jax.jit(lambda: train.init_state(task, task.optimizer(10, 10)[0], 0))()
    workdir = save_workdir(config, tmp_path_factory.mktemp("pretrained"), state)
    return workdir, jax.device_get(state.params["encoder"])


def assert_encoder_is(state, expected):
    """Array by array, and with its positions, which were fixed and not saved."""
    found = jax.device_get(state.extra["encoder"])
    positions = found.pop("pos_embed")[0]
    side = math.isqrt(len(positions) - 1)
    np.testing.assert_array_equal(positions, sincos_2d(positions.shape[-1], (side, side)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_probe_starts_from_a_run_and_reports_both_rates(pretrained, tmp_path):
    config = probe_of(pretrained[0])
    assert (config.model.width, config.model.patch_size, config.data.mean) == (32, (8, 8), (0.5,))
    state = run(config, tmp_path / "probe", (1, 1, 1))
    assert_encoder_is(state, pretrained[1])
    last = writer.read(tmp_path / "probe" / "metrics.jsonl")[-1]
    assert last["step"] == int(state.step) == 1150 // 64
    assert {"eval/top1", "eval/best_top1", "eval/best_blr", "eval/select_top1_blr0.3"} <= set(last)
    # Run again it is finished, and needs the pre-training no longer.
    again = run(config, tmp_path / "probe", (2, 2, 1))
    np.testing.assert_array_equal(heads(jax.device_get(again))[0], heads(jax.device_get(state))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 64}, r"params/encoder/\S+: float32\[.*32.*\] in the .*64.*\] by this"),
        ({"model.depth": 3}, r"stack/blocks/\S+: float32\[2, .* in the .*\[3, "),
    ],
    ids=str,
)
def test_an_encoder_that_does_not_fit_is_refused_with_both_shapes(pretrained, changes, message):
    task = tasks.build(probe_of(pretrained[0], **changes))
    extra = jax.jit(task.init)(jax.random.key(0))[1]
    with pytest.raises(ValueError, match=message):
        task.load(checkpoint.find(pretrained[0], "init_from"), SimpleNamespace(extra=extra))


def test_a_mask_token_is_left_out_and_a_missing_norm_is_said(pretrained, tmp_path):
    task = tasks.build(probe_of(pretrained[0]))
    extra = jax.jit(task.init)(jax.random.key(0))[1]

    def loaded(name, encoder):
        saver = checkpoint.Checkpointer(tmp_path / name)
        saver.save(0, {"params": {"encoder": encoder}})
        saver.close()
        path = checkpoint.find(tmp_path / name, "init_from")
        state = train.TrainState(step=0, params={}, opt_state={}, extra=extra)
        return task.load(path, state)

    token = {"mask_token": np.zeros((1, 1, 32), np.float32)}
    assert_encoder_is(loaded("tokens", pretrained[1] | token), pretrained[1])
    averaging = {name: x for name, x in pretrained[1].items() if name != "norm"}
    with pytest.raises(ValueError, match="its encoder has no final norm, which this task reads"):
        loaded("classifier", averaging)


def test_a_path_that_is_no_checkpoint_is_refused(pretrained, tmp_path):
    config = probe_of(pretrained[0], init_from=str(tmp_path))
    with pytest.raises(ValueError, match=f"config.init_from='{tmp_path}' holds no checkpoint"):
        run(config, tmp_path / "probe", (1, 1, 1))


def test_a_run_without_updates_measures_a_checkpoint(pretrained, tmp_path):
    config = knn_config(f"init={pretrained[0]},source=bundled:digits,bank=train[:200],test=test")
    config.batch_size = config.probe.bn_group = 64
    config.evals.fewshot.update(shots=(2,), draws=2)
    workdir = tmp_path / "knn"
    state = run(config, workdir, (1, 1, 1))
    assert_encoder_is(state, pretrained[1])
    measured = {name for line in writer.read(workdir / "metrics.jsonl") for name in line}
    names = {"eval/knn1_cls", "eval/knn20_cls", "eval/fewshot2_cls", "eval/fewshot2_cls_std"}
    assert names <= measured
    told = "\n".join(summary.lines(str(workdir), False))
    assert re.search(r"eval/knn20_cls +\d+\.\d\d %", told)
    assert re.search(r"eval/fewshot2_cls_std +\d+\.\d\d %", told)


def test_a_run_without_updates_takes_any_number_of_devices(tmp_path):
    """Three do not divide config.batch_size, of which no batch is read."""
    config = knn_config("source=bundled:digits,bank=train[:200],test=test[:50]")
    config.features = "pixels"
    config.model.update(image_size=(16, 16), patch_size=(16, 16))
    del config.evals.fewshot
    run(config, tmp_path, (3, 1, 1))
    lines = writer.read(tmp_path / "metrics.jsonl")
    found = {name: value for line in lines for name, value in line.items()}
    assert min(found["eval/knn1_cls"], found["eval/logistic_cls"]) > 50


def test_the_published_setting_is_the_one_of_the_reference():
    """REFERENCE section 4, letter by letter."""
    config = get_config("init=x,select=0")
    assert optim.peak_lr(config.optim.blr, config.batch_size) == pytest.approx(6.4)
    assert config.train_for == "90 epochs"
    assert config.probe.to_dict() | {"attention_heads": 0} == {
        "head": "linear", "pool": "cls", "bn_group": 512, "attention_heads": 0
    }  # fmt: skip
    o = config.optim
    assert (o.name, o.momentum, o.weight_decay) == ("lars", 0.9, 0.0)
    assert (o.warmup, o.min_lr, o.sweep) == ("10 epochs", 0.0, ())
    assert (config.data.split, config.evals.probe.split) == ("train", "validation")
    assert pipeline.steps_per_epoch(1_281_167, config.batch_size) == 78


# --- beside pre-training ---


def test_an_online_probe_learns_and_leaves_the_gradients_of_the_model_alone():
    found = {}
    for online in (False, True):
        config = tiny_config(online_probe=online)
        task = tasks.build(config)
        params, extra = jax.jit(task.init)(jax.random.key(0))
        batch = batch_of(config)
        batch = task.prepare(batch, lambda name: jax.random.key(3))
        gradient = jax.jit(
            jax.value_and_grad(
                lambda p, t=task, b=batch, e=extra: t.loss(p, e, b, None, True), has_aux=True
            )
        )
        (loss, (_, scalars)), grads = gradient(params)
        found[online] = scalars.get("loss", loss), grads
    head = found[True][1].pop("online")
    assert found[False][0] == found[True][0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
        found[True][1], found[False][1],
    )  # fmt: skip
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(head))
    logits = jax.jit(task.predict()["logits"])(params, extra, batch)
    assert logits.shape == (config.batch_size, 10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_online_probe_does_not_shorten_the_gradient_of_a_model_that_is_clipped(name):
    ends = []
    for online in (False, True):
        config = tiny_config(online_probe=online)
        config.optim.update(name=name, clip_norm=0.1)
        ends.append(all_updates(config, mesh_of(1, 1, 1), 2)[0][-1].params)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(ends[1].pop("online")))
    assert_trees_equal(*ends, rtol=1e-5, atol=1e-7)


class OfMore(pretrain.Task):
    """A fork's task whose loss has a term of its own, and a metric."""

    def loss(self, params, extra, batch, rng, train):
        error, (extra, metrics) = super().loss(params, extra, batch, rng, train)
        return error + 1000, (extra, metrics | {"mine": 7.0})


def test_an_online_probe_keeps_the_loss_and_the_metrics_of_a_fork():
    config = tiny_config(task="test_probe.OfMore", online_probe=True)
    task = tasks.build(config)
    params, extra = jax.jit(task.init)(jax.random.key(0))
    batch = task.prepare(batch_of(config), lambda name: jax.random.key(3))
    loss, (_, metrics) = jax.jit(lambda p: task.loss(p, extra, batch, None, True))(params)
    assert metrics["mine"] == 7 and metrics["loss"] > 1000
    assert float(loss) == pytest.approx(float(metrics["loss"] + metrics["online_loss"]), rel=1e-5)


def test_an_online_probe_is_measured_beside_the_reconstruction_under_another_name(tmp_path):
    config = tiny_config(online_probe=True)
    config.evals.reconstruct.update(split="test[:16]", every="", images=16, batch_size=16)
    config.evals.accuracy = dict(
        type="accuracy", every="", source="", split="test[:40]", batch_size=16
    )
    task, mesh = tasks.build(config), mesh_of(1, 1, 1)
    with pytest.raises(
        ValueError, match="both report eval/images and eval/loss.*evals.accuracy.prefix='eval_acc"
    ):
        evals.build(config, task.predict(), mesh)
    config.train_for, config.evals.accuracy.prefix = "1 steps", "eval_accuracy"
    run(config, tmp_path, (1, 1, 1))
    told = "\n".join(summary.lines(str(tmp_path), False))
    assert re.search(r"eval_accuracy/top1 +\S+ %", told)
    assert re.search(r"eval_accuracy/images +40\n", told)
    assert "error of hidden pixels on 16 held-out images" in told


def test_an_online_probe_is_refused_beside_another_task_than_pre_training():
    config = tiny_finetune_config("scratch=true")
    config.online_probe = True
    with pytest.raises(ValueError, match="online_probe=True: task 'classify' is no pre-training"):
        tasks.build(config)


def test_an_online_probe_needs_labels(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "loose.png")
    config = tiny_config(online_probe=True)
    config.data.source = f"folder:{tmp_path}"
    with pytest.raises(ValueError, match="has no labels"):
        tasks.build(config)
