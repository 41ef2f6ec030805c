"""The linear segmentation head: its updates, its sliding windows, its runs."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segments import CLASSES, small, write_folder, write_pairs
from sklearn.metrics import jaccard_score
from tiny import assert_trees_equal, fresh_state, mesh_of, run, task_on, tiny_config

from mae_jax import evals, optim, optimizers, sharding, tasks, train
from mae_jax.configs import segment as recipe
from mae_jax.data import segmentation
from mae_jax.data.label_maps import IGNORED
from mae_jax.errors import UserError
from mae_jax.evals import segment
from mae_jax.models import segmenter
from mae_jax.models.patchify import normalize, patchify
from mae_jax.models.vit import Encoder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pairs"), train=16, test=5)


def config_of(root, arg="", **changes):
    arg = f"test=test,variant=B/16,recipe=short,batch_size=8,{arg}"
    config = small(recipe.get_config(arg), root)
    config.head.layers = "last"
    config.data.workers = 0
    config.train_for, config.optim.warmup, config.log_every = "6 steps", "1 steps", "1 steps"
    config.checkpoint.every = config.evals.segment.every = "3 steps"
    config.update_from_flattened_dict(changes)
    return config


def batch_of(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    label_map = rng.integers(0, 3, (rows, 24, 32)).astype(np.uint8)
    label_map[rng.random(label_map.shape) < 0.3] = IGNORED
    image = rng.integers(0, 256, (rows, 24, 32, 1)).astype(np.uint8)
    return {"image": image, "map": label_map}


def no_rng(name):
    return jax.random.key(0)


# --- the head ---


def test_the_loss_is_the_mean_cross_entropy_over_labelled_pixels():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(2, 4, 5, 3)), rng.integers(0, 3, (2, 4, 5))
    label[0, :2] = IGNORED
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = [-np.log(p[i][label[i]]) for i in np.ndindex(2, 4, 5) if label[i] != IGNORED]
    found = segmenter.cross_entropy(jnp.asarray(logits), jnp.asarray(label))
    assert found == pytest.approx(np.mean(wanted), rel=1e-5)


def test_a_batch_without_a_label_has_no_loss_and_no_gradient():
    none = jnp.full((2, 4, 5), IGNORED, jnp.uint8)
    value, grad = jax.value_and_grad(segmenter.cross_entropy)(jnp.ones((2, 4, 5, 3)), none)
    assert value == 0 and not np.asarray(grad).any()


def test_a_frozen_update_is_batch_norm_a_matrix_and_adamw(root):
    """Three whole updates, written out in NumPy for the head, on the encoder's own tokens."""
    config = config_of(root, **{"optim.warmup": "0 steps", "optim.power": 2.0, "optim.blr": 1.0})
    task = task_on(config, mesh_of(1, 1, 1))
    tx, _ = task.optimizer(10, 2)
    state = jax.jit(partial(train.init_state, task, tx, 0))()
    update = jax.jit(partial(train.update, task=task, tx=tx, seed=0))
    kernel = np.asarray(state.params["head"]["kernel"], np.float64)
    bias, mean, var = np.zeros(3), np.zeros(32), np.ones(32)
    moments = {name: [np.zeros_like(x)] * 2 for name, x in (("w", kernel), ("b", bias))}
    encode = jax.jit(Encoder(task.spec, task.encoder.compute).apply)
    row, column = (segment.linear(n, 8 * n) for n in (3, 4))
    for step in range(3):
        batch = batch_of(step)
        patches = patchify(normalize(jnp.asarray(batch["image"]), task.spec), (8, 8))
        tokens = encode({"params": state.extra["encoder"]}, patches)[:, 1:]
        x = np.asarray(tokens, np.float64).reshape(-1, 32)
        norm = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0) * len(x) / (len(x) - 1)
        logits = (norm @ kernel + bias).reshape(8, 3, 4, 3)
        wide = np.einsum("hi,wj,bijy->bhwy", row, column, logits)
        p = np.exp(wide - wide.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        kept = batch["map"] != IGNORED
        grad = np.where(kept[..., None], p - np.eye(3)[np.where(kept, batch["map"], 0)], 0)
        grad = np.einsum("hi,wj,bhwy->bijy", row, column, grad / kept.sum()).reshape(-1, 3)
        loss = -np.log(np.take_along_axis(p, np.where(kept, batch["map"], 0)[..., None], -1))
        state, metrics = update(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss[..., 0][kept].mean(), rtol=1e-5)
        rate = 8 / 256 * (1 - step / 10) ** 2
        new = {}
        for name, g, w in (("w", norm.T @ grad, kernel), ("b", grad.sum(0), bias)):
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            moments[name] = [m, v]
            change = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
            new[name] = w - rate * change - (rate * 1e-4 * w if name == "w" else 0)
        kernel, bias = new["w"], new["b"]
    np.testing.assert_allclose(state.params["head"]["kernel"], kernel, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(state.params["head"]["bias"], bias, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(state.extra["batch_norm"].mean, mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.extra["batch_norm"].var, var, rtol=1e-3)


def test_a_frozen_encoder_stays_and_fine_tuning_moves_every_parameter(root):
    for finetune in (False, True):
        config = config_of(root, f"finetune={finetune}", **{"optim.warmup": "0 steps"})
        task = task_on(config, mesh_of(1, 1, 1))
        tx, _ = task.optimizer(10, 2)
        state = jax.jit(partial(train.init_state, task, tx, 0))()
        new, _ = jax.jit(partial(train.update, task=task, tx=tx, seed=0))(state, batch_of())
        moved = [
            bool((np.asarray(x) != np.asarray(y)).any())
            for x, y in zip(*map(jax.tree.leaves, (state.params, new.params)), strict=True)
        ]
        assert all(moved)
        assert ("encoder" in state.params) == finetune
        if not finetune:
            assert_trees_equal(state.extra["encoder"], new.extra["encoder"])


def test_fine_tuning_slows_from_block_to_block_and_drops_paths_in_training_only(root):
    config = config_of(root, "finetune=true", **{"model.drop_path": 0.9})
    task = task_on(config, mesh_of(1, 1, 1))
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    scales = task.scales(params)
    assert scales["head"]["kernel"] == 1 and scales["encoder"]["pos_embed"] == 0.65**3
    np.testing.assert_allclose(
        scales["encoder"]["stack"]["blocks"]["mlp"]["fc1"]["bias"].ravel(), [0.65**2, 0.65]
    )
    params, extra = jax.jit(task.init)(jax.random.key(0))

    def loss(key, training):
        def rng(name):
            return jax.random.key(key)

        return float(task.loss(params, extra, batch_of(), rng, training)[0])

    assert loss(0, True) != loss(1, True)
    assert loss(0, False) == loss(1, False)


def test_several_blocks_are_joined(root):
    config = config_of(root, **{"head.layers": "1,2"})
    task = task_on(config, mesh_of(1, 1, 1))
    params, extra = jax.jit(task.init)(jax.random.key(0))
    assert params["head"]["kernel"].shape == (64, 3)
    both = task.represent(params, extra, batch_of(), None)
    for i, block in enumerate((1, 2)):
        one = task.patch_features(params, extra, batch_of(), block)
        np.testing.assert_allclose(both[..., 32 * i : 32 * i + 32], one, atol=1e-5)


def test_the_polynomial_rate_rises_and_falls():
    schedule = optimizers.poly_schedule(1.0, 110, 10, 2.0, 0.1)
    wanted = {0: 0, 5: 0.5, 10: 1, 60: 0.1 + 0.9 * 0.25, 110: 0.1}
    assert {step: pytest.approx(float(schedule(step))) for step in wanted} == wanted


# --- sliding windows ---


@pytest.mark.parametrize(("old", "new"), [(3, 24), (7, 10), (1, 5), (9, 9)])
def test_the_matrix_is_jaxs_bilinear_enlargement(old, new):
    x = np.random.default_rng(0).normal(size=(old, 2)).astype(np.float32)
    wanted = jax.image.resize(x, (new, 2), "bilinear")
    np.testing.assert_allclose(segment.linear(old, new) @ x, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("original", "resized", "window", "stride"),
    [(40, 32, 32, 0.5), (100, 80, 32, 2 / 3), (50, 33, 32, 1.0), (64, 64, 16, 0.25)],
)
def test_windows_cover_an_axis_and_their_weights_add_up_to_one(original, resized, window, stride):
    axis = segment.make_axis(original, resized, window, window // 8, stride)
    assert axis.starts[0] == 0 and axis.starts[-1] == resized - window
    assert max(np.diff(axis.starts), default=0) <= window * stride
    np.testing.assert_allclose(axis.spread.sum((0, 2)), 1, atol=1e-5)


def test_deciding_by_matrices_is_averaging_enlarged_windows_pixel_by_pixel():
    rng = np.random.default_rng(0)
    rows, columns = segment.make_axis(50, 40, 32, 4, 0.5), segment.make_axis(77, 62, 32, 4, 0.5)
    logits = rng.normal(size=(len(rows.starts), len(columns.starts), 4, 4, 5)).astype(np.float32)
    total, count = np.zeros((40, 62, 5)), np.zeros((40, 62, 1))
    for i, top in enumerate(rows.starts):
        for j, left in enumerate(columns.starts):
            window = jax.image.resize(logits[i, j], (32, 32, 5), "bilinear")
            total[top : top + 32, left : left + 32] += window
            count[top : top + 32, left : left + 32] += 1
    whole = jax.image.resize(jnp.asarray(total / count), (50, 77, 5), "bilinear")
    found = segment.decide(logits, rows, columns)
    assert found.dtype == np.uint8 and (found == whole.argmax(-1)).mean() > 0.999
    small_pieces, segment.AT_A_TIME = segment.AT_A_TIME, 77 * 5 * 7
    try:
        np.testing.assert_array_equal(segment.decide(logits, rows, columns), found)
    finally:
        segment.AT_A_TIME = small_pieces


def test_counts_beyond_32_bits_add_up_exactly():
    counts = np.array([[2**40 + 3, 5], [2**31, 2**31 - 1]])
    np.testing.assert_array_equal(segment.add_up(counts), counts)


@pytest.fixture(scope="module")
def uneven(root, tmp_path_factory):
    """Images of three sizes, two of which need several windows."""
    place = tmp_path_factory.mktemp("uneven")
    for number, size in enumerate([(24, 32), (24, 96), (80, 40)]):
        write_pairs(place / str(number), "test", 2, size=size, seed=number)
        for folder in ("images", "labels"):
            (place / "test" / folder).mkdir(parents=True, exist_ok=True)
            for file in (place / str(number) / "test" / folder).iterdir():
                file.rename(place / "test" / folder / f"{number}{file.name}")
    (place / "classes.txt").write_text("\n".join(CLASSES))
    return place


def evaluate(config, state, shape=(1, 1, 1)):
    mesh = mesh_of(*shape)
    return evals.build(config, task_on(config, mesh).predict(), mesh)["segment"].run(state)


def test_an_image_of_one_window_has_the_classes_of_its_enlarged_logits(root):
    config = config_of(root)
    state = jax.device_get(fresh_state(config, mesh_of(1, 1, 1))[1])
    task = task_on(config, mesh_of(1, 1, 1))
    source = segmentation.open_pairs(config.data, f"segfolder:{root}", "test")
    pairs = [segmentation.read(source, i, 1, np.uint8) for i in range(5)]
    batch = {"image": np.stack([pair.image for pair in pairs])}
    logits = task.predict()["segmentation"](state.params, state.extra, batch)
    predicted = jax.image.resize(logits, (5, 24, 32, 3), "bilinear").argmax(-1)
    truth = np.stack([pair.map for pair in pairs])
    kept, scalars = truth != IGNORED, evaluate(config, state).scalars
    wanted = jaccard_score(truth[kept], np.asarray(predicted)[kept], average="macro")
    assert scalars["eval/miou"] == pytest.approx(100 * wanted, abs=0.1)
    assert scalars["eval/images"] == 5


def test_images_of_any_size_count_in_full_on_any_mesh(root, uneven):
    config = config_of(root, **{"evals.segment.source": f"segfolder:{uneven}"})
    state = jax.device_get(fresh_state(config, mesh_of(1, 1, 1))[1])
    one, many = evaluate(config, state), evaluate(config, state, (8, 1, 1))
    assert one.scalars["eval/images"] == 6
    for key, number in one.scalars.items():
        assert many.scalars[key] == pytest.approx(number, abs=0.05)
    results = json.loads(one.files["results.json"]({"step": 0}))
    maps = [
        segmentation.open_pairs(config.data, f"segfolder:{uneven}", "test")[i] for i in range(6)
    ]
    assert results["pixels"] == sum((record["map"] != IGNORED).sum() for record in maps)


# --- runs ---


def test_a_run_learns_resumes_and_writes_tables_and_pictures(root, tmp_path):
    config = config_of(root, **{"train_for": "60 steps", "optim.blr": 0.5, "data.distort": False})
    config.checkpoint.every = config.evals.segment.every = "30 steps"
    whole = run(config, tmp_path / "whole", (1, 1, 1))
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert results["label_resolution"] == "that of each label map" and results["images"] == 5
    assert results["settings"][0]["miou"] > 60
    assert (tmp_path / "whole/results.png").stat().st_size > 1000
    assert [x.name for x in (tmp_path / "whole/images").rglob("*segment*.png")]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/60")
    again = run(config, tmp_path / "again", (1, 1, 1))
    assert_trees_equal(jax.device_get(whole.params), jax.device_get(again.params))


@pytest.mark.parametrize("finetune", [False, True])
def test_updates_are_the_same_on_any_mesh(root, finetune):
    states = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        config = config_of(root, f"finetune={finetune}")
        mesh = mesh_of(*shape)
        task = task_on(config, mesh)
        tx, _ = task.optimizer(10, 2)
        shapes, init = train.lay_out(task, tx, 0, mesh)
        sizes = dict(batch_size=8, seed=0, grad_accum=1)
        step, state = train.compile_step(task, tx, mesh, shapes, **sizes), init()
        for i in range(3):
            state, metrics = step(state, sharding.put_batch(mesh, batch_of(i), 8))
        states.append((jax.device_get(state.extra["batch_norm"]), float(metrics["loss"])))
    for stats, loss in states[1:]:
        assert loss == pytest.approx(states[0][1], rel=1e-4)
        assert_trees_equal(stats, states[0][0], rtol=1e-3, atol=1e-5)


def test_it_starts_from_a_pre_trained_encoder_of_another_image_size(root, tmp_path):
    pretrained = tiny_config()
    pretrained.train_for = "1 steps"
    pretrained.evals = {}
    run(pretrained, tmp_path / "pretrained", (1, 1, 1))
    for arg in ("", "finetune=true"):
        config = config_of(root, arg, train_for="2 steps", features="pretrained")
        config.init_from = str(tmp_path / "pretrained")
        config.evals = {}
        state = run(config, tmp_path / f"run{arg}", (1, 1, 1))
        encoder = (state.extra | state.params)["encoder"]
        assert encoder["pos_embed"].shape == (1, 13, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "pixel"}, "features='pixel'.*pixels"),
        ({"features": "pretrained"}, "which encoder is measured"),
        ({"init_from": "x"}, "not used with features='random'"),
        ({"features": "pixels", "frozen": False}, "pixels have no encoder"),
        ({"head.layers": "3"}, "head.layers='3': .*from 1 to 2"),
        ({"head.layers": "1,1"}, "head.layers='1,1': .*different blocks"),
        ({"data.scales": (2.0, 0.5)}, "data.scales"),
        ({"data.value_range": (0, 10)}, "data.distort=True"),
        ({"optim.blr": 0.0}, "optim.blr=0.0"),
        ({"data.source": "bundled:digits"}, "has no label maps"),
        ({"optim.schedule": "wsd"}, "optim.schedule='wsd': task 'segment' does not read it"),
        ({"data.repeat": 4}, "data.repeat=4: task 'segment' does not read it"),
        ({"data.augment": "jitter-b0.4"}, "data.augment='jitter-b0.4': task 'segment' does not"),
        ({"optim.name": "adam"}, "optim.name='adam'; nearest: adamw"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(root, changes, message):
    with pytest.raises(UserError, match=message):
        tasks.build(config_of(root, **changes)).optimizer(10, 10)


@pytest.mark.parametrize("changes", [{"clip_norm": 1e-6}, {"name": "muon"}], ids=str)
def test_the_optimizer_of_fine_tuning_is_the_one_that_is_asked_for(root, changes):
    moved = []
    for change in ({}, changes):
        config = config_of(root, "finetune=true", **{"optim.warmup": "0 steps"})
        config.optim.update(change, blr=0.1)
        task = task_on(config, mesh_of(1, 1, 1))
        tx, _ = task.optimizer(10, 2)
        state = jax.jit(partial(train.init_state, task, tx, 0))()
        new, _ = jax.jit(partial(train.update, task=task, tx=tx, seed=0))(state, batch_of())
        moved.append(np.asarray(new.params["encoder"]["stack"]["blocks"]["mlp"]["fc1"]["kernel"]))
    assert np.abs(moved[0] - moved[1]).max() > 1e-4


def test_images_that_are_trained_on_are_not_measured_unless_it_is_meant(root):
    config = config_of(root, **{"evals.segment.split": "train[:3]"})
    state = jax.device_get(fresh_state(config, mesh_of(1, 1, 1))[1])
    with pytest.raises(UserError, match="3 images in common: .*trained on"):
        evaluate(config, state)
    config.evals.segment = {**config.evals.segment, "of_training_images": True}
    assert evaluate(config, state).scalars["eval/images"] == 3


def test_a_run_can_be_planned_by_counts_alone(root):
    config = config_of(root, **{"data.source": "counted:2000:0", "data.classes": 150})
    task = tasks.build(config)
    assert len(task.examples) == 2000 and task.examples.classes == 150
    assert task.flops_per_example > 2 * 12 * 32 * 150
    config.data.classes = 0
    with pytest.raises(UserError, match="classes=0: how many"):
        tasks.build(config)


def test_recipes_differ_as_they_say():
    long, short = recipe.get_config("variant=B/16"), recipe.get_config("variant=B/16,recipe=short")
    assert long.train_for == "40000 steps" and long.model.image_size == (512, 512)
    assert optim.peak_lr(long.optim.blr, long.batch_size) == pytest.approx(1e-3)
    assert short.train_for == "60 epochs" and short.model.image_size == (224, 224)
    four = recipe.get_config("variant=L/16,layers=4").head.layers
    assert four == "21,22,23,24"
    with pytest.raises(ValueError, match="recipe='fast': write dinov2 or short"):
        recipe.get_config("recipe=fast")
