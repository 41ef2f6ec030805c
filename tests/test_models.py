"""Sizes, initialisation, masks, targets, and where information must not flow."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import SIZES, model_sizes
from mae_jax import flops
from mae_jax.models import mae, masking, targets
from mae_jax.models.patchify import patchify, unpatchify
from mae_jax.models.posemb import sincos_2d
from mae_jax.models.vit import ComputeConfig, Mlp, Stack, attend, grid_of

GRIDS = {"B/16": (14, 14), "L/16": (14, 14), "H/14": (16, 16)}


def build(variant, **changes):
    sizes = model_sizes(variant)
    patch = sizes.pop("patch_size")
    grid = grid_of((224, 224), patch)
    return mae.build(grid, 3 * patch[0] * patch[1], **(sizes | changes)), grid, 3 * patch[0] ** 2


def shapes(variant):
    model, grid, values = build(variant)
    patches = jnp.zeros((1, math.prod(grid), values))
    mask = masking.keep_lowest(jnp.zeros((1, math.prod(grid))), math.prod(grid) // 4)
    return jax.eval_shape(model.init, jax.random.key(0), patches, mask)["params"]


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
    params = shapes(variant)
    assert count(params["encoder"]) == encoder
    assert count(params["decoder"]) == decoder


@pytest.mark.parametrize("size", ["2B", "6.5B"])
def test_billion_scale_encoders_have_the_size_of_their_name(size):
    encoder = count(shapes(f"{size}/14")["encoder"])
    assert abs(encoder / (float(size.rstrip("B")) * 1e9) - 1) < 0.07
    width, _, heads = SIZES[size]
    assert width % heads == 0


@pytest.fixture(scope="module")
def fresh():
    """A fresh ViT-B/16, two blocks deep: initialisation does not depend on the depth."""
    model, grid, values = build("B/16", depth=2, decoder_depth=2)
    mask = masking.keep_lowest(jnp.zeros((1, math.prod(grid))), 49)
    patches = jnp.zeros((1, math.prod(grid), values))
    return jax.jit(model.init)(jax.random.key(0), patches, mask)["params"]


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
    model, grid, _ = build("B/16")
    patches = patchify(natural_images(8, 224), (16, 16))
    noise = jax.random.uniform(jax.random.key(1), (8, math.prod(grid)))
    mask = masking.keep_lowest(noise, 49)
    params = jax.jit(model.init)(jax.random.key(0), patches, mask)
    pred = jax.jit(model.apply)(params, patches, mask)
    loss = mae.masked_mse(pred, targets.norm_pixels(patches), mask.mask_BL)
    assert 1.7 < loss < 1.9


def test_hidden_pixels_do_not_reach_the_encoder_nor_visible_ones_the_loss():
    model = mae.build((4, 4), 48, width=32, depth=2, heads=4, decoder_width=16, decoder_depth=1,
                      decoder_heads=2)  # fmt: skip
    patches = jax.random.normal(jax.random.key(0), (2, 16, 48))
    mask = masking.keep_lowest(jax.random.uniform(jax.random.key(1), (2, 16)), 4)
    params = model.init(jax.random.key(2), patches, mask)
    weights = jax.random.normal(jax.random.key(3), (2, 5, 32))

    def latent(patches):
        return (weights * model.apply(params, patches, mask, method="encode")).sum()

    by_patch = np.abs(jax.grad(latent)(patches)).sum(-1)
    np.testing.assert_array_equal(by_patch > 0, np.asarray(mask.mask_BL) == 0)

    def loss(pred):
        return mae.masked_mse(pred, targets.norm_pixels(patches), mask.mask_BL)

    by_patch = np.abs(jax.grad(loss)(jnp.zeros((2, 16, 48)))).sum(-1)
    np.testing.assert_array_equal(by_patch > 0, np.asarray(mask.mask_BL) == 1)


def test_with_mask_tokens_in_the_encoder_hidden_pixels_still_reach_nothing():
    """Table 1c: every place is encoded, a hidden one as a token of the encoder's own."""
    model = mae.build((4, 4), 12, width=16, depth=2, heads=2, decoder_width=16, decoder_depth=1,
                      decoder_heads=2, tokens_in_encoder=True)  # fmt: skip
    patches = jax.random.normal(jax.random.key(0), (2, 16, 12))
    mask = masking.keep_lowest(jax.random.uniform(jax.random.key(1), (2, 16)), 4)
    params = model.init(jax.random.key(2), patches, mask)
    assert params["params"]["encoder"]["mask_token"].shape == (1, 1, 16)
    assert "mask_token" not in params["params"]["decoder"]
    assert model.apply(params, patches, mask, method=mae.MAE.encode).shape == (2, 17, 16)

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
        stack = Stack(4, 2, 4.0, ComputeConfig(scan_unroll=unroll, remat=remat))
        x = jnp.ones((2, 8, 64))
        variables = stack.init(jax.random.key(0), x)
        gradients = jax.jit(jax.grad(lambda variables: stack.apply(variables, x).sum()))
        return gradients.lower(variables).compile().cost_analysis()["flops"]

    assert flops(remat=True) > 1.1 * flops(remat=False)


def test_logits_of_any_size_give_finite_gradients():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(1e3 * rng.normal(size=(1, 8, 1, 4)), jnp.float32) for _ in range(4)]
    assert all(np.isfinite(x).all() for x in value_and_gradients(attend, jnp.float32, arrays))


def test_tokens_are_put_back_in_place():
    """The prediction does not depend on the order in which kept patches enter the encoder."""
    model = mae.build((4, 4), 48, width=32, depth=2, heads=4, decoder_width=16, decoder_depth=1,
                      decoder_heads=2)  # fmt: skip
    patches = jax.random.normal(jax.random.key(0), (2, 16, 48))
    noise = jax.random.uniform(jax.random.key(1), (2, 16))
    shuffled = masking.keep_lowest(noise, 4)
    in_order = masking.keep_lowest(shuffled.mask_BL, 4)
    assert not np.array_equal(shuffled.keep_BK, in_order.keep_BK)
    params = model.init(jax.random.key(2), patches, shuffled)
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


@pytest.mark.parametrize("strategy", [masking.random, masking.block, masking.grid])
def test_every_strategy_hides_as_many_patches_in_each_image(strategy):
    score = strategy(jax.random.key(0), 32, (14, 14), 0.75)
    mask = masking.keep_lowest(score, 49).mask_BL
    np.testing.assert_array_equal(mask.sum(1), 147)
    if strategy is not masking.grid:
        assert len(np.unique(mask, axis=0)) == 32


def test_random_masks_hide_every_patch_equally_often():
    score = masking.random(jax.random.key(0), 4000, (14, 14), 0.75)
    often = np.asarray(masking.keep_lowest(score, 49).mask_BL).mean(0)
    assert np.abs(often - 0.75).max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_grid_masks_keep_one_of_every_two_by_two():
    mask = masking.keep_lowest(masking.grid(jax.random.key(0), 2, (14, 14), 0.75), 49).mask_BL
    kept = 1 - np.asarray(mask).reshape(2, 7, 2, 7, 2)
    np.testing.assert_array_equal(kept.sum((2, 4)), 1)
    with pytest.raises(ValueError, match="2 x 2"):
        masking.grid(jax.random.key(0), 2, (14, 14), 0.5)


def test_block_masks_hide_larger_regions_than_random_ones():
    def same_neighbours(strategy):
        score = strategy(jax.random.key(0), 64, (14, 14), 0.5)
        mask = np.asarray(masking.keep_lowest(score, 98).mask_BL).reshape(64, 14, 14)
        return (mask[:, 1:] == mask[:, :-1]).mean()

    assert same_neighbours(masking.block) > 0.8
    assert abs(same_neighbours(masking.random) - 0.5) < 0.03


def test_patchify_orders_row_column_channel_and_unpatchify_inverts_it():
    images = jnp.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    patches = patchify(images, (3, 2))
    assert patches.shape == (2, 8, 18)
    np.testing.assert_array_equal(patches[0, 5], images[0, 3:6, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, (3, 2), (2, 4)), images)


def test_normalised_targets_use_the_unbiased_variance_with_epsilon_inside():
    patches = np.random.default_rng(0).normal(3, 2, (2, 4, 48)).astype(np.float32)
    expected = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(
        patches.var(-1, ddof=1, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(targets.norm_pixels(jnp.asarray(patches)), expected, rtol=1e-4)
    np.testing.assert_array_equal(targets.norm_pixels(jnp.full((1, 1, 48), 7.0)), 0)


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
    grid = grid_of((32, 48), (8, 4))
    assert grid == (4, 12)
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 5))
    patches = patchify(images, (8, 4))
    model = mae.build(grid, 160, width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1,
                      decoder_heads=2)  # fmt: skip
    mask = masking.keep_lowest(jax.random.uniform(jax.random.key(1), (2, 48)), 12)
    params = model.init(jax.random.key(2), patches, mask)
    pred = model.apply(params, patches, mask)
    assert unpatchify(pred, (8, 4), grid).shape == images.shape


@pytest.mark.parametrize(("image", "patch"), [((225, 224), (16, 16)), ((8, 8), (16, 16))])
def test_an_image_of_no_whole_number_of_patches_is_refused(image, patch):
    with pytest.raises(ValueError, match="whole number of patches"):
        grid_of(image, patch)


# Multiply-adds of the official model: the full image, and the decoder
@pytest.mark.parametrize(
    ("variant", "full", "decoder"),
    [("B/16", 17.56, 5.37), ("L/16", 61.55, 5.38), ("H/14", 167.3, 7.13)],
)
def test_analytic_flops_agree_with_the_published_counts(variant, full, decoder):
    sizes = model_sizes(variant)
    patch = sizes.pop("patch_size")
    rows, cols = GRIDS[variant]
    tokens, values, kept = rows * cols, 3 * patch[0] ** 2, rows * cols // 4
    width, depth = sizes["width"], sizes["depth"]
    assert abs(flops.encoder(tokens, values, width, depth) / 2e9 / full - 1) < 1e-3
    whole = flops.mae(
        tokens, kept, values, width=width, depth=depth, decoder_width=512, decoder_depth=8
    )
    rest = whole - flops.encoder(kept, values, width, depth)
    assert abs(rest / 2e9 / decoder - 1) < 1e-3


# Table 1c of the paper: 3.3 times the FLOPs at L/16
def test_mask_tokens_in_the_encoder_cost_what_the_paper_says():
    sizes = dict(width=1024, depth=24, decoder_width=512, decoder_depth=8)
    ratio = flops.mae(196, 196, 768, **sizes) / flops.mae(196, 49, 768, **sizes)
    assert abs(ratio / 3.3 - 1) < 0.02


def test_analytic_flops_agree_with_the_compiled_program():
    """With every block unrolled, since XLA counts a scanned body once."""
    sizes = dict(width=1024, depth=2, decoder_width=512, decoder_depth=2)
    model = mae.build((8, 8), 192, heads=4, decoder_heads=4, compute=ComputeConfig(scan_unroll=2),
                      **sizes)  # fmt: skip
    patches = jnp.zeros((4, 64, 192))
    mask = masking.keep_lowest(jax.random.uniform(jax.random.key(0), (4, 64)), 16)
    params = jax.eval_shape(model.init, jax.random.key(0), patches, mask)
    compiled = jax.jit(model.apply).lower(params, patches, mask).compile()
    ours = 4 * flops.mae(64, 16, 192, **sizes)
    # XLA counts softmax, GELU and LayerNorm too: a few per cent at these widths
    assert 0.95 < ours / compiled.cost_analysis()["flops"] < 1.0
