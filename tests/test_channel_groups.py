"""Channel groups (config.task="channel_groups"): a token for each group of bands of a patch."""

import io
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from ml_collections import ConfigDict
from tiny import (
    DECODER,
    MODEL,
    assert_trees_equal,
    fresh_state,
    mesh_of,
    run,
    tiny_config,
    updates,
)

import mae_jax
from mae_jax import flops, tasks
from mae_jax.commands import recipes, visualize
from mae_jax.configs import bands, finetune, segment_frozen
from mae_jax.errors import UserError
from mae_jax.interop import described, write
from mae_jax.interop import open as weights
from mae_jax.models import channel_groups, masking, posemb, resize
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.mae import MAE, masked_mean
from mae_jax.models.patchify import patchify, to_patches
from mae_jax.models.spec import ModelSpec, ViTSpec

GROUPS = ((2, 0), (1, 3, 4))  # in no order, of unequal sizes
SPEC = ModelSpec(
    (8, 8),
    (2, 2),
    5,
    ViTSpec(32, 2, 4, 64),
    ViTSpec(16, 1, 4, 32),
    mean=(0.0,) * 5,
    std=(1.0,) * 5,
    channel_groups=GROUPS,
)
IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 5))
SCORE_BGA = jax.random.uniform(jax.random.key(2), (3, 2, 16))
MASK = masking.keep_lowest(channel_groups.independent(SCORE_BGA), 2 * 4)


def grouped_config(groups=GROUPS, **changes) -> ConfigDict:
    config = tiny_config(**changes)
    config.task = "channel_groups"
    channels = sum(map(len, groups))
    config.model.update(channels=channels, channel_groups=groups)
    config.data.update(mean=(0.5,) * channels, std=(0.5,) * channels)
    config.evals = ConfigDict()
    return config


def test_a_token_is_its_groups_channels_of_a_patch():
    tokens = to_patches(IMAGES, SPEC)
    assert tokens.shape == (3, SPEC.num_patches, SPEC.patch_dim) == (3, 32, 20)
    for group, channels in enumerate(GROUPS):
        alone = np.zeros(IMAGES.shape, np.float32)
        alone[..., channels] = np.asarray(IMAGES)[..., channels]
        np.testing.assert_array_equal(
            tokens[:, 16 * group : 16 * (group + 1)], patchify(alone, (2, 2))
        )
    np.testing.assert_array_equal(channel_groups.merge(tokens, GROUPS), patchify(IMAGES, (2, 2)))


def test_masks_are_independent_and_keep_as_many_patches_of_each_group():
    hidden_BGA = np.asarray(MASK.mask_BL).reshape(3, 2, 16)
    assert (hidden_BGA.sum(-1) == 12).all()
    kept = np.argsort(SCORE_BGA, -1)[..., :4]
    for image, group in np.ndindex(3, 2):
        assert set(np.flatnonzero(hidden_BGA[image, group] == 0)) == set(kept[image, group])
    assert (hidden_BGA[:, 0] != hidden_BGA[:, 1]).any(-1).all()
    task = tasks.build(grouped_config())
    batch = {"image": np.zeros((4, 32, 32, 5), np.uint8)}
    drawn = task.prepare(batch, lambda _: jax.random.key(0))["score"]
    ranks = np.sort(np.asarray(drawn).reshape(4, 2, 16), -1)
    np.testing.assert_array_equal(ranks, np.broadcast_to(np.arange(16), (4, 2, 16)))
    assert task.num_kept == 8


def test_a_mask_of_places_hides_all_groups_of_a_place():
    places = masking.keep_lowest(SCORE_BGA[:, 0], 4)
    shared = channel_groups.shared(places, GROUPS)
    hidden_BGA = np.asarray(shared.mask_BL).reshape(3, 2, 16)
    np.testing.assert_array_equal(hidden_BGA, np.stack([places.mask_BL] * 2, 1))
    assert shared.keep_BK.shape == (3, 8)


@pytest.fixture(scope="module")
def params():
    return MAE(SPEC).init(jax.random.key(0), to_patches(IMAGES, SPEC), MASK)["params"]


@pytest.mark.parametrize("group", [0, 1])
def test_pixels_of_a_hidden_group_do_not_reach_the_latent_and_visible_ones_do(params, group):
    def latent(images):
        apply = MAE(SPEC).apply
        return apply({"params": params}, to_patches(images, SPEC), MASK, method="encode")

    hidden_A = np.asarray(MASK.mask_BL)[0].reshape(2, 16)[group]
    for patch, reaches in ((int(hidden_A.argmax()), False), (int(hidden_A.argmin()), True)):
        row, col = 2 * (patch // 4), 2 * (patch % 4)
        changed = IMAGES.at[0, row : row + 2, col : col + 2, GROUPS[group]].add(1.0)
        moved = np.abs(latent(changed) - latent(IMAGES)).max((1, 2))
        assert (moved[0] > 1e-3) == reaches
        assert not moved[1:].any()


def test_a_group_has_rows_of_the_embedding_and_columns_of_the_prediction_of_its_own(params):
    """The gradient of one group's loss."""
    task = tasks.build(grouped_config())
    task = replace(task, network=MAE(SPEC))

    def loss(params, group):
        pred = MAE(SPEC).apply({"params": params}, to_patches(IMAGES, SPEC), MASK)
        mask = MASK.mask_BL.reshape(3, 2, 16).at[:, 1 - group].set(0).reshape(3, 32)
        target = to_patches(IMAGES, SPEC)
        return task.objective({"pred_BLT": pred, "target_BLT": target, "mask_BL": mask})

    for group in (0, 1):
        own = channel_groups.own_channels(GROUPS, SPEC.patch_dim)[group] > 0
        grads = jax.grad(loss)(params, group)["decoder"]["pred"]["kernel"]
        assert (np.abs(grads).max(0) > 0).tolist() == own.tolist()


def test_the_loss_is_the_mean_over_hidden_tokens_and_their_own_channels():
    task, rng = tasks.build(grouped_config()), np.random.default_rng(0)
    pred, target = (rng.normal(size=(2, 32, 320)).astype(np.float32) for _ in range(2))
    target_BLP = np.asarray(channel_groups.split(target[:, :16], GROUPS))
    mask = rng.integers(0, 2, (2, 32))
    errors = []
    for image, token in np.argwhere(mask):
        own = np.isin(np.arange(320) % 5, GROUPS[token // 16])
        errors.append(np.square(pred - target_BLP)[image, token, own].mean())
    got = task.objective({"pred_BLT": pred, "target_BLT": target_BLP, "mask_BL": mask})
    assert got == pytest.approx(np.mean(errors), rel=1e-5)


def test_evaluations_report_the_training_loss_of_groups_that_differ_in_size():
    task, state = fresh_state(grouped_config(), mesh_of(1, 1, 1))
    params, rng = jax.device_get(state.params), np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *task.spec.image_size, 5), np.uint8)
    images[..., list(GROUPS[1])] //= 4
    batch = {"image": images, "score": rng.random((2, task.spec.num_patches // 2))}
    shown = jax.jit(task.predict()["reconstruction"])(params, {}, batch)
    places = masking.keep_lowest(jnp.asarray(batch["score"]), task.num_kept // 2)
    score_BL = channel_groups.shared(places, GROUPS).restore_BL
    trained = jax.jit(task.reconstruct)(params, {}, batch | {"score": score_BL})
    loss = float(masked_mean(shown["loss_BL"], shown["mask_BL"]))
    assert loss == pytest.approx(float(task.objective(trained)), rel=1e-5)
    plain_BL = jnp.square(shown["pred_BLT"] - shown["target_BLT"]).mean(-1)
    assert loss != pytest.approx(float(masked_mean(plain_BL, shown["mask_BL"])), rel=1e-3)


def test_one_group_is_the_plain_masked_autoencoder():
    """Bit by bit at the start; later as near as the compiler fuses one more product with 1."""
    config = grouped_config(groups=((0, 1, 2),))
    plain = ConfigDict(config.to_dict())
    plain.task = "pretrain"
    del plain.model["channel_groups"]
    (ours, ours_metrics), (theirs, their_metrics) = (
        updates(x, mesh_of(1, 1, 1), 3) for x in (config, plain)
    )
    assert_trees_equal(ours[0].params, theirs[0].params)
    for one, other in zip(ours_metrics, their_metrics, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-6)


def test_a_mesh_of_any_shape_makes_the_same_updates():
    ends = [updates(grouped_config(), mesh_of(*x), 2)[0] for x in ((1, 1, 1), (2, 2, 2))]
    assert_trees_equal(*(states[-1].params for states in ends), atol=2e-5)


def test_positions_say_place_and_group():
    table = channel_groups.sincos_table(32, (2, 3), 1, 4)
    assert table.shape == (1 + 24, 32) and not table[0].any()
    patches = table[1:].reshape(4, 6, 32)
    np.testing.assert_array_equal(patches[0, :, :24], posemb.sincos_2d(24, (2, 3))[1:])
    assert (patches[:, :, :24] == patches[:1, :, :24]).all()
    assert (patches[:, :, 24:] == patches[:, :1, 24:]).all()
    assert len(np.unique(patches[:, 0, 24:], axis=0)) == 4
    resized = resize.positions(jnp.asarray(table)[None], (2, 3), (4, 6), groups=4)
    resized = resized[0, 1:].reshape(4, 24, 32)
    one = resize.positions(jnp.asarray(table[:7])[None], (2, 3), (4, 6))[0, 1:]
    np.testing.assert_allclose(resized[0], one, atol=1e-6)
    np.testing.assert_array_equal(
        channel_groups.sincos_table(32, (2, 3)), posemb.sincos_2d(32, (2, 3))
    )


def test_flops_count_every_group_and_agree_with_the_compiled_program():
    spec = replace(SPEC, encoder=ViTSpec(128, 1, 2, 512), decoder=ViTSpec(128, 1, 2, 512))
    network, patches = MAE(spec), to_patches(IMAGES, spec)
    params = network.init(jax.random.key(0), patches, MASK)["params"]
    compiled = jax.jit(network.apply).lower({"params": params}, patches, MASK).compile()
    ours = 3 * flops.mae(spec, 8)
    assert 0.93 < ours / compiled.cost_analysis()["flops"] < 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen images of 12 bands."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for i in range(16):
        file = io.BytesIO()
        image = rng.integers(0, 10_000, (40, 40, 12)).astype(np.uint16)
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig")
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        (root / "ab"[i % 2] / f"{i}.tif").write_bytes(file.getvalue())
    return root


def recipe(folder) -> ConfigDict:
    config = bands.get_config(f"data={folder},batch_size=8,image_size=16")
    config.model.update({**MODEL, "channels": 12} | DECODER)
    config.train_for, config.optim.warmup, config.data.workers = "4 steps", "1 steps", 0
    config.checkpoint.update(every="2 steps", keep_every="")
    config.evals.reconstruct.update(every="4 steps", split="train", images=8, batch_size=8)
    return config


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """Four steps of the recipe, and its evaluation."""
    root = tmp_path_factory.mktemp("groups") / "run"
    run(recipe(folder), root, (1, 1, 1))
    return root


def test_the_recipe_trains_measures_and_resumes(folder, workdir, tmp_path):
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < x.get("eval/rmse", 0) < 200 for x in metrics)
    assert any(np.isfinite(x.get("eval/loss", np.nan)) for x in metrics)
    assert list((workdir / "images").glob("*reconstruction*"))
    half = shutil.copytree(workdir, tmp_path / "half")
    shutil.rmtree(half / "checkpoints/4")
    run(recipe(folder), half, (1, 1, 1))
    assert_trees_equal(*(mae_jax.load(x)[1] for x in (workdir, half)))


def test_weights_are_loaded_shown_and_embedded_with_their_groups(workdir, folder, tmp_path):
    model, loaded = mae_jax.load(workdir)
    assert len(model.spec.channel_groups) == 4
    assert (
        ModelSpec.from_config(json.loads(json.dumps(described.config_of(model.spec)))) == model.spec
    )
    images = np.random.default_rng(0).integers(0, 10_000, (2, 16, 16, 12)).astype(np.uint16)
    assert model.encode(loaded, images).shape == (2, 1 + 4 * 4, 32)
    out = model.reconstruct(loaded, images, jax.random.key(0))
    assert out.images_BHWC.shape == images.shape and out.mask_BL.shape == (2, 4)
    larger, resized = mae_jax.load(workdir, image_size=32)
    image = np.zeros((1, 32, 32, 12), np.uint16)
    assert jax.eval_shape(larger.encode, resized, image).shape == (1, 65, 32)
    arguments = [str(workdir), str(folder), f"--out={tmp_path / 'drawn'}", "--limit=2"]
    assert visualize.main([*arguments, "--pca", "--errors"]) == 0
    assert {"pca.png", "errors.png"} < {path.name for path in (tmp_path / "drawn").iterdir()}
    with pytest.raises(UserError, match="one token for each patch, and these have 4 tokens for"):
        visualize.main([*arguments[:2], f"--out={tmp_path / 'more'}", "--attention"])
    opened = weights.open_weights(workdir)
    weights.save(tmp_path / "ours", opened.spec, opened.params, "x")
    assert weights.open_weights(tmp_path / "ours").spec == opened.spec
    with pytest.raises(UserError, match="channel groups .* which other formats cannot hold"):
        write.official(tmp_path / "theirs.safetensors", opened.spec, opened.params)


def test_fine_tuning_takes_the_groups_of_what_it_starts_from(workdir, folder):
    arg = f"source=folder:{folder},test=train,batch_size=8,image_size=24,init={workdir}"
    config = finetune.get_config(arg)
    config.mix.group, config.data.workers, config.data.augment = 8, 0, ""
    assert len(config.model.channel_groups) == 4
    task, state = fresh_state(config, mesh_of(1, 1, 1))
    state = task.load(workdir / "checkpoints/4", state)
    assert state.params["encoder"]["pos_embed"].shape == (1, 1 + 4 * 9, 32)
    image = np.zeros((2, 24, 24, 12), np.float32)
    assert task.classify(state.params, {"image": image}).logits_BY.shape == (2, 2)


def test_what_does_not_go_together_is_refused(workdir):
    def refused(words, config):
        with pytest.raises(UserError, match=words):
            tasks.build(config)

    for groups in (((0, 1), (2,)), ((0, 1), (1, 2, 3, 4))):
        config = grouped_config()
        config.model["channel_groups"] = groups
        refused("each of the channels 0 to 4 must be in one group", config)
    config.model["channel_groups"] = (0, 1)
    refused("channel_groups=.*: give tuples of whole numbers", config)
    config = grouped_config()
    config.task = "pretrain"
    refused("give config.task='channel_groups' too", config)
    config = grouped_config()
    del config.model["channel_groups"]
    refused("task='channel_groups': give config.model.channel_groups", config)
    config = grouped_config()
    config.target = ConfigDict({"name": "pca", "components": 8})
    refused("channel groups predict pixels", config)
    config = grouped_config()
    config.model.block = ConfigDict({"rope": 100.0})
    refused("rope turns patches, not their channel_groups", config)
    with pytest.raises(UserError, match="channel_groups"):
        replace(SPEC, encoder=ViTSpec(32, 2, 4, 64, block=BlockOptions(rope=100.0)))


def test_segmentation_wants_one_token_for_each_patch(workdir):
    config = segment_frozen.get_config(f"init={workdir},test=test")
    with pytest.raises(UserError, match="segmentation reads one token for each patch"):
        tasks.build(config)


def test_groups_are_given_on_the_command_line_as_tuples():
    argv = ["--config.model.channel_groups=((0,1),(2,))", "--config.seed=1"]
    rest, taken = recipes._take_optional(argv)
    assert rest == argv[1:] and taken == {"model.channel_groups": ((0, 1), (2,))}
    with pytest.raises(UserError, match="channel_groups=VALUE, with a tuple"):
        recipes._take_optional(["--config.model.channel_groups=((0,1)"])
