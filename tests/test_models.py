"""Sizes, initialisation, masks, targets, and where information must not flow."""

import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import SIZES, model_sizes
from mae_jax import flops
from mae_jax.models import mae, masking, masks, targets
from mae_jax.models.attention import attend
from mae_jax.models.block import Mlp
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.patchify import patchify, unpatchify
from mae_jax.models.posemb import sincos_2d
from mae_jax.models.spec import ModelSpec, ViTSpec, patch_grid
from mae_jax.models.vit import Encoder, Stack

TINY = ModelSpec((16, 16), (4, 4), 3, ViTSpec(32, 2, 4, 128), ViTSpec(16, 1, 2, 64))


def published(variant, depth=None, decoder_depth=8):
    sizes = model_sizes(variant)
    width = sizes["width"]
    encoder = ViTSpec(width, depth or sizes["depth"], sizes["heads"], 4 * width)
    decoder = ViTSpec(512, decoder_depth, 16, 4 * 512)
    return ModelSpec((224, 224), sizes["patch_size"], 3, encoder, decoder)


def inputs(spec, batch=1, kept=None):
    """Patches and a mask to initialise or apply a masked autoencoder with."""
    kept = kept or spec.num_patches // 4
    score = jax.random.uniform(jax.random.key(1), (batch, spec.num_patches))
    patches = jax.random.normal(jax.random.key(0), (batch, spec.num_patches, spec.patch_dim))
    return patches, masking.keep_lowest(score, kept)


def tiny(spec=TINY, batch=2, **compute):
    """A masked autoencoder, its variables, and patches with their mask."""
    model, (patches, mask) = mae.MAE(spec, ComputeConfig(**compute)), inputs(spec, batch)
    return model, model.init(jax.random.key(2), patches, mask), patches, mask


def shapes(spec):
    model = mae.MAE(spec)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs(spec)))["params"]


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# MAE's official implementation, counted: encoder, decoder (without the fixed position tables)
@pytest.mark.parametrize(
    ("variant", "encoder", "decoder"),
    [
        ("B/16", 85_647_360, 26_008_320),
        ("L/16", 303_099_904, 26_139_392),
        ("H/14", 630_435_840, 26_178_124),
    ],
)
def test_parameter_counts_are_the_official_ones(variant, encoder, decoder):
    params = shapes(published(variant))
    assert count(params["encoder"]) == encoder
    assert count(params["decoder"]) == decoder


@pytest.mark.parametrize("size", ["2B", "6.5B"])
def test_billion_scale_encoders_have_the_size_of_their_name(size):
    encoder = count(shapes(published(f"{size}/14"))["encoder"])
    assert abs(encoder / (float(size.rstrip("B")) * 1e9) - 1) < 0.07
    width, _, heads = SIZES[size]
    assert width % heads == 0


@pytest.fixture(scope="module")
def fresh():
    """A fresh ViT-B/16, two blocks deep: initialisation does not depend on the depth."""
    spec = published("B/16", depth=2, decoder_depth=2)
    return jax.jit(mae.MAE(spec).init)(jax.random.key(0), *inputs(spec))["params"]


# Bounds of Xavier on the official matrices; the qkv bound is that of the fused (3D, D) matrix
UNIFORM = {
    "encoder/patch_embed/kernel": math.sqrt(6 / (768 + 768)),
    "encoder/patch_embed/bias": 1 / math.sqrt(768),
    "encoder/stack/blocks/attn/qkv/kernel": math.sqrt(6 / (4 * 768)),
    "encoder/stack/blocks/attn/proj/kernel": math.sqrt(6 / (2 * 768)),
    "encoder/stack/blocks/mlp/fc1/kernel": math.sqrt(6 / (5 * 768)),
    "encoder/stack/blocks/mlp/fc2/kernel": math.sqrt(6 / (5 * 768)),
    "decoder/embed/kernel": math.sqrt(6 / (768 + 512)),
    "decoder/stack/blocks/attn/qkv/kernel": math.sqrt(6 / (4 * 512)),
    "decoder/stack/blocks/attn/proj/kernel": math.sqrt(6 / (2 * 512)),
    "decoder/stack/blocks/mlp/fc1/kernel": math.sqrt(6 / (5 * 512)),
    "decoder/stack/blocks/mlp/fc2/kernel": math.sqrt(6 / (5 * 512)),
    "decoder/pred/kernel": math.sqrt(6 / (512 + 768)),
}
NORMAL = ("encoder/cls_token", "decoder/mask_token")


def test_every_tensor_starts_as_the_official_one(fresh):
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        name = "/".join(key.key for key in path)
        value = np.asarray(leaf, np.float64)
        if name in UNIFORM:
            bound = UNIFORM[name]
            assert np.abs(value).max() <= bound * (1 + 1e-6), name
            assert np.abs(value).max() > bound * (0.98 if value.size < 1000 else 0.999), name
            assert abs(value.std() * math.sqrt(3) / bound - 1) < 6 / math.sqrt(value.size), name
            assert abs(value.mean()) < 4 * bound / math.sqrt(3 * value.size), name
        elif name in NORMAL:
            assert abs(value.std() / 0.02 - 1) < 0.15, name
            assert np.abs(value).max() > 0.04, name  # not uniform
        elif name.endswith("scale"):
            assert np.all(value == 1), name
        else:
            assert name.endswith("bias") and np.all(value == 0), name
    kernel = fresh["encoder"]["stack"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])  # each block is drawn for itself


def natural_images(batch, size, seed=0):
    """Images with the 1/f spectrum of photographs, standardised."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1 / size
    spectrum = np.fft.fft2(rng.normal(size=(batch, 3, size, size))) / frequency
    images = np.fft.ifft2(spectrum).real.transpose(0, 2, 3, 1)
    return jnp.asarray((images - images.mean()) / images.std(), jnp.float32)


def test_first_loss_of_a_fresh_b16_is_about_1_8():
    spec, images = published("B/16"), natural_images(8, 224)
    model, patches = mae.MAE(spec), patchify(images, spec.patch_size)
    _, mask = inputs(spec, batch=8)
    params = jax.jit(model.init)(jax.random.key(0), patches, mask)
    pred = jax.jit(model.apply)(params, patches, mask)
    target = targets.norm_pixels(images, spec.patch_size)
    assert 1.7 < mae.masked_mse(pred, target, mask.mask_BL) < 1.9


def test_hidden_pixels_do_not_reach_the_encoder_nor_visible_ones_the_loss():
    model, params, patches, mask = tiny()
    weights = jax.random.normal(jax.random.key(3), (2, 5, 32))

    def latent(patches):
        return (weights * model.apply(params, patches, mask, method="encode")).sum()

    by_patch = np.abs(jax.grad(latent)(patches)).sum(-1)
    np.testing.assert_array_equal(by_patch > 0, np.asarray(mask.mask_BL) == 0)

    def loss(pred):
        return mae.masked_mse(pred, patches, mask.mask_BL)

    by_patch = np.abs(jax.grad(loss)(jnp.zeros((2, 16, 48)))).sum(-1)
    np.testing.assert_array_equal(by_patch > 0, np.asarray(mask.mask_BL) == 1)


def test_with_mask_tokens_in_the_encoder_hidden_pixels_still_reach_nothing():
    """Table 1c: every place is encoded, a hidden one as a token of the encoder's own."""
    model, params, patches, mask = tiny(replace(TINY, tokens_in_encoder=True))
    assert params["params"]["encoder"]["mask_token"].shape == (1, 1, 32)
    assert "mask_token" not in params["params"]["decoder"]
    assert model.apply(params, patches, mask, method="encode").shape == (2, 17, 32)

    other = jnp.where(mask.mask_BL[..., None] > 0, patches + 1, patches)
    predict = jax.jit(model.apply)
    np.testing.assert_array_equal(predict(params, patches, mask), predict(params, other, mask))
    # A visible patch reaches the prediction of every place.
    seen = predict(params, patches.at[0, mask.keep_BK[0, 0]].add(1), mask)
    assert (np.abs(seen - predict(params, patches, mask))[0] > 0).any(-1).all()


def plain_attention(q, k, v):
    """As JAX differentiates it: softmax in float32, its weights in the type of `v`."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(product("bnsf,bmsf->bsnm", q, k) * q.shape[-1] ** -0.5)
    return product("bsnm,bmsf->bnsf", weight.astype(v.dtype), v).astype(v.dtype)


def value_and_gradients(attention, dtype, arrays):
    *qkv, grad = (x.astype(dtype) for x in arrays)
    y, back = jax.vjp(attention, *qkv)
    assert y.dtype == dtype and all(x.dtype == dtype for x in back(grad))
    return [np.asarray(x, np.float32) for x in (y, *back(grad))]


@pytest.mark.parametrize("spread", [0.1, 1, 4])
def test_attention_and_its_own_backward_pass_are_those_of_jax(spread):
    rng = np.random.default_rng(0)
    drawn = [spread * rng.normal(size=(2, 50, 3, 16)) for _ in range(4)]
    arrays = [jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in drawn]
    with jax.default_matmul_precision("highest"):
        exact = value_and_gradients(plain_attention, jnp.float32, arrays)
        for own, theirs in zip(
            value_and_gradients(attend, jnp.float32, arrays), exact, strict=True
        ):
            np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
        # In bfloat16 what is rounded differs, and is not to lose more than a third on the whole.
        own = value_and_gradients(attend, jnp.bfloat16, arrays)
        plain = value_and_gradients(plain_attention, jnp.bfloat16, arrays)
    for ours, theirs, right in zip(own, plain, exact, strict=True):
        lost = np.square(ours - right).mean() / np.square(theirs - right).mean()
        assert lost**0.5 < 4 / 3


def test_attention_keeps_its_weights_in_the_type_of_the_values():
    q = jnp.ones((2, 50, 3, 16), jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(attend, q, q, q)[1])
    large = [x.dtype for x in kept if x.size >= 2 * 3 * 50 * 50]
    assert large == [jnp.bfloat16]


def test_an_mlp_keeps_one_array_as_wide_as_its_hidden_layer():
    mlp = Mlp(400, ComputeConfig(dtype=jnp.bfloat16))
    x = jnp.ones((2, 5, 100), jnp.bfloat16)
    variables = mlp.init(jax.random.key(0), x)
    kept = jax.tree.leaves(jax.vjp(mlp.apply, variables, x)[1])
    assert [k.dtype for k in kept if k.shape == (2, 5, 400)] == [jnp.bfloat16]


@pytest.mark.parametrize("unroll", [1, 4])
def test_remat_computes_the_blocks_again_also_where_no_loop_is_left(unroll):
    """XLA merges what is computed twice in one computation, unless it is kept from it."""

    def flops(remat: bool) -> float:
        compute = ComputeConfig(scan_unroll=unroll, remat=remat)
        stack, x = Stack(ViTSpec(64, 4, 2, 256), compute), jnp.ones((2, 8, 64))
        variables = stack.init(jax.random.key(0), x)
        gradients = jax.jit(jax.grad(lambda variables: stack.apply(variables, x)[0].sum()))
        return gradients.lower(variables).compile().cost_analysis()["flops"]

    assert flops(remat=True) > 1.1 * flops(remat=False)


def test_logits_of_any_size_give_finite_gradients():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(1e3 * rng.normal(size=(1, 8, 1, 4)), jnp.float32) for _ in range(4)]
    assert all(np.isfinite(x).all() for x in value_and_gradients(attend, jnp.float32, arrays))


def test_tokens_are_put_back_in_place():
    """The prediction does not depend on the order in which kept patches enter the encoder."""
    model, params, patches, shuffled = tiny()
    in_order = masking.keep_lowest(shuffled.mask_BL, 4)
    assert not np.array_equal(shuffled.keep_BK, in_order.keep_BK)
    np.testing.assert_allclose(
        model.apply(params, patches, shuffled), model.apply(params, patches, in_order), atol=1e-5
    )


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [(196, 0.75, 49), (256, 0.75, 64), (100, 0.8, 19), (100, 0.9, 9), (400, 0.8, 79),
     (196, 0.6, 78), (196, 0.8, 39), (196, 0.85, 29), (196, 0.9, 19), (256, 0.8, 51),
     (256, 0.9, 25)],
)  # fmt: skip
def test_number_of_kept_patches_is_truncated_as_officially(patches, ratio, kept):
    assert masking.num_kept(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.999, -0.5, 1.5])
def test_a_ratio_that_keeps_or_hides_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        masking.num_kept(196, ratio)


@pytest.mark.parametrize("strategy", [masking.random, masks.block, masks.grid])
def test_every_strategy_hides_as_many_patches_in_each_image(strategy):
    score = strategy(jax.random.key(0), 32, (14, 14), 0.75)
    mask = masking.keep_lowest(score, 49).mask_BL
    np.testing.assert_array_equal(mask.sum(1), 147)
    if strategy is not masks.grid:
        assert len(np.unique(mask, axis=0)) == 32


def test_random_masks_hide_every_patch_equally_often():
    score = masking.random(jax.random.key(0), 4000, (14, 14), 0.75)
    often = np.asarray(masking.keep_lowest(score, 49).mask_BL).mean(0)
    assert np.abs(often - 0.75).max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_grid_masks_keep_one_of_every_two_by_two():
    mask = masking.keep_lowest(masks.grid(jax.random.key(0), 2, (14, 14), 0.75), 49).mask_BL
    kept = 1 - np.asarray(mask).reshape(2, 7, 2, 7, 2)
    np.testing.assert_array_equal(kept.sum((2, 4)), 1)
    with pytest.raises(ValueError, match="2 x 2"):
        masks.grid(jax.random.key(0), 2, (14, 14), 0.5)


def test_block_masks_hide_larger_regions_than_random_ones():
    def same_neighbours(strategy):
        score = strategy(jax.random.key(0), 64, (14, 14), 0.5)
        mask = np.asarray(masking.keep_lowest(score, 98).mask_BL).reshape(64, 14, 14)
        return (mask[:, 1:] == mask[:, :-1]).mean()

    assert same_neighbours(masks.block) > 0.8
    assert abs(same_neighbours(masking.random) - 0.5) < 0.03


def test_patchify_orders_row_column_channel_and_unpatchify_inverts_it():
    images = jnp.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    patches = patchify(images, (3, 2))
    assert patches.shape == (2, 8, 18)
    np.testing.assert_array_equal(patches[0, 5], images[0, 3:6, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, (3, 2), (2, 4)), images)


def test_normalised_targets_use_the_unbiased_variance_with_epsilon_inside():
    images = np.random.default_rng(0).normal(3, 2, (2, 8, 8, 3)).astype(np.float32)
    patches = np.asarray(patchify(images, (4, 4)))
    expected = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(
        patches.var(-1, ddof=1, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(targets.norm_pixels(images, (4, 4)), expected, rtol=1e-4)
    np.testing.assert_array_equal(targets.norm_pixels(jnp.full((1, 4, 4, 3), 7.0), (4, 4)), 0)
    np.testing.assert_array_equal(targets.pixels(images, (4, 4)), patches)


# Sums of the official tables and single entries, in float64
@pytest.mark.parametrize(
    ("width", "side", "total"),
    [(768, 14, 69594.4938), (1024, 14, 92849.1979), (1280, 16, 149578.4058),
     (512, 14, 46340.3331), (512, 16, 59700.6785)],
)  # fmt: skip
def test_position_tables_have_the_official_sums(width, side, total):
    table = sincos_2d(width, (side, side))
    assert abs(table.sum(dtype=np.float64) - total) < 1e-2
    assert not table[0].any()


def test_first_half_of_the_positions_encodes_the_column():
    table = sincos_2d(768, (14, 14))
    expected = [0.84147096, 0.81525064, 0.78859305]
    np.testing.assert_allclose(table[2, :3], expected, rtol=1e-6)  # row 0, column 1
    np.testing.assert_allclose(table[15, 384:387], expected, rtol=1e-6)  # row 1, column 0
    np.testing.assert_allclose(table[-1, :3], [0.42016703, -0.1743702, -0.68575615], rtol=1e-5)


def test_non_square_images_and_patches_and_other_channels_work():
    five = (0.5,) * 5
    spec = replace(TINY, image_size=(32, 48), patch_size=(8, 4), channels=5, mean=five, std=five,
                   target_dim=0)  # fmt: skip
    assert (spec.grid, spec.patch_dim) == ((4, 12), 160)
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 5))
    _, mask = inputs(spec, batch=2)
    model, patches = mae.MAE(spec), patchify(images, (8, 4))
    pred = model.apply(model.init(jax.random.key(2), patches, mask), patches, mask)
    assert unpatchify(pred, (8, 4), spec.grid).shape == images.shape


def test_a_decoder_predicts_targets_of_another_width_than_a_patch():
    model, params, patches, mask = tiny(replace(TINY, target_dim=108))
    assert model.apply(params, patches, mask).shape == (2, 16, 108)


@pytest.mark.parametrize(("image", "patch"), [((225, 224), (16, 16)), ((8, 8), (16, 16))])
def test_an_image_of_no_whole_number_of_patches_is_refused(image, patch):
    with pytest.raises(ValueError, match="whole number of patches"):
        patch_grid(image, patch)


def test_an_unrolled_network_starts_in_a_loop_with_the_parameters_of_a_scanned_one():
    """Initialising an unrolled L/16 would compile for half a minute."""
    scanned, unrolled = (mae.MAE(TINY, ComputeConfig(scan_unroll=n)) for n in (1, 2))
    batch = inputs(TINY)
    ours, theirs = (model.init(jax.random.key(0), *batch) for model in (unrolled, scanned))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    def unrolled_by(function, *arguments):
        return set(re.findall(r"unroll=(\d+)", str(jax.make_jaxpr(function)(*arguments))))

    assert unrolled_by(unrolled.init, jax.random.key(0), *batch) == {"1"}
    assert unrolled_by(unrolled.apply, theirs, *batch) == {"2"}


@pytest.mark.parametrize("compute", [{}, {"scan_unroll": 2}, {"remat": True}], ids=str)
def test_the_tokens_of_blocks_are_those_of_encoders_that_end_there(compute):
    compute = ComputeConfig(**compute)
    network, (patches, _) = Encoder(TINY, compute), inputs(TINY, batch=2)
    params = network.init(jax.random.key(0), patches)["params"]
    last, blocks = network.apply({"params": params}, patches, return_blocks=True)
    np.testing.assert_array_equal(last, network.apply({"params": params}, patches))
    assert blocks.shape == (3, *last.shape)
    for depth in (1, 2):
        spec = replace(TINY, encoder=replace(TINY.encoder, depth=depth))
        stack = jax.tree.map(lambda x, depth=depth: x[:depth], params["stack"])
        shorter = Encoder(spec, compute, final_norm=False)
        tokens = shorter.apply({"params": params | {"stack": stack}}, patches)
        np.testing.assert_allclose(blocks[depth], tokens, atol=1e-6)
    np.testing.assert_allclose(  # what enters the first block: embedding and positions
        blocks[0, :, 1:],
        patches @ params["patch_embed"]["kernel"]
        + params["patch_embed"]["bias"]
        + sincos_2d(TINY.encoder.width, TINY.grid)[1:],
        atol=1e-5,
    )


# Multiply-adds of the official model: the full image, and the decoder
@pytest.mark.parametrize(
    ("variant", "full", "decoder"),
    [("B/16", 17.56, 5.37), ("L/16", 61.55, 5.38), ("H/14", 167.3, 7.13)],
)
def test_analytic_flops_agree_with_the_published_counts(variant, full, decoder):
    spec = published(variant)
    kept = spec.num_patches // 4
    assert abs(flops.encoder(spec) / 2e9 / full - 1) < 1e-3
    rest = flops.mae(spec, kept) - flops.encoder(spec, kept)
    assert abs(rest / 2e9 / decoder - 1) < 1e-3


# Table 1c of the paper: 3.3 times the FLOPs at L/16
def test_mask_tokens_in_the_encoder_cost_what_the_paper_says():
    spec = published("L/16")
    ratio = flops.mae(replace(spec, tokens_in_encoder=True), 49) / flops.mae(spec, 49)
    assert abs(ratio / 3.3 - 1) < 0.02


def test_analytic_flops_agree_with_the_compiled_program():
    """With every block unrolled, since XLA counts a scanned body once."""
    encoder, decoder = ViTSpec(1024, 2, 4, 4096), ViTSpec(512, 2, 4, 2048)
    spec = ModelSpec((64, 64), (8, 8), 3, encoder, decoder)
    model, (patches, mask) = mae.MAE(spec, ComputeConfig(scan_unroll=2)), inputs(spec, batch=4)
    params = jax.eval_shape(model.init, jax.random.key(0), patches, mask)
    compiled = jax.jit(model.apply).lower(params, patches, mask).compile()
    ours = 4 * flops.mae(spec, 16)
    # XLA counts softmax, GELU and LayerNorm too: a few per cent at these widths
    assert 0.95 < ours / compiled.cost_analysis()["flops"] < 1.0
