"""Several class tokens (config.model.cls_tokens), each with a position of its own; recipe pixio."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import (
    DECODER,
    GREY,
    MODEL,
    assert_trees_equal,
    finetune_config,
    fresh_state,
    load_encoder_into,
    mesh_of,
    random_params,
    run,
    tiny_config,
    updates,
)

import mae_jax
from mae_jax import flops, tasks
from mae_jax.configs import finetune, pixio
from mae_jax.errors import UserError
from mae_jax.interop import described, write
from mae_jax.interop import open as weights
from mae_jax.models import masking, modern, probe, resize
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.mae import MAE
from mae_jax.models.posemb import sincos_2d
from mae_jax.models.spec import ModelSpec, ViTSpec
from mae_jax.models.vit import Encoder

N_CLS, WIDTH = 3, 16
PATCHES = jax.random.normal(jax.random.key(5), (2, 16, 12))
MASK = masking.keep_lowest(jax.random.uniform(jax.random.key(6), (2, 16)), 4)
SPEC = ModelSpec(
    (8, 8),
    (2, 2),
    3,
    ViTSpec(WIDTH, 2, 2, 32, trained_positions=True),
    ViTSpec(8, 1, 2, 16, trained_positions=True),
    cls_tokens=N_CLS,
)
NETWORK = MAE(SPEC)


@pytest.fixture(scope="module")
def params():
    return random_params(NETWORK.init, PATCHES, MASK)


@cache
def program(method):
    return jax.jit(partial(NETWORK.apply, method=method))


def apply(params, *args, method="__call__"):
    return program(method)({"params": params}, *args)


def permuted(params, sides=("encoder", "decoder")):
    """Return parameters with the class tokens, and their position rows of some sides, reversed."""
    reverse = {"encoder": dict(params["encoder"]), "decoder": dict(params["decoder"])}
    reverse["encoder"]["cls_token"] = params["encoder"]["cls_token"][:, ::-1]
    for side in sides:
        table = params[side]["pos_embed"]
        reverse[side]["pos_embed"] = table.at[:, :N_CLS].set(table[:, :N_CLS][:, ::-1])
    return reverse


def config_with(**model) -> ConfigDict:
    config = tiny_config()
    config.evals = ConfigDict()
    config.model.update(model)
    return config


def test_one_class_token_is_the_network_without_the_key():
    plain, one = (tasks.build(config) for config in (tiny_config(), config_with(cls_tokens=1)))
    assert plain.spec == one.spec
    several = tasks.build(config_with(cls_tokens=N_CLS))
    shapes = [jax.eval_shape(x.init, jax.random.key(0))[0] for x in (plain, several)]
    assert "pos_embed" not in shapes[0]["encoder"]
    assert shapes[0]["encoder"]["cls_token"].shape == (1, 1, 32)
    assert shapes[1]["encoder"]["cls_token"].shape == (1, N_CLS, 32)
    assert shapes[1]["encoder"]["pos_embed"].shape == (1, N_CLS + 16, 32)
    assert shapes[1]["decoder"]["pos_embed"].shape == (1, N_CLS + 16, 16)


def test_permuting_class_tokens_with_their_positions_permutes_outputs_only(params):
    latent = apply(params, PATCHES, MASK, method="encode")
    assert latent.shape == (2, N_CLS + 4, WIDTH)
    other = apply(permuted(params), PATCHES, MASK, method="encode")
    np.testing.assert_allclose(other[:, :N_CLS], latent[:, :N_CLS][:, ::-1], atol=1e-5)
    np.testing.assert_allclose(other[:, N_CLS:], latent[:, N_CLS:], atol=1e-5)
    pred = apply(params, PATCHES, MASK)
    np.testing.assert_allclose(apply(permuted(params), PATCHES, MASK), pred, atol=1e-5)
    for sides in (("encoder",), ("decoder",)):  # a row that stays behind is another network
        assert np.abs(apply(permuted(params, sides), PATCHES, MASK) - pred).max() > 1e-3


def test_every_class_token_reaches_the_predictions(params):
    latent = apply(params, PATCHES, MASK, method="encode")

    def total(latent):
        return jnp.sin(apply(params, latent, MASK, method="decode")).sum()

    grads = jax.jit(jax.grad(total))(latent)
    assert (np.abs(grads[:, :N_CLS]).max((0, 2)) > 1e-4).all()


def test_patches_go_back_to_their_places_behind_all_class_tokens(params):
    """The same patches, kept in the opposite order."""
    latent = apply(params, PATCHES, MASK, method="encode")
    moved = latent.at[:, N_CLS:].set(latent[:, N_CLS:][:, ::-1])
    restore = jnp.where(MASK.restore_BL < 4, 3 - MASK.restore_BL, MASK.restore_BL)
    pred = apply(params, latent, MASK, method="decode")
    assert pred.shape == (2, 16, SPEC.patch_dim)
    again = apply(params, moved, MASK._replace(restore_BL=restore), method="decode")
    np.testing.assert_allclose(again, pred, atol=1e-5)
    assert np.abs(apply(params, moved, MASK, method="decode") - pred).max() > 1e-3


def test_a_feature_is_the_mean_of_the_class_tokens_after_the_norm(params):
    variables = {"params": params["encoder"]}
    every = Encoder(SPEC, merge=False).apply(variables, PATCHES)
    merged, blocks = Encoder(SPEC).apply(variables, PATCHES, return_blocks=True)
    assert merged.shape == (2, 1 + 16, WIDTH)
    assert blocks.shape == (3, 2, 1 + 16, WIDTH)
    np.testing.assert_allclose(merged[:, 0], every[:, :N_CLS].mean(1), atol=1e-5)
    np.testing.assert_array_equal(merged[:, 1:], every[:, N_CLS:])
    np.testing.assert_allclose(apply(params, PATCHES, method="encode"), merged, atol=1e-5)
    pooled = probe.pool_blocks(merged, blocks)
    np.testing.assert_allclose(pooled["cls"][-1], merged[:, 0], atol=1e-5)
    patches = probe.patch_tokens(Encoder(SPEC), params["encoder"], PATCHES, 1)
    np.testing.assert_allclose(patches, blocks[1][:, 1:], atol=1e-5)


def test_rotary_positions_turn_no_class_token():
    vit = ViTSpec(WIDTH, 1, 2, 16, block=BlockOptions(rope=100.0))
    angle_BNG = modern.extra(None, vit, (4, 4), None, N_CLS).angle_BNG
    assert angle_BNG.shape == (1, N_CLS + 16, 4)
    assert not angle_BNG[:, :N_CLS].any() and (angle_BNG[0, N_CLS:].any(-1)).all()


def test_position_rows_of_class_tokens_are_kept_when_a_table_is_resized():
    table = jnp.asarray(sincos_2d(WIDTH, (4, 4), N_CLS))[None].at[:, :N_CLS].set(7.0)
    resized = resize.positions(table, (4, 4), (6, 5), N_CLS)
    assert resized.shape == (1, N_CLS + 30, WIDTH)
    assert (resized[:, :N_CLS] == 7).all()
    alone = resize.positions(table[:, N_CLS - 1 :], (4, 4), (6, 5))
    np.testing.assert_array_equal(resized[:, N_CLS:], alone[:, 1:])
    with pytest.raises(UserError, match="4 x 4 patches and 1 cls token"):
        resize.positions(table, (4, 4), (6, 5))


def test_flops_count_all_class_tokens():
    plain, several = (tasks.build(config_with(cls_tokens=n)) for n in (1, N_CLS))
    spec, kept, more = plain.spec, 4, N_CLS - 1
    assert spec.decoder is not None
    stacks = [(spec.encoder, kept + 1), (spec.decoder, 16 + 1)]
    added = sum(flops.stack(vit, n + more) - flops.stack(vit, n) for vit, n in stacks)
    embed = 2 * more * spec.encoder.width * spec.decoder.width  # the decoder predicts patches only
    assert several.flops_per_example - plain.flops_per_example == pytest.approx(added + embed)


def test_a_mesh_of_any_shape_makes_the_same_updates():
    config = config_with(cls_tokens=4)
    config.online_probe = True
    ends = [updates(config, mesh_of(*shape), 2) for shape in ((1, 1, 1), (2, 2, 2))]
    assert_trees_equal(*(states[-1].params for states, _ in ends), atol=2e-5)
    before, after = ends[0][0][0].params["encoder"], ends[0][0][-1].params["encoder"]
    moved = np.abs(after["pos_embed"] - before["pos_embed"]).max((0, 2))
    assert (moved[:4] > 0).all()
    assert np.isfinite(ends[0][1][-1]["online_loss"])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the recipe pixio, two steps at a tiny size."""
    config = pixio.get_config("batch_size=16,image_size=32")
    config.model.update(MODEL | DECODER)
    config.train_for, config.optim.warmup, config.evals = "2 steps", "1 steps", ConfigDict()
    config.data.update(GREY, source="bundled:digits")
    root = tmp_path_factory.mktemp("pixio") / "run"
    run(config, root, (1, 1, 1))
    return root


def test_weights_are_loaded_with_all_class_tokens(workdir, tmp_path):
    model, loaded = mae_jax.load(workdir)
    assert model.spec.cls_tokens == 4
    assert (
        ModelSpec.from_config(json.loads(json.dumps(described.config_of(model.spec)))) == model.spec
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    assert model.encode(loaded, images).shape == (2, 17, 32)
    assert model.reconstruct(loaded, images, jax.random.key(0)).images_BHWC.shape == images.shape
    larger, resized = mae_jax.load(workdir, image_size=64)
    image = np.zeros((1, 64, 64, 1), np.uint8)
    assert jax.eval_shape(larger.encode, resized, image).shape == (1, 65, 32)
    opened = weights.open_weights(workdir)
    weights.save(tmp_path / "ours", opened.spec, opened.params, "x")
    assert weights.open_weights(tmp_path / "ours").spec == opened.spec
    with pytest.raises(UserError, match="have 4 class tokens, which other formats cannot hold"):
        write.official(tmp_path / "theirs.safetensors", opened.spec, opened.params)
    with pytest.raises(UserError, match="and these have 4 class tokens"):
        model.blocks(loaded, images)


def test_fine_tuning_takes_the_class_tokens_of_what_it_starts_from(workdir):
    arg = f"source=bundled:digits,test=test,batch_size=16,image_size=48,init={workdir}"
    config = finetune.get_config(arg)
    config.mix.group, config.model.pool = 8, "cls"
    assert config.model.cls_tokens == 4
    encoder = load_encoder_into(config, workdir)
    saved = weights.open_weights(workdir).params["encoder"]
    assert_trees_equal(encoder["cls_token"], saved["cls_token"])
    assert encoder["pos_embed"].shape == (1, 4 + 36, 32)
    np.testing.assert_array_equal(encoder["pos_embed"][:, :4], saved["pos_embed"][:, :4])
    task, state = fresh_state(config, mesh_of(1, 1, 1))
    batch = {"image": np.zeros((2, 48, 48, 1), np.uint8)}
    assert jax.eval_shape(task.classify, state.params, batch).logits_BY.shape == (2, 10)


def test_what_does_not_go_together_is_refused(workdir):
    config = tiny_config()
    task, state = fresh_state(config, mesh_of(1, 1, 1))
    with pytest.raises(UserError, match="has 4 class tokens, and config.model.cls_tokens=1: give"):
        task.load(workdir / "checkpoints/2", state)
    with pytest.raises(UserError, match="config.model.cls_tokens=0: give a whole number from 1"):
        tasks.build(config_with(cls_tokens=0))
    config = finetune_config()
    config.model.cls_tokens, config.trained_blocks = 2, 1.0
    with pytest.raises(UserError, match="config.trained_blocks=1.0: with registers or several"):
        tasks.build(config)


def test_the_recipe_hides_cells_of_four_patches():
    config = pixio.get_config("variant=Ti/16")
    config.data.update(source="bundled:photos")
    task = tasks.build(config)
    assert (task.spec.grid, task.spec.cls_tokens, task.spec.decoder.depth) == ((16, 16), 4, 16)
    score = task.score_patches(jax.random.key(0), 2, task.spec.grid, 0.75)
    mask = masking.keep_lowest(score, 64).mask_BL.reshape(2, 8, 2, 8, 2)
    np.testing.assert_array_equal(mask.min((2, 4)), mask.max((2, 4)))
    assert mask.mean() == 0.75
