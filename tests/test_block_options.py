"""Options of blocks (config.model.block): what only each of them does; off is as before."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict
from tiny import (
    assert_trees_equal,
    finetune_config,
    fresh_state,
    load_encoder_into,
    mesh_of,
    probe_config,
    random_params,
    run,
    save_workdir,
    tiny_config,
    updates,
)

import mae_jax
from mae_jax import flops, layer_decay, optim, tasks
from mae_jax.configs import finetune, vit5
from mae_jax.errors import UserError
from mae_jax.interop import described, write
from mae_jax.interop import open as weights
from mae_jax.models import classifier, mae, masking, modern
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.spec import ModelSpec, ViTSpec
from mae_jax.models.vit import Encoder

WIDTH, GRID = 16, (4, 4)
PATCHES = jax.random.normal(jax.random.key(5), (2, 16, 12))
OFF = dict(registers=0, qk_norm=False, layer_scale=0.0, norm="layer", rope=0.0, eps=1e-6)
ALL = vit5.get_config().model.block.to_dict() | {"layer_scale": 0.5, "eps": 1e-5}


def spec_with(**options) -> ModelSpec:
    block = BlockOptions.from_config(options)
    return ModelSpec((8, 8), (2, 2), 3, ViTSpec(WIDTH, 2, 2, 32, block=block))


def encoder_with(seed=0, **options):
    """An encoder and parameters of it that are all random, so that none is hidden by a zero."""
    encoder = Encoder(spec_with(**options))
    return encoder, random_params(encoder.init, PATCHES, seed=seed)


def encode(encoder, params, *args, **kwargs):
    return jax.jit(partial(encoder.apply, **kwargs))({"params": params}, *args)


def changed(params, change, *path):
    """Return parameters with the array at a path changed."""
    (name, *rest) = path
    inner = changed(params[name], change, *rest) if rest else change(params[name])
    return {**params, name: inner}


def paths(tree):
    return {optim.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def config_with(**options) -> ConfigDict:
    config = tiny_config()
    config.evals = ConfigDict()
    config.model.block = ConfigDict(options)
    return config


# Off.


def test_options_that_are_all_off_are_the_same_network_and_the_same_program():
    plain = tiny_config()
    tasks_of = [tasks.build(config) for config in (plain, config_with(**OFF))]
    specs = [task.spec for task in tasks_of]
    assert specs[0] == specs[1]
    assert specs[0].encoder.block is specs[0].decoder.block is None
    params, extra = jax.eval_shape(tasks_of[0].init, jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
        for name, x in tasks_of[0].examples.inputs.items()
    }

    def program(task):
        def loss(params, batch):
            prepared = task.prepare(batch, lambda _: jax.random.key(0))
            return task.loss(params, extra, prepared, jax.random.key, True)[0]

        return jax.jit(jax.grad(loss)).lower(params, batch).as_text()

    assert program(tasks_of[0]) == program(tasks_of[1])
    assert program(tasks_of[0]) != program(tasks.build(config_with(rope=100.0)))


@pytest.mark.parametrize("name", OFF)
def test_an_option_adds_its_own_parameters_and_no_other(name):
    plain, _ = encoder_with()
    encoder = Encoder(spec_with(**{name: ALL[name]}))
    shapes = [
        jax.eval_shape(x.init, jax.random.key(0), PATCHES)["params"] for x in (plain, encoder)
    ]
    new, gone = paths(shapes[1]) - paths(shapes[0]), paths(shapes[0]) - paths(shapes[1])
    blocks = "stack/blocks"
    assert (new, gone) == {
        "registers": ({"register_token"}, set()),
        "qk_norm": ({f"{blocks}/attn/{x}_norm/scale" for x in "qk"}, set()),
        "layer_scale": ({f"{blocks}/scale{i}/scale" for i in (1, 2)}, set()),
        "norm": (set(), {"norm/bias", *(f"{blocks}/norm{i}/bias" for i in (1, 2))}),
        "rope": (set(), set()),
        "eps": (set(), set()),
    }[name]


# On: what only each of them does.


def test_registers_are_seen_by_patches_and_are_in_no_feature():
    encoder, params = encoder_with(registers=3)
    tokens, blocks = encode(encoder, params, PATCHES, return_blocks=True)
    assert tokens.shape == (2, 1 + 16, WIDTH)
    assert blocks.shape == (3, 2, 1 + 16, WIDTH)
    np.testing.assert_array_equal(encode(encoder, params, PATCHES), tokens)
    permuted = changed(params, lambda x: x[:, ::-1], "register_token")  # they have no position
    np.testing.assert_allclose(encode(encoder, permuted, PATCHES), tokens, atol=1e-5)
    other = changed(params, jnp.square, "register_token")
    assert np.abs(encode(encoder, other, PATCHES) - tokens).max() > 1e-2


def test_registers_stay_out_of_the_decoder():
    params, _ = jax.eval_shape(tasks.build(config_with(**ALL)).init, jax.random.key(0))
    assert params["encoder"]["register_token"].shape == (1, 4, 32)
    assert not [path for path in paths(params["decoder"]) if "register" in path]
    assert "decoder/stack/blocks/attn/q_norm/scale" in paths(params)


@pytest.mark.parametrize("on", [True, False])
def test_with_qk_norm_the_scale_of_queries_changes_nothing(on):
    encoder, params = encoder_with(qk_norm=on, rope=100.0)
    tokens = encode(encoder, params, PATCHES)
    for name in ("kernel", "bias"):
        at = ("stack", "blocks", "attn", "qkv", name)
        axis = 2 if name == "kernel" else 1
        params = changed(params, lambda x, axis=axis: x * ten(x, axis), *at)
    difference = np.abs(encode(encoder, params, PATCHES) - tokens).max()
    assert difference < 1e-4 if on else difference > 1e-1


def ten(x, axis):
    """Return 10 for queries and 1 for keys and values; `axis` is that of the three."""
    return jnp.array([10.0, 1.0, 1.0]).reshape(3, *[1] * (x.ndim - axis - 1))


def test_layer_scale_of_0_is_the_identity_and_of_1_the_block_without():
    encoder, params = encoder_with(layer_scale=0.5)

    def scaled(value):
        blocks = params["stack"]["blocks"]
        scales = {name: jax.tree.map(lambda x: 0 * x + value, blocks[name]) for name in SCALES}
        return changed(params, lambda x: x | scales, "stack", "blocks")

    _, blocks = encode(encoder, scaled(0), PATCHES, return_blocks=True)
    np.testing.assert_array_equal(blocks[-1], blocks[0])
    plain, _ = encoder_with()
    without = changed(
        params, lambda x: {k: v for k, v in x.items() if k not in SCALES}, "stack", "blocks"
    )
    np.testing.assert_allclose(
        encode(encoder, scaled(1), PATCHES), encode(plain, without, PATCHES), atol=1e-5
    )
    fresh = jax.jit(encoder.init)(jax.random.key(0), PATCHES)["params"]["stack"]["blocks"]
    assert all((fresh[name]["scale"] == 0.5).all() for name in SCALES)


SCALES = ("scale1", "scale2")


@pytest.mark.parametrize(("kind", "seen"), [("rms", 3.0), ("layer", 0.0)])
def test_rms_norm_does_not_see_the_scale_and_sees_a_shift(kind, seen):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.float32)
    norm = modern.norm("norm", BlockOptions(norm=kind))
    params = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(norm.apply(params, 7 * x), norm.apply(params, x), atol=1e-4)
    shifted = np.mean(norm.apply(params, x + 3) - norm.apply(params, x))
    assert shifted == pytest.approx(seen / np.sqrt(10) if seen else 0, abs=0.1)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_eps_is_added_to_the_variance(kind):
    x = jnp.array([[1e-3, -1e-3]])  # of variance 1e-6
    for eps, wanted in ((1e-6, 0.5**0.5), (3e-6, 0.5)):
        norm = modern.norm("norm", BlockOptions(norm=kind, eps=eps))
        y, params = norm.init_with_output(jax.random.key(0), x)
        np.testing.assert_allclose(y, [[wanted, -wanted]], rtol=1e-5)
        gradient = jax.grad(lambda x, norm=norm, p=params: norm.apply(p, x)[0, 0])(x)

        def number(x, eps=eps):
            m = x.mean() if kind == "layer" else 0
            return ((x - m) / jnp.sqrt(jnp.square(x - m).mean() + eps))[0, 0]

        np.testing.assert_allclose(gradient, jax.grad(number)(x), rtol=1e-5)


def test_rms_norm_is_its_formula():
    x = np.random.default_rng(0).normal(size=(2, 3, 8))
    scale = np.arange(8.0)
    ours = modern.RMSNorm().apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
    theirs = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


HEAD = 16


def logits(table_LG, shift=None):
    """Logits (S, L, L) of the same query and key at all places of the grid."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, HEAD)), jnp.float32) for _ in range(2))
    angle_BNG = jnp.asarray(table_LG)[None] + (0 if shift is None else shift)
    q, k = (
        modern.rotate(jnp.broadcast_to(x, (1, len(table_LG), 2, HEAD)), angle_BNG) for x in (q, k)
    )
    return np.einsum("bnsf,bmsf->snm", q, k)


def test_rotary_logits_depend_on_the_offset_of_two_patches_alone():
    table_LG = modern.rotary_angles(HEAD, (3, 4), 100.0)
    x = logits(table_LG).reshape(2, 3, 4, 3, 4)
    np.testing.assert_allclose(x[:, 0, 0, 1, 2], x[:, 1, 1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(x[:, 2, 1, 0, 0], x[:, 2, 3, 0, 2], atol=1e-5)
    assert np.abs(x[:, 0, 0, 1, 2] - x[:, 0, 0, 2, 1]).min() > 1e-3
    shifted = logits(table_LG, 0.7 * (table_LG[1] - table_LG[0]) - table_LG[5])
    np.testing.assert_allclose(shifted.reshape(x.shape), x, atol=1e-5)


def test_rotary_angles_are_those_of_dinov3():
    table_LG = modern.rotary_angles(HEAD, (3, 4), 100.0)
    assert table_LG.shape == (12, HEAD // 2)
    row, column = 2, 1  # centres of three rows and four columns, from -1 to 1
    y, x = 2 * (row + 0.5) / 3 - 1, 2 * (column + 0.5) / 4 - 1
    periods = [100.0 ** (4 * k / HEAD) for k in range(HEAD // 4)]
    wanted = [2 * np.pi * c / period for c in (y, x) for period in periods]
    np.testing.assert_allclose(table_LG[row * 4 + column], wanted, rtol=1e-5)
    larger = modern.rotary_angles(HEAD, (9, 12), 100.0)  # each patch is nine now
    np.testing.assert_allclose(larger[7 * 12 + 4], wanted, rtol=1e-5)


def test_only_patches_are_turned_and_a_turn_keeps_lengths():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 2, HEAD)), jnp.float32)
    vit = ViTSpec(2 * HEAD, 1, 2, 4, block=BlockOptions(rope=100.0))
    turned = modern.rotate(x, modern.extra(None, vit, GRID).angle_BNG)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), 1e-5)
    np.testing.assert_array_equal(turned[:, [0, 17, 18, 19]], x[:, [0, 17, 18, 19]])
    assert (np.abs(turned - x).max((0, 2, 3))[1:17] > 1e-3).all()
    np.testing.assert_allclose(modern.rotate(x, jnp.zeros((1, 17, HEAD // 2))), x, atol=1e-6)


@pytest.mark.parametrize("options", [dict(rope=100.0), ALL], ids=["rope", "all"])
def test_kept_patches_take_their_own_rows_of_the_table(options):
    encoder, params = encoder_with(**options)
    keep_BK = jnp.array([[3, 9, 14, 0, 7], [1, 2, 15, 8, 4]])
    visible = jnp.take_along_axis(PATCHES, keep_BK[..., None], axis=1)
    tokens = encode(encoder, params, visible, keep_BK)
    order = jnp.array([2, 0, 4, 1, 3])
    again = encode(encoder, params, visible[:, order], keep_BK[:, order])
    np.testing.assert_allclose(again[:, 1:], tokens[:, 1:][:, order], atol=1e-5)
    np.testing.assert_allclose(again[:, 0], tokens[:, 0], atol=1e-5)
    table_LG = modern.rotary_angles(WIDTH // 2, GRID, 100.0)
    extra = modern.extra(
        None, replace(encoder.spec.encoder, block=BlockOptions(rope=100.0)), GRID, keep_BK
    )
    np.testing.assert_array_equal(extra.angle_BNG[1, 1:], table_LG[np.array([1, 2, 15, 8, 4])])
    everything = encode(encoder, params, PATCHES, jnp.tile(jnp.arange(16), (2, 1)))
    np.testing.assert_allclose(everything, encode(encoder, params, PATCHES), atol=1e-5)


def test_loops_and_recomputation_change_nothing():
    encoder, params = encoder_with(**ALL)
    wanted = encode(encoder, params, PATCHES)
    for compute in (ComputeConfig(scan_unroll=2), ComputeConfig(remat=True)):
        np.testing.assert_allclose(
            encode(Encoder(encoder.spec, compute), params, PATCHES), wanted, atol=1e-5
        )


# Counts, roles, meshes.


def test_parameters_and_flops_are_counted():
    plain, full = (tasks.build(config_with(**options)) for options in (OFF, ALL))
    sizes = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))[0]))
        for task in (plain, full)
    ]
    e, d = plain.spec.encoder, plain.spec.decoder
    added = 4 * e.width  # registers
    for vit in (e, d):
        added += vit.depth * 2 * (vit.width // vit.heads)  # scales of queries and keys
        added += vit.depth * 2 * vit.width  # of both branches
        added -= (vit.depth * 2 + 1) * vit.width  # biases of norms
    assert sizes[1] - sizes[0] == added
    kept = 4
    assert full.flops_per_example - plain.flops_per_example == pytest.approx(
        flops.stack(e, kept + 5) - flops.stack(e, kept + 1)
    )


def products(jaxpr):
    """Return the FLOPs of all matrix products of a program, two for each multiply-add."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        inside = sum(map(products, jaxprs_in_params(equation.params)))
        total += inside * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize("cls_tokens", [1, 3])
def test_the_products_of_a_program_are_those_that_are_counted(cls_tokens):
    task = tasks.build(config_with(**ALL))
    network = mae.MAE(replace(task.spec, cls_tokens=cls_tokens), ComputeConfig())
    patches = jnp.zeros((2, 16, 64))
    mask = masking.keep_lowest(jax.random.uniform(jax.random.key(0), (2, 16)), 4)
    params = jax.eval_shape(network.init, jax.random.key(0), patches, mask)
    program = jax.make_jaxpr(network.apply)(params, patches, mask)
    assert products(program.jaxpr) == 2 * flops.mae(network.spec, 4)


def test_every_parameter_has_a_role_a_rule_and_a_layer():
    params, _ = jax.eval_shape(tasks.build(config_with(**ALL)).init, jax.random.key(0))
    decayed = optim.decay_mask(params)["encoder"]
    assert decayed["register_token"] and decayed["cls_token"]
    blocks = decayed["stack"]["blocks"]
    assert not any(jax.tree.leaves([blocks[name] for name in (*SCALES, "norm1")]))
    assert blocks["attn"]["qkv"]["kernel"] and not blocks["attn"]["q_norm"]["scale"]
    config = finetune_config()
    config.model.block = ConfigDict(ALL)
    params, _ = jax.eval_shape(tasks.build(config).init, jax.random.key(0))
    layers = layer_decay.layer_ids(params)
    assert layers["encoder"]["register_token"] == 0
    assert layers["encoder"]["stack"]["blocks"]["scale1"]["scale"].tolist() == [[1], [2]]


def test_a_mesh_of_any_shape_makes_the_same_updates():
    ends = [updates(config_with(**ALL), mesh_of(*shape), 2) for shape in ((1, 1, 1), (2, 2, 2))]
    assert_trees_equal(*(states[-1].params for states, _ in ends), atol=2e-5)
    before, after = ends[0][0][0].params, ends[0][0][-1].params
    moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), before, after)
    assert all(jax.tree.leaves(moved))


# Beside everything else.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of four steps that stopped after two and went on."""
    root = tmp_path_factory.mktemp("blocks")
    config = config_with(**ALL)
    config.checkpoint.every, config.checkpoint.keep_every = "2 steps", "2 steps"
    config.train_for = "4 steps"
    run(config, root / "once", (1, 1, 1))
    return root


def test_a_run_goes_on_bit_equal(workdir, tmp_path):
    shutil.copytree(workdir / "once", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/4")
    config = config_with(**ALL)
    config.checkpoint.every, config.checkpoint.keep_every = "2 steps", "2 steps"
    config.train_for = "4 steps"
    run(config, tmp_path / "again", (1, 1, 1))
    assert_trees_equal(
        *(weights.open_weights(path).params for path in (workdir / "once", tmp_path / "again"))
    )
    config.model.block.rope = 50.0
    with pytest.raises(UserError, match="model.block.rope: 100.0 -> 50.0"):
        run(config, tmp_path / "again", (1, 1, 1))


def test_weights_are_loaded_with_their_options(workdir):
    model, params = mae_jax.load(workdir / "once")
    assert model.spec.encoder.block == BlockOptions(**ALL)
    assert model.spec.decoder.block == BlockOptions(**ALL | {"registers": 0})
    assert (
        ModelSpec.from_config(json.loads(json.dumps(described.config_of(model.spec)))) == model.spec
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    tokens = model.encode(params, images)
    assert tokens.shape == (2, 17, 32)
    task = tasks.build(config_with(**ALL))
    features = jax.jit(task.features)(params, {}, {"image": images})
    np.testing.assert_allclose(features["cls"], tokens[:, 0], atol=1e-5)
    blocks = jax.jit(task.block_features)(params, {}, {"image": images})
    np.testing.assert_allclose(blocks["mean"][-1], features["mean"], atol=1e-5)
    first = model.encode(params, images, layer=1)
    np.testing.assert_allclose(blocks["mean"][0], first[:, 1:].mean(1), atol=1e-5)
    patches = task.patch_features(params, {}, {"image": images}, block=1)
    np.testing.assert_allclose(patches, first[:, 1:], atol=1e-5)
    out = model.reconstruct(params, images, jax.random.key(0))
    assert out.images_BHWC.shape == images.shape
    with pytest.raises(UserError, match="of plain blocks .* and these have registers=4, qk_"):
        model.blocks(params, images)


def test_weights_go_to_our_own_format_and_to_no_other(workdir, tmp_path):
    opened = weights.open_weights(workdir / "once")
    weights.save(tmp_path / "ours", opened.spec, opened.params, "x")
    again = weights.open_weights(tmp_path / "ours", part="encoder")
    assert again.spec.encoder == opened.spec.encoder
    assert_trees_equal(again.params["encoder"], opened.params["encoder"])
    for form in (write.official, write.hf):
        with pytest.raises(UserError, match="blocks with registers=4, .*other formats cannot hold"):
            form(tmp_path / "theirs.safetensors", opened.spec, opened.params)
    assert [x.name for x in tmp_path.iterdir()] == ["ours"]


def test_weights_for_images_of_another_size_keep_their_options(workdir):
    model, params = mae_jax.load(workdir / "once", image_size=64)
    assert model.spec.encoder.block == BlockOptions(**ALL)
    image = np.zeros((1, 64, 64, 1), np.uint8)
    assert jax.eval_shape(model.encode, params, image).shape == (1, 65, 32)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_fine_tuning_takes_the_options_of_what_it_starts_from(workdir, pool):
    path = workdir / "once"
    config = finetune.get_config(f"source=bundled:digits,test=test,batch_size=16,init={path}")
    assert config.model.block.to_dict() == ALL
    config.mix.group, config.model.pool, config.model.dtype = 8, pool, "float32"
    encoder = load_encoder_into(config, path)
    saved = weights.open_weights(path).params["encoder"]
    assert_trees_equal(encoder["stack"], saved["stack"])
    assert_trees_equal(encoder["register_token"], saved["register_token"])
    assert ("norm" in encoder) == (pool == "cls")
    states, metrics = updates(config, mesh_of(1, 1, 1), 1)
    assert np.isfinite(metrics[0]["loss"])
    shapes = {
        optim.path_name(path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(states[0].params)
    }
    spec = described.spec_of(shapes, config.to_dict())
    assert (spec.pool, spec.encoder.block) == (pool, BlockOptions(**ALL))


@pytest.mark.parametrize("trained_blocks", [0.5, 1])
def test_a_partly_frozen_network_is_the_network(trained_blocks):
    config = finetune_config()
    config.model.block = ConfigDict(ALL | {"registers": 0})
    network = tasks.build(config).network
    patches = jax.random.normal(jax.random.key(0), (2, 4, 64))
    params = jax.jit(network.init)(jax.random.key(1), patches)["params"]
    whole = jax.jit(network.apply)({"params": params}, patches)

    def loss(params):
        out = classifier.apply_partly_frozen(network, params, patches, trained_blocks)
        return out.features_BD.sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out.features_BD, whole.features_BD, atol=1e-4)
    share = classifier.trained_share(params, trained_blocks)["encoder"]["stack"]["blocks"]
    blocks = grads["encoder"]["stack"]["blocks"]
    frozen = jax.tree.map(lambda g, s: float(np.abs(g * (1 - s)).max()), blocks, share)
    assert max(jax.tree.leaves(frozen)) == 0


def test_a_probe_takes_them_too(workdir):
    config = probe_config()
    config.model.block = ConfigDict(ALL)
    config.init_from = str(workdir / "once")
    task, state = fresh_state(config, mesh_of(1, 1, 1))
    assert state.extra["encoder"]["register_token"].shape == (1, 4, 32)
    assert task.spec.encoder.block == BlockOptions(**ALL)


def test_a_run_does_not_start_from_blocks_with_other_options(workdir, tmp_path):
    path = workdir / "once"
    for task_config in (config_with(**ALL | {"rope": 50.0}), finetune_config()):
        task, state = fresh_state(task_config, mesh_of(1, 1, 1))
        with pytest.raises(UserError, match="config.init_from: the blocks of .* rope=100.0, eps"):
            task.load(path / "checkpoints/4", state)
    config = config_with(**ALL | {"layer_scale": 1e-4})  # what it started from does not matter
    task, state = fresh_state(config, mesh_of(1, 1, 1))
    assert task.load(path / "checkpoints/4", state)
    plain = tiny_config()
    _, state = fresh_state(plain, mesh_of(1, 1, 1))
    save_workdir(plain, tmp_path / "plain", {"params": state.params})
    task, state = fresh_state(config, mesh_of(1, 1, 1))
    with pytest.raises(UserError, match="have no options, and config.model.block says registers=4"):
        task.load(tmp_path / "plain/checkpoints/0", state)


# Bad input.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(norm="batch"), "config.model.block.norm='batch': give layer or rms"),
        (dict(register=1), "config.model.block.register: no such option; nearest: registers"),
        (dict(registers=-1), "config.model.block.registers=-1: give a whole number from 0"),
        (dict(qk_norm=1), "config.model.block.qk_norm=1: give True or False"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        tasks.build(config_with(**options))


@pytest.mark.parametrize("side", ["", "decoder_"])
def test_rotary_positions_want_heads_whose_width_4_divides(side):
    config = config_with(rope=100.0)
    config.model[f"{side}width"], config.model[f"{side}heads"] = 24, 4
    words = f"config.model.block.rope=100.0: {side}width / {side}heads = 6 must be divisible by 4"
    with pytest.raises(UserError, match=words):
        tasks.build(config)
    config.model.block.rope = 0.0
    assert tasks.build(config)


def test_registers_are_refused_where_their_blocks_are_frozen():
    config = finetune_config()
    config.model.block, config.trained_blocks = ConfigDict(dict(registers=4)), 1.0
    with pytest.raises(UserError, match="config.trained_blocks=1.0: with registers or several"):
        tasks.build(config)
