"""mae_jax.load: any weights as a model to call, inside jit or not."""

import dataclasses
import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from official import DATA, GOLDEN, HEADS, META, STATE, assert_close, golden_state, write_pth
from tiny import assert_trees_equal, save_workdir

import mae_jax
from configs import quickstart
from mae_jax.commands import convert
from mae_jax.errors import UserError
from mae_jax.models import masking, resize
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.posemb import sincos_2d
from mae_jax.pretrained import Model
from mae_jax.tasks.pretrain import Task

ROOT = DATA.parents[1]
LEVELS = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # the golden images are normalised already


def test_importing_the_package_imports_no_jax():
    code = "import mae_jax, sys; assert 'jax' not in sys.modules; mae_jax.load; import jax"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DATA.parents[1])


def test_an_official_file_predicts_the_official_numbers(tmp_path):
    model, params = mae_jax.load(write_pth(tmp_path / "a.pth"), **HEADS, **LEVELS)
    assert not (model.spec.encoder.trained_positions or model.spec.decoder.trained_positions)
    kept = masking.num_kept(GOLDEN["noise"].shape[1], META["mask_ratio"])
    mask = masking.keep_lowest(jnp.asarray(GOLDEN["noise"]), kept)
    out = jax.jit(model.predict)(params, GOLDEN["images"], mask)
    assert_close(out.pred_BLT, GOLDEN["norm_pix/pred"])
    np.testing.assert_array_equal(out.mask_BL, GOLDEN["norm_pix/mask"])


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_fine_tuned_file_gives_the_official_logits(pool, tmp_path):
    golden = np.load(DATA / f"vit_tiny_{pool}.npz")
    state, meta = golden_state(DATA / f"vit_tiny_{pool}.npz")
    path = write_pth(tmp_path / "a.pth", state)
    model, params = mae_jax.load(path, heads=meta["heads"], **LEVELS)
    assert model.spec.pool == pool
    out = jax.jit(model.classify)(params, golden["images"])
    assert_close(out.features_BD, golden["features"])
    assert_close(out.logits_BY, golden["logits"])


def test_encode_and_reconstruct_are_jittable_and_take_levels(tmp_path):
    model, params = mae_jax.load(write_pth(tmp_path / "a.pth"), **HEADS)
    side, patches = META["img"], (META["img"] // META["patch"]) ** 2
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    tokens = jax.jit(model.encode)(params, images)
    assert tokens.shape == (2, 1 + patches, META["embed_dim"])
    np.testing.assert_allclose(tokens, model.encode(params, images.astype(np.float32)), atol=1e-5)
    reconstruct = jax.jit(model.reconstruct, static_argnames="mask_ratio")
    out = reconstruct(params, images, jax.random.key(0), mask_ratio=0.5)
    assert out.images_BHWC.shape == images.shape
    assert out.images_BHWC.min() >= 0 and out.images_BHWC.max() <= 255
    assert out.mask_BL.sum() == 2 * patches / 2
    other = reconstruct(params, images, jax.random.key(1), mask_ratio=0.5)
    assert (out.mask_BL != other.mask_BL).any()
    with pytest.raises(ValueError, match="this model takes"):
        model.encode(params, images[:, :-1])
    edges = Model(dataclasses.replace(model.spec, target="my_fork.targets.edges"))
    with pytest.raises(ValueError, match="predict my_fork.targets.edges, and no pixels"):
        edges.reconstruct(params, images, jax.random.key(0))


def test_functions_of_a_model_are_one_program_also_for_a_model_alike(tmp_path, caplog):
    path = write_pth(tmp_path / "a.pth")
    images = np.zeros((2, META["img"], META["img"], 3), np.uint8)
    key = jax.random.key(0)

    def programs(model, params):
        caplog.clear()
        with jax.log_compiles():
            model.encode(params, images)
            model.reconstruct(params, images, key, mask_ratio=0.5)
        return sum("Finished XLA compilation" in message for message in caplog.messages)

    model, params = mae_jax.load(path, **HEADS)
    assert programs(model, params) == 2
    assert programs(model, params) == 0
    assert programs(*mae_jax.load(path, **HEADS)) == 0


def test_the_encoder_becomes_a_module_of_nnx_by_the_lines_of_the_readme(tmp_path):
    """It computes the same, and its parameters are what `nnx.grad` differentiates."""
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "nnx.bridge" in block]
    model, params = mae_jax.load(write_pth(tmp_path / "a.pth"), **HEADS)
    images = np.random.default_rng(0).integers(0, 256, (2, META["img"], META["img"], 3), np.uint8)
    names = {"model": model, "params": params, "images": images}
    exec(code, names)
    encoder, patches = names["encoder"], names["patches"]
    assert isinstance(encoder, nnx.Module)
    np.testing.assert_allclose(encoder(patches), model.encode(params, images), atol=1e-5)
    grads = nnx.to_pure_dict(nnx.grad(lambda encoder: encoder(patches)[:, 0].sum())(encoder))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, dict(params["encoder"]))
    assert np.abs(grads["cls_token"]).max() > 0


def test_what_had_to_be_assumed_is_said(tmp_path, capsys):
    path = write_pth(tmp_path / "a.pth")
    mae_jax.load(path, **HEADS)
    assert "taken as norm_pixels, give target=pixels if not" in capsys.readouterr().err
    mae_jax.load(path, target="pixels", **HEADS)
    assert not capsys.readouterr().err


def saved_and_loaded(config, workdir):
    """Fresh parameters, saved as a run's, and what is loaded; both predict the same."""
    task = Task.from_config(config)
    params, _ = jax.jit(task.init)(jax.random.key(0))
    save_workdir(config, workdir, {"params": params})
    model, loaded = mae_jax.load(workdir)
    shape = (2, *config.model.image_size, config.model.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batch = task.prepare({"image": images}, lambda name: jax.random.key(3))
    theirs = jax.jit(task.predict()["reconstruction"])(params, {}, batch)
    kept = masking.num_kept(batch["score"].shape[1], config.mask_ratio)
    exact = Model(model.spec, ComputeConfig(jnp.dtype(config.model.dtype)))
    ours = exact.predict(loaded, images, masking.keep_lowest(batch["score"], kept))
    np.testing.assert_allclose(ours.pred_BLT, theirs["pred_BLT"], atol=1e-5)
    return params, model, loaded


def test_a_run_of_this_project_is_loaded_from_its_workdir(tmp_path):
    config = ConfigDict(quickstart.get_config())
    params, model, loaded = saved_and_loaded(config, tmp_path)
    assert_trees_equal(params, loaded)
    assert model.spec.target == config.target.name
    step, again = mae_jax.load(tmp_path / "checkpoints" / "0")
    assert step.spec == model.spec
    assert_trees_equal(again, loaded)
    mae_jax.load(tmp_path, heads=model.spec.encoder.heads)
    for given in ({"key": "teacher"}, {"heads": 7}, {"decoder_heads": 7}):
        with pytest.raises(UserError, match=f"says it itself: leave {next(iter(given))} out"):
            mae_jax.load(tmp_path, **given)


def test_averaged_weights_are_taken_when_asked_for_and_named_when_not(tmp_path, capsys):
    config = ConfigDict(quickstart.get_config())
    config.ema = 0.9
    last, _ = jax.jit(Task.from_config(config).init)(jax.random.key(0))
    mean = jax.tree.map(lambda x: x + 1, last)
    workdir = save_workdir(config, tmp_path / "run", {"params": last, "extra": {"ema": mean}})
    assert_trees_equal(last, mae_jax.load(workdir)[1])
    assert "averaged=True" in capsys.readouterr().err
    assert_trees_equal(mean, mae_jax.load(workdir, averaged=True)[1])
    assert not capsys.readouterr().err
    convert.main([str(workdir), str(tmp_path / "mean"), "--to=ours", "--averaged"])
    assert_trees_equal(mean, mae_jax.load(tmp_path / "mean")[1])
    with pytest.raises(ValueError, match="holds no averaged weights: its run had no config.ema"):
        mae_jax.load(tmp_path / "mean", averaged=True)
    with pytest.raises(ValueError, match="only runs of this project have both"):
        mae_jax.load(write_pth(tmp_path / "a.pth"), averaged=True, **HEADS)


def test_positions_of_another_size_are_resized_fixed_ones_too(tmp_path):
    path = write_pth(tmp_path / "a.pth")
    patch, side = META["patch"], META["img"] // META["patch"]
    model, params = mae_jax.load(path, image_size=(patch * 3, patch * 5), **HEADS)
    assert model.spec.grid == (3, 5)
    for name, width in (("encoder", META["embed_dim"]), ("decoder", META["dec_dim"])):
        table = jnp.asarray(sincos_2d(width, (side, side)))[None]
        resized = resize.positions(table, (side, side), (3, 5))
        np.testing.assert_array_equal(params[name]["pos_embed"], resized)
    images = np.random.default_rng(0).integers(0, 256, (1, patch * 3, patch * 5, 3), np.uint8)
    assert model.encode(params, images).shape[1] == 16
    for name in ("encoder", "decoder"):  # both tables are read
        shifted = params[name] | {"pos_embed": params[name]["pos_embed"] + 1}
        both = (params, params | {name: shifted})
        drawn = [model.reconstruct(p, images, jax.random.key(0)).pred_BLT for p in both]
        assert not np.allclose(*drawn)
    assert mae_jax.load(path, image_size=patch * 3, **HEADS)[0].spec.grid == (3, 3)
    with pytest.raises(ValueError, match="whole number of patches"):
        mae_jax.load(path, image_size=(patch * 3 + 1, patch * 5), **HEADS)


def test_a_file_with_another_than_a_square_of_patches(tmp_path):
    arrays = dict(STATE)
    for name in ("pos_embed", "decoder_pos_embed"):
        arrays[name] = sincos_2d(arrays[name].shape[-1], (2, 5))[None]
    write_pth(tmp_path / "a.pth", arrays)
    with pytest.raises(ValueError, match="give the image_size of the file"):
        mae_jax.load(tmp_path / "a.pth", **HEADS)
    size = (META["patch"] * 2, META["patch"] * 5)
    model, _ = mae_jax.load(tmp_path / "a.pth", image_size=size, **HEADS)
    assert model.spec.grid == (2, 5) and not model.spec.encoder.trained_positions
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 11, 64\)"):
        mae_jax.load(tmp_path / "a.pth", image_size=size[0] * 2, **HEADS)


def test_a_run_with_mask_tokens_in_the_encoder_is_loaded_with_them(tmp_path):
    config = ConfigDict(quickstart.get_config())
    config.masking.tokens_in_encoder = True
    saved_and_loaded(config, tmp_path)
    for to in ("official", "hf"):
        with pytest.raises(ValueError, match="Convert with --part=encoder"):
            convert.main([str(tmp_path), str(tmp_path / "out"), f"--to={to}"])
        out = tmp_path / f"encoder_{to}"
        assert convert.main([str(tmp_path), str(out), f"--to={to}", "--part=encoder"]) == 0


def test_a_bucket_is_not_taken_for_a_local_path(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: (x != "gcsfs" and found(x)) or None)
    with pytest.raises(ValueError, match="gs://nowhere/a.pth: buckets need gcsfs"):
        mae_jax.load("gs://nowhere/a.pth")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"std": (0, 0, 0)}, "std=.*give numbers, each above 0"),
        ({"std": (float("nan"), 1, 1)}, "std=.*give numbers"),
        ({"mean": ("a", "b", "c")}, "mean=.*give numbers"),
        ({"mean": 0.5}, "mean has 1 numbers for images of 3 channels"),
        ({"value_range": (5, 5)}, "value_range=.*give .LOW, HIGH."),
        ({"image_size": "64x48"}, "image_size='64x48': give a whole number"),
        ({"image_size": (64, 64, 3)}, "image_size=.*give a whole number"),
    ],
)
def test_numbers_that_no_image_has_are_refused(given, words, tmp_path):
    with pytest.raises(UserError, match=words):
        mae_jax.load(write_pth(tmp_path / "a.pth"), **HEADS, **given)


def test_a_mask_of_other_images_is_refused(tmp_path):
    model, params = mae_jax.load(write_pth(tmp_path / "a.pth"), **HEADS, **LEVELS)
    mask = masking.keep_lowest(jnp.asarray(GOLDEN["noise"])[:1], 4)
    with pytest.raises(UserError, match=r"a mask of \(1, \d+\) for \(2, \d+\), images and patches"):
        model.predict(params, GOLDEN["images"][:2], mask)


def test_what_the_weights_have_not_is_said(tmp_path):
    path = write_pth(tmp_path / "a.pth")
    model, params = mae_jax.load(path, part="encoder", **HEADS)
    images = np.zeros((1, META["img"], META["img"], 3), np.uint8)
    with pytest.raises(ValueError, match="no decoder"):
        model.reconstruct(params, images, jax.random.key(0))
    with pytest.raises(ValueError, match="no head"):
        model.classify(params, images)
    with pytest.raises(ValueError, match="does not say how many heads"):
        mae_jax.load(path)
    with pytest.raises(ValueError, match="heads=5 does not divide"):
        mae_jax.load(path, heads=5, decoder_heads=2)
    with pytest.raises(ValueError, match="no config.json|lies in no workdir|no checkpoint|model_"):
        mae_jax.load(tmp_path)
