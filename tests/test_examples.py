"""The forks of docs/forking.md: each is short, shown as it is, and takes two steps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import DIGITS, NAMES, ROOT, config_of, left_no_modules, module_of, run
from tiny import assert_trees_equal, mesh_of, save_workdir

import mae_jax
from mae_jax import tasks
from mae_jax import train as loop
from mae_jax.commands import running
from mae_jax.errors import UserError


@pytest.fixture(autouse=True)
def no_modules_left():
    with left_no_modules():
        yield


SOURCE = "source.arrays.open_arrays:{}/x.npy"


def write_arrays(folder):
    """Write random images as a .npy; return its path."""
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    np.save(folder / "x.npy", images)
    return folder / "x.npy"


def test_the_guide_shows_the_examples_as_they_are_and_each_is_short():
    text = (ROOT / "docs/forking.md").read_text()
    shown = dict(re.findall(r"`(examples/\S+\.py)`:\n\n```python\n(.*?)```\n", text, re.DOTALL))
    for example in NAMES:
        files = sorted((ROOT / "examples" / example).glob("*.py"))
        assert len(files) == 2
        assert sum(len(file.read_text().splitlines()) for file in files) <= 60, example
        for file in files:
            assert shown.pop(file.relative_to(ROOT).as_posix()) == file.read_text()
    assert not shown


@pytest.mark.parametrize("example", NAMES)
def test_an_example_takes_two_steps(example, tmp_path):
    argument, keys = "", DIGITS | {"model.patch_size": (8, 8)}
    if example == "evaluator":
        keys |= {"evals.rank.split": "test[:20]", "evals.rank.every": "2 steps"}
    if example == "source":
        argument, keys["data.source"] = write_arrays(tmp_path), SOURCE.format(tmp_path)
    config = config_of(example, argument, **keys)
    if example != "target":  # whose pictures cannot be drawn: the loss is measured all the same
        with config.unlocked():
            del config.evals["reconstruct"]
    values = run(config, tmp_path / "run")
    assert len(values["train/loss"]) == 2
    assert np.isfinite(values["train/loss"]).all()
    if example == "evaluator":
        assert all(1 <= rank <= config.model.width for rank in values["eval/rank"])


def test_the_source_gives_the_rows_of_its_split_to_threads_and_to_processes_alike(tmp_path):
    path = write_arrays(tmp_path)
    batches = []
    for workers in (0, 1):
        config = config_of("source", path, **{"data.workers": workers})
        assert config.data.source == SOURCE.format(tmp_path)
        examples = tasks.build(config).examples
        batches.append(next(examples.batches(0, np.arange(16)))[0]["image"])
    np.testing.assert_array_equal(*batches)
    assert batches[0].std() > 0
    source = module_of("source.arrays").open_arrays(str(path), "train[10:14]")
    assert len(source) == 4
    np.testing.assert_array_equal(source[1]["image"], np.load(path)[11])
    with pytest.raises(UserError, match="there is no such file"):
        tasks.build(config_of("source", tmp_path / "y.npy"))


def test_a_gaze_keeps_patches_around_one_place():
    gaze = module_of("mask.masks").gaze
    rng, grid = jax.random.key(0), (10, 10)
    score_BL = gaze(rng, 200, grid, 0.75, blur=0.0)
    kept_BL = score_BL <= jnp.sort(score_BL, axis=1)[:, 24:25]
    rows_L, cols_L = (np.asarray(x).reshape(-1) for x in jnp.indices(grid))

    def spread(kept_BL):
        return np.mean([rows_L[kept].std() + cols_L[kept].std() for kept in np.asarray(kept_BL)])

    noise_BL = jax.random.uniform(rng, (200, 100))
    random_BL = noise_BL <= jnp.sort(noise_BL, axis=1)[:, 24:25]
    assert spread(kept_BL) < 0.7 * spread(random_BL)


def test_hog_has_108_values_knows_no_contrast_and_turns_with_the_image():
    hog = module_of("target.hog").hog
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3)).astype(np.float32)
    target_BLT = hog(images, (16, 16))
    assert target_BLT.shape == (2, 6, 108)
    np.testing.assert_allclose(hog(2 * images + 3, (16, 16)), target_BLT, atol=1e-6)
    norms = jnp.linalg.norm(target_BLT.reshape(2, 6, 3, 9, 4), axis=3)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    # Turned by half a circle, a gradient keeps its orientation, and cells change their places.
    cells = target_BLT.reshape(2, 3, 2, 3, 9, 2, 2)
    turned = hog(images[:, ::-1, ::-1], (16, 16)).reshape(cells.shape)
    np.testing.assert_allclose(turned[:, ::-1, ::-1, :, :, ::-1, ::-1], cells, atol=1e-2)
    assert np.abs(turned - cells).max() > 0.1
    # An edge that runs down has one orientation, one that runs across another.
    edge = np.zeros((1, 16, 16, 1), np.float32)
    edge[:, :, 8:] = 1
    down, across = (hog(x, (16, 16)).reshape(9, 4).sum(1) for x in (edge, edge.swapaxes(1, 2)))
    assert down.argmax() != across.argmax()


def test_the_decoder_of_convolutions_is_split_by_a_mesh_and_knows_its_roles():
    config = config_of("decoder", **DIGITS, **{"model.patch_size": (8, 8), "mesh.fsdp": 8})
    parts = running.build(config)
    shapes, _ = loop.lay_out(parts.task, parts.tx, 0, mesh_of(1, 8, 1))
    kernel = shapes.params["decoder"]["conv0"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")


def test_the_decoder_of_convolutions_puts_patches_in_their_places_behind_all_class_tokens():
    keys = {"model.patch_size": (8, 8), "model.cls_tokens": 3, "model.decoder_depth": 1}
    task = tasks.build(config_of("decoder", **DIGITS, **keys))
    decoder, count = task.network.make_decoder(task.spec), task.spec.num_patches
    latent = np.random.default_rng(0).normal(size=(1, 3 + 4, task.spec.encoder.width))
    latent, order = latent.astype(np.float32), np.arange(count)[None]
    variables = jax.jit(decoder.init)(jax.random.key(0), latent, order)
    # Its convolutions reach neighbours only: of 4 x 4 places the last has none in the first row.
    apply = jax.jit(decoder.apply)
    pred_BLT = apply(variables, latent, order)
    for token, reaches in ((0, False), (2, False), (3, True), (6, False)):
        changed = latent.copy()
        changed[:, token] += 1
        moved = np.abs(apply(variables, changed, order) - pred_BLT)[0].max(-1)
        assert (moved[0] > 1e-4) == reaches, token
        assert (moved[-1] > 1e-4) == 0, token


def test_a_decoder_that_wants_an_order_is_refused_where_there_is_none():
    config = config_of("decoder", **DIGITS, **{"model.patch_size": (8, 8)})
    with config.unlocked():
        config.masking.tokens_in_encoder = True
    with pytest.raises(UserError, match="leave that out, or let restore_BL=None be the default"):
        tasks.build(config)


def test_of_a_run_with_another_decoder_the_encoder_is_read(tmp_path):
    config = config_of("decoder", **DIGITS, **{"model.patch_size": (8, 8)})
    params, _ = jax.jit(tasks.build(config).init)(jax.random.key(0))
    model, loaded = mae_jax.load(save_workdir(config, tmp_path, {"params": params}))
    assert_trees_equal(loaded, {"encoder": params["encoder"]})
    images = np.zeros((1, 32, 32, 3), np.uint8)
    assert model.encode(loaded, images).shape == (1, 17, 16)
    with pytest.raises(UserError, match="no decoder of the paper's kind"):
        model.reconstruct(loaded, images, jax.random.key(0))


def test_a_decoder_that_predicts_another_shape_is_refused(monkeypatch):
    convolutions = module_of("decoder.convolutions")

    class Short(convolutions.Decoder):
        def __call__(self, latent_BND, restore_BL):
            return super().__call__(latent_BND, restore_BL)[:, 1:]

    class Other(convolutions.Decoder):
        def __call__(self, latent_BND):
            return latent_BND

    config = config_of("decoder", **DIGITS, **{"model.patch_size": (8, 8)})
    for decoder, words in (
        (Short, "Short' predicts shape .2, 15, 192. for 2 images of 16"),
        (Other, "Other' is no module of .spec, compute. that takes .latent, restore."),
    ):
        monkeypatch.setattr(convolutions, "Decoder", decoder)
        with pytest.raises(UserError, match=words):
            tasks.build(config)
    config.model.decoder = "decoder.convolution"
    with pytest.raises(UserError, match="convolution"):
        tasks.build(config)


def test_the_error_of_huber_is_the_square_for_large_delta_and_is_set_by_its_own_group():
    task = tasks.build(config_of("objective", **DIGITS, **{"huber.delta": 1e6}))
    assert task.delta == 1e6
    rng = np.random.default_rng(0)
    outputs = {
        "pred_BLT": rng.normal(size=(2, 4, 3)),
        "target_BLT": rng.normal(size=(2, 4, 3)),
        "mask_BL": np.array([[1.0, 0, 1, 0], [0, 1, 1, 0]]),
    }
    square = ((outputs["pred_BLT"] - outputs["target_BLT"]) ** 2).mean(-1)
    expected = (square * outputs["mask_BL"]).sum() / 4
    np.testing.assert_allclose(task.objective(outputs), expected / 2, rtol=1e-5)
