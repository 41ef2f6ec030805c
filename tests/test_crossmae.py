"""CrossMAE: predictions that do not see each other, its share of them, and its sums of blocks."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import assert_trees_equal, batch_of, mesh_of, run, save_workdir, tiny_config, updates

import mae_jax
from mae_jax import flops, optim, optimizers, plan, tasks
from mae_jax import train as loop
from mae_jax.configs import crossmae as recipe
from mae_jax.errors import UserError
from mae_jax.metrics import writer
from mae_jax.models import crossmae, mae, masking
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.spec import ModelSpec, ViTSpec

SPEC = ModelSpec((32, 32), (8, 8), 3, ViTSpec(32, 3, 4, 128), ViTSpec(16, 2, 2, 64))


def config(share=0.25, maps=0, **changes):
    """Return the tiny pre-training of 16 patches with this decoder, of two blocks."""
    made = tiny_config(task="crossmae", **changes)
    made.model.update(decoder_share=share, decoder_maps=maps, decoder_depth=2)
    return made


def network(**compute):
    """Return the network, its variables, patches of two images and their mask."""
    patches_BLP = jax.random.normal(jax.random.key(0), (2, SPEC.num_patches, SPEC.patch_dim))
    mask = masking.keep_lowest(jax.random.uniform(jax.random.key(1), (2, 16)), 4)
    model = crossmae.CrossMAE(SPEC, ComputeConfig(**compute))
    variables = jax.jit(model.init)(jax.random.key(2), patches_BLP, mask)
    return model, variables, patches_BLP, mask


def predict(model, variables, patches_BLP, mask, query_BQ):
    apply = jax.jit(partial(model.apply, method="predict"))
    return apply(variables, patches_BLP, mask, jnp.asarray(query_BQ))[1]


def prepared(made):
    """Return a task, its fresh parameters, and a batch as training sees it."""
    task = tasks.build(made)
    params, _ = jax.jit(task.init)(jax.random.key(0))
    images = {"image": batch_of(made)["image"]}
    return task, params, task.prepare(images, lambda name: loop.stream(0, name, 0))


def test_a_prediction_does_not_change_when_others_are_dropped_or_permuted():
    setting = network()
    hidden_BH = np.argwhere(np.asarray(setting[-1].mask_BL))[:, 1].reshape(2, -1)
    all_BHT = predict(*setting, hidden_BH)
    order = np.random.default_rng(0).permutation(hidden_BH.shape[1])
    np.testing.assert_allclose(predict(*setting, hidden_BH[:, order]), all_BHT[:, order], atol=1e-6)
    some = predict(*setting, hidden_BH[:, [7, 2]])
    np.testing.assert_allclose(some, all_BHT[:, [7, 2]], atol=1e-6)
    assert np.abs(all_BHT[:, 0] - all_BHT[:, 1]).max() > 1e-3  # they differ by their places
    model, variables, patches_BLP, mask = setting
    other = predict(model, variables, patches_BLP + 1.0, mask, hidden_BH)  # and by what is seen
    assert np.abs(other - all_BHT).max() > 1e-3


def test_the_whole_output_has_a_prediction_for_every_patch_in_its_place():
    model, variables, patches_BLP, mask = network()
    whole_BLT = jax.jit(model.apply)(variables, patches_BLP, mask)
    assert whole_BLT.shape == (2, 16, 192) and whole_BLT.dtype == jnp.float32
    query_BQ = np.array([[3, 14], [9, 0]])
    some = predict(model, variables, patches_BLP, mask, query_BQ)
    np.testing.assert_allclose(some, whole_BLT[np.arange(2)[:, None], query_BQ], atol=1e-6)


@pytest.mark.parametrize("number", [0, 2])
def test_weights_that_choose_one_map_are_that_map_alone(number):
    tokens_MBND = jax.random.normal(jax.random.key(3), (4, 2, 5, 32))
    query_BQ = jnp.array([[1, 2], [3, 4]])
    decoder = crossmae.Decoder(SPEC)
    params = jax.jit(decoder.init)(jax.random.key(4), tokens_MBND, query_BQ)["params"]
    assert params["map_weights"].shape == (2, 4)
    apply = jax.jit(decoder.apply)
    mixed = apply({"params": params}, tokens_MBND, query_BQ)
    chosen = params | {"map_weights": jnp.zeros((2, 4)).at[:, number].set(1.0)}
    by_weight = apply({"params": chosen}, tokens_MBND, query_BQ)
    of_one = params | {"map_weights": jnp.ones((2, 1))}
    alone = apply({"params": of_one}, tokens_MBND[number : number + 1], query_BQ)
    np.testing.assert_allclose(by_weight, alone, atol=1e-5)
    assert np.abs(mixed - alone).max() > 1e-3


def test_maps_are_chosen_evenly_up_to_the_last_block():
    chosen = {n: crossmae.choose_maps(12, n).tolist() for n in (0, 1, 3, 6, 12, 13)}
    assert chosen[1] == [12]
    assert chosen[3] == [4, 8, 12]
    assert chosen[6] == [2, 4, 6, 8, 10, 12]
    assert chosen[12] == list(range(1, 13))
    assert chosen[13] == chosen[0] == list(range(13))


def test_queries_are_hidden_patches_each_as_often():
    noise_BL = jax.random.uniform(jax.random.key(0), (4000, 16))
    mask_BL = jnp.tile(jnp.arange(16) >= 4, (4000, 1)).astype(jnp.float32)
    query_BQ = np.asarray(crossmae.draw_queries(mask_BL, noise_BL, 3))
    assert query_BQ.min() == 4
    assert all(len(set(row)) == 3 for row in query_BQ)
    counts = np.bincount(query_BQ.ravel(), minlength=16)[4:]
    assert np.abs(counts / 1000 - 1).max() < 0.15  # five standard deviations


def test_flops_grow_linearly_with_the_share_and_agree_with_the_compiled_program():
    """With every block unrolled, since XLA counts a scanned body once."""
    counts = [flops.crossmae(SPEC, 4, q, 4) for q in (2, 4, 6)]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0
    spec = ModelSpec((64, 64), (8, 8), 3, ViTSpec(1024, 2, 4, 4096), ViTSpec(512, 2, 4, 2048))
    model = crossmae.CrossMAE(spec, ComputeConfig(scan_unroll=2))
    patches_BLP = jnp.zeros((4, spec.num_patches, spec.patch_dim))
    mask = masking.keep_lowest(jnp.zeros((4, spec.num_patches)), 16)
    variables = jax.eval_shape(model.init, jax.random.key(0), patches_BLP, mask)
    compiled = jax.jit(model.apply).lower(variables, patches_BLP, mask).compile()
    ours = 4 * flops.crossmae(spec, 16, spec.num_patches, 3)
    assert 0.95 < ours / compiled.cost_analysis()["flops"] < 1.0


def test_b16_has_the_published_sizes_and_costs_less_than_mae():
    spec = ModelSpec.from_config(recipe.get_config("share=0.25").to_dict())
    assert (spec.decoder.depth, spec.decoder.width, spec.decoder.heads) == (12, 512, 16)
    of_mae = flops.mae(replace(spec, decoder=replace(spec.decoder, depth=8)), 49)
    quarter, whole = (flops.crossmae(spec, 49, q, 13) for q in (49, 147))
    assert quarter < 0.85 * of_mae and quarter < whole


def test_of_hidden_patches_those_that_are_predicted_alone_decide_the_loss():
    task, params, batch = prepared(config())
    assert task.num_predicted == 4
    mask = masking.keep_lowest(batch["score"], task.num_kept)
    query_BQ = np.asarray(crossmae.draw_queries(mask.mask_BL, batch["query"], 4))
    asked = query_BQ[0, 0]
    left = min(set(np.flatnonzero(mask.mask_BL[0])) - set(query_BQ[0]))

    @jax.jit
    def loss(image):
        return task.loss(params, {}, batch | {"image": image}, None, True)[0]

    def with_another(patch):
        image, (row, col) = np.array(batch["image"]), divmod(int(patch), 4)
        square = image[0, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
        square[:4] = 255 - square[:4]
        return image

    assert loss(with_another(left)) == loss(batch["image"])
    assert loss(with_another(asked)) != loss(batch["image"])


def test_evaluators_get_all_hidden_patches_and_training_a_share_of_the_same():
    task, params, batch = prepared(config())
    part = jax.jit(task.reconstruct)(params, {}, batch)
    del batch["query"]
    whole = jax.jit(task.predict()["reconstruction"])(params, {}, batch)
    mask = masking.keep_lowest(batch["score"], task.num_kept)
    np.testing.assert_array_equal(whole["mask_BL"], mask.mask_BL)
    assert whole["pred_BLT"].shape == whole["target_BLT"].shape == (16, 16, 64)
    assert part["pred_BLT"].shape == part["target_BLT"].shape == (16, 4, 64)
    for target, pred in zip(part["target_BLT"][3], part["pred_BLT"][3], strict=True):
        (place,) = np.flatnonzero((np.asarray(whole["target_BLT"][3]) == target).all(-1))
        np.testing.assert_allclose(whole["pred_BLT"][3, place], pred, atol=1e-5)
    assert not np.asarray(whole["pred_BLT"])[np.asarray(mask.mask_BL) == 0].any()


def test_with_the_share_of_all_hidden_patches_both_losses_are_one():
    task, params, batch = prepared(config(share=0.75))
    whole = jax.jit(task.predict()["reconstruction"])(params, {}, batch)
    expected = mae.masked_mse(whole["pred_BLT"], whole["target_BLT"], whole["mask_BL"])
    loss = jax.jit(lambda params, batch: task.loss(params, {}, batch, None, True)[0])
    np.testing.assert_allclose(loss(params, batch), expected, rtol=1e-5)


def test_every_parameter_learns_but_the_final_norm_of_the_encoder():
    task, params, batch = prepared(config())
    grads = jax.jit(jax.grad(lambda p: task.loss(p, {}, batch, None, True)[0]))(params)
    still = {
        optim.path_name(path)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(grad).max() > 0
    }
    assert still == {"encoder/norm/scale", "encoder/norm/bias"}


@pytest.mark.parametrize("compute", [dict(scan_unroll=2), dict(remat=True)], ids=str)
def test_unrolled_or_with_remat_it_predicts_the_same(compute):
    model, variables, patches_BLP, mask = network()
    other = crossmae.CrossMAE(SPEC, ComputeConfig(**compute))
    np.testing.assert_allclose(
        jax.jit(other.apply)(variables, patches_BLP, mask),
        jax.jit(model.apply)(variables, patches_BLP, mask),
        atol=1e-5,
    )


def test_it_does_the_same_on_a_mesh_of_three_axes():
    states, metrics = updates(config(), mesh_of(1, 1, 1), 2)
    others, again = updates(config(), mesh_of(2, 2, 2), 2)
    for one, other in zip(metrics, again, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    assert_trees_equal(states[-1].params, others[-1].params, atol=2e-4)


def test_a_run_resumes_to_the_same_bits(tmp_path):
    made = config(train_for="4 steps", log_every="1 steps")
    made.checkpoint.update(every="2 steps", keep_every="")
    made.evals = {}

    def trained():
        state = run(made, tmp_path, (1, 1, 1))
        lines = writer.read(tmp_path / "metrics.jsonl")
        return state.params, [line["train/loss"] for line in lines if "train/loss" in line]

    params, first = trained()
    shutil.rmtree(tmp_path / "checkpoints/4")
    again, second = trained()
    assert len(first) == 4 and first == second
    assert_trees_equal(params, again)


def test_of_its_checkpoints_the_encoder_is_read_and_pictures_are_refused(tmp_path):
    params, _ = jax.jit(tasks.build(config()).init)(jax.random.key(0))
    model, loaded = mae_jax.load(save_workdir(config(), tmp_path, {"params": params}))
    assert_trees_equal(loaded, {"encoder": params["encoder"]})
    with pytest.raises(UserError, match="no decoder of the paper's kind"):
        model.reconstruct(loaded, np.zeros((1, 32, 32, 1), np.uint8), jax.random.key(0))


def test_muon_takes_the_kernels_of_its_blocks():
    params = jax.eval_shape(tasks.build(config()).init, jax.random.key(0))[0]
    numbers = optimizers.dimension_numbers(params)["decoder"]
    assert set(numbers["stack"]["blocks"]["attn"]) == {"q", "k", "v", "proj"}
    for kernel in numbers["stack"]["blocks"]["attn"].values():
        assert kernel["kernel"] is not None
    assert numbers["map_weights"] is None


def test_a_plan_counts_its_flops_and_does_not_guess_its_speed():
    task = tasks.build(config(share=0.5, maps=1))
    assert task.flops_per_example == flops.crossmae(task.spec, 4, 8, 1)
    assert plan.spec_of_mae(task) is None
    plain = tasks.build(tiny_config())
    assert plan.spec_of_mae(plain) == plain.spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(share=0.9), "decoder_share=0.9: of 16 patches 14 would be predicted, and 12 are"),
        (dict(share=0.01), "decoder_share=0.01: of 16 patches 0 would be predicted"),
        (dict(maps=4), "decoder_maps=4: an encoder of 2 blocks has 3"),
    ],
)
def test_shares_and_maps_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tasks.build(config(**changes))


def test_mask_tokens_in_the_encoder_are_refused():
    made = config()
    made.masking.tokens_in_encoder = True
    with pytest.raises(UserError, match="its own decoder; leave config.masking.tokens_in_encoder"):
        tasks.build(made)


def test_several_class_tokens_are_refused_and_options_of_blocks_are_the_encoders_alone():
    with pytest.raises(UserError, match="model.cls_tokens=4: the decoder of task crossmae reads"):
        made = config()
        made.model.cls_tokens = 4
        tasks.build(made)
    made = config()
    made.model.block = ConfigDict(dict(qk_norm=True))
    spec = tasks.build(made).spec
    assert spec.encoder.block.qk_norm and spec.decoder.block is None


def test_the_recipe_scales_its_rate_with_the_share():
    assert recipe.get_config("share=0.75").optim.blr == pytest.approx(1.5e-4)
    quarter = recipe.get_config("share=0.25,maps=6")
    assert quarter.optim.blr == pytest.approx(0.5e-4)
    assert (quarter.model.decoder_share, quarter.model.decoder_maps) == (0.25, 6)
