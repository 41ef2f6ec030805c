"""examples/latent: a teacher gives the target, in a folder outside the package."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import DIGITS, ROOT, config_of, left_no_modules, module_of, run
from tiny import assert_trees_equal, batch_of, mesh_of

import mae_jax
from mae_jax import tasks
from mae_jax import train as loop
from mae_jax.commands import running
from mae_jax.errors import UserError

SMALL = DIGITS | {"model.patch_size": (8, 8), "model.depth": 2, "teacher.blocks": 2}


@pytest.fixture(autouse=True, scope="module")
def no_modules_left():
    with left_no_modules():
        yield


def config(**keys):
    return config_of("latent", **(SMALL | keys))


@pytest.fixture(scope="module")
def setting(no_modules_left):
    """A task, parameters, a teacher with others, and a batch with its masks."""
    task = tasks.build(config())
    init = jax.jit(task.init)
    params, _ = init(jax.random.key(0))
    teacher = {"encoder": init(jax.random.key(1))[0]["encoder"]}
    rng = partial(loop.stream, 0, step=0)
    batch = task.prepare({"image": batch_of(config())["image"]}, rng)
    return task, params, {"ema": teacher}, batch, rng


@pytest.fixture(scope="module")
def reconstruct(setting):
    return jax.jit(setting[0].reconstruct)


def biggest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_a_teacher_starts_as_the_encoder():
    params, extra = jax.jit(tasks.build(config()).init)(jax.random.key(0))
    assert_trees_equal(extra, {"ema": {"encoder": params["encoder"]}})


def test_no_gradient_reaches_the_teacher(setting):
    task, params, extra, batch, rng = setting

    @jax.jit
    def error(params, extra):
        return task.loss(params, extra, batch, rng, True)[0]

    of_student, of_teacher = jax.jit(jax.grad(error, argnums=(0, 1)))(params, extra)
    assert biggest(of_teacher) == 0
    assert biggest(of_student["encoder"]["patch_embed"]) > 0
    # And the teacher does decide the loss.
    assert error(params, extra) != error(params, {"ema": {"encoder": params["encoder"]}})


def test_the_student_sees_no_hidden_pixel_and_the_teacher_sees_all(setting, reconstruct):
    _, params, extra, batch, _ = setting
    out = reconstruct(params, extra, batch)
    image, hidden = np.array(batch["image"]), np.asarray(out["mask_BL"][0]).reshape(4, 4) > 0
    row, col = np.argwhere(hidden)[0]
    image[0, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8] ^= 255
    other = reconstruct(params, extra, batch | {"image": image})
    for name in ("latent_BND", "pred_BLT"):
        np.testing.assert_array_equal(out[name], other[name])
    changed = np.abs(out["target_BLT"] - other["target_BLT"]).max((1, 2))
    assert changed[0] > 1e-3 and not changed[1:].any()


def test_the_target_of_each_patch_is_standardised_and_of_the_last_blocks(setting, reconstruct):
    _, params, extra, batch, _ = setting
    target_BLT = reconstruct(params, extra, batch)["target_BLT"]
    assert target_BLT.shape == (16, 16, 16)  # images, patches, width
    np.testing.assert_allclose(target_BLT.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(target_BLT.std(-1), 1, atol=1e-3)
    last = tasks.build(config(**{"teacher.blocks": 1}))
    other_BLT = jax.jit(last.reconstruct)(params, extra, batch)["target_BLT"]
    assert np.abs(other_BLT - target_BLT).max() > 0.1


@pytest.mark.parametrize(("decay", "moved"), [(1.0, 0.0), (0.0, 1.0), (0.75, 0.25)])
def test_the_teacher_moves_by_what_the_decay_leaves(decay, moved):
    task = tasks.build(config(**{"teacher.decay": decay, "teacher.last_decay": decay}))
    params, extra = jax.jit(task.init)(jax.random.key(0))
    shifted = jax.tree.map(lambda x: x + 1, params)
    state = loop.TrainState(jnp.int32(1), shifted, (), extra)
    after = task.after_update(state).extra["ema"]["encoder"]
    expected = jax.tree.map(lambda x: x + moved, params["encoder"])
    assert_trees_equal(after, expected, **({"atol": 1e-6} if moved else {}))


def test_the_decay_grows_to_its_last_value_at_the_end_of_the_run():
    """In two steps from 0 to 1: halfway after the first, and no move after the second."""
    task = tasks.build(config(**{"teacher.decay": 0.0, "teacher.last_decay": 1.0}))
    params, extra = jax.jit(task.init)(jax.random.key(0))
    shifted = jax.tree.map(lambda x: x + 1, params)
    for step, moved in ((1, 0.5), (2, 0.0), (3, 0.0)):
        state = loop.TrainState(jnp.int32(step), shifted, (), extra)
        after = task.after_update(state).extra["ema"]["encoder"]
        expected = jax.tree.map(lambda x, moved=moved: x + moved, params["encoder"])
        assert_trees_equal(after, expected, atol=1e-6)


def test_the_monitor_of_collapse_is_zero_where_all_images_look_the_same(setting):
    task, params, extra, batch, rng = setting
    loss = jax.jit(lambda batch: task.loss(params, extra, batch, rng, True))
    _, (_, metrics) = loss(batch)
    _, (_, collapsed) = loss(batch | {"image": np.zeros_like(batch["image"])})
    assert collapsed["teacher_std"] < 1e-5 < metrics["teacher_std"]


def test_a_run_logs_the_monitor_resumes_to_the_same_bits_and_its_teacher_is_read(tmp_path):
    keys = {"train_for": "4 steps", "checkpoint.every": "2 steps"}
    first = run(config(**keys), tmp_path)
    assert len(first["train/teacher_std"]) == 4 and min(first["train/teacher_std"]) > 0
    teacher, student = (
        mae_jax.load(tmp_path, averaged=averaged)[1]["encoder"] for averaged in (True, False)
    )
    shutil.rmtree(tmp_path / "checkpoints/4")
    again = run(config(**keys), tmp_path)
    assert again["train/loss"] == first["train/loss"]
    assert_trees_equal(mae_jax.load(tmp_path, averaged=True)[1]["encoder"], teacher)
    assert_trees_equal(mae_jax.load(tmp_path)[1]["encoder"], student)
    moved = jax.tree.map(lambda a, b: a - b, teacher, student)
    assert biggest(moved) > 0


def test_evaluators_get_the_features_of_the_teacher(setting):
    task, params, extra, batch, _ = setting
    features = task.predict()["features"](params, extra, batch)["mean"]
    of_params = super(type(task), task).predict()["features"]
    np.testing.assert_array_equal(features, of_params(extra["ema"], {}, batch)["mean"])
    assert np.abs(features - of_params(params, {}, batch)["mean"]).max() > 1e-3


def test_a_mesh_splits_the_teacher_like_the_encoder():
    parts = running.build(config(**{"mesh.fsdp": 8}))
    shapes, _ = loop.lay_out(parts.task, parts.tx, 0, mesh_of(1, 8, 1))
    shardings = [
        jax.tree.map(lambda x: x.sharding, encoder)
        for encoder in (shapes.params["encoder"], shapes.extra["ema"]["encoder"])
    ]
    assert shardings[0] == shardings[1]


def test_decays_and_blocks_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="config.teacher.decay=1.5: give a number from 0 to 1"):
        tasks.build(config(**{"teacher.decay": 1.5}))
    with pytest.raises(UserError, match="config.teacher.blocks=3: the encoder has 2 blocks"):
        tasks.build(config(**{"teacher.blocks": 3}))


def test_the_example_is_short():
    files = (ROOT / "examples/latent").glob("*.py")
    assert sum(len(file.read_text().splitlines()) for file in files) < 200
    assert module_of("latent.teacher").Task
