"""The classifier, its layer-wise decay and its position table agree with the official numbers."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from official import DATA, assert_close, classifier_spec, golden_state, params_of

from mae_jax import layer_decay, optim
from mae_jax.models import classifier, resize
from mae_jax.models.block import Block
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.patchify import patchify
from mae_jax.models.vit import Encoder
from mae_jax.tasks import classify

POOLS = ("avg", "cls")


def load(pool):
    """Golden arrays, their sizes, the official parameters and the patches of the images."""
    arrays = np.load(DATA / f"vit_tiny_{pool}.npz")
    state, meta = golden_state(DATA / f"vit_tiny_{pool}.npz")
    return arrays, meta, state, patchify(jnp.asarray(arrays["images"]), (meta["patch"],) * 2)


def build(pool, meta, drop_path=0.0, **compute):
    return classifier.Classifier(classifier_spec(meta, pool, drop_path), ComputeConfig(**compute))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("compute", [{}, {"scan_unroll": 3}, {"remat": True}], ids=str)
def test_features_and_logits_are_the_official_ones(pool, compute):
    arrays, meta, state, patches = load(pool)
    network = build(pool, meta, **compute)
    out = jax.jit(network.apply)({"params": params_of(state, network.spec)}, patches)
    assert_close(out.features_BD, arrays["features"])
    assert_close(out.logits_BY, arrays["logits"])


@pytest.mark.parametrize("pool", POOLS)
def test_fresh_parameters_have_the_official_names_and_shapes(pool):
    _, meta, state, patches = load(pool)
    network = build(pool, meta)
    fresh = jax.eval_shape(network.init, jax.random.key(0), patches)["params"]
    theirs = params_of(state, network.spec)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, theirs)


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_has_the_official_rate_and_decay(pool):
    arrays, meta, state, _ = load(pool)
    official = json.loads(str(arrays["layer_decay_0.65"]))
    # The official tensors, filled with their own number, in our layout: tensor -> (scale, decay).
    numbered = {k: np.full(x.shape, i, np.float32) for i, (k, x) in enumerate(state.items())}
    params = params_of(numbered, build(pool, meta).spec)
    table = np.array([official[name] for name in state])
    scales = jax.tree.leaves(layer_decay.layer_scales(params, 0.65))
    mask = jax.tree.leaves(optim.decay_mask(params, ("matrix",)))
    for number, ours, decayed in zip(jax.tree.leaves(params), scales, mask, strict=True):
        scale, decay = np.moveaxis(table[number.astype(int)], -1, 0)
        np.testing.assert_allclose(np.broadcast_to(ours, scale.shape), scale, rtol=1e-12, atol=0)
        np.testing.assert_array_equal(decay, 0.05 if decayed else 0.0)


def base_params():
    meta = {"img": 224, "patch": 16, "embed_dim": 768, "depth": 12, "heads": 12, "classes": 1000}
    network = build("avg", meta)
    patches = jax.ShapeDtypeStruct((1, 196, 768), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), patches)["params"]


def test_parameters_of_the_published_classifiers_are_86567656():
    assert sum(x.size for x in jax.tree.leaves(base_params())) == 86_567_656


def test_a_parameter_without_a_layer_raises():
    params = base_params()
    params["adapter"] = {"kernel": jnp.ones(2)}
    with pytest.raises(ValueError, match="'adapter/kernel' has no layer"):
        layer_decay.layer_ids(params)


def test_a_table_resized_is_the_official_one():
    arrays = np.load(DATA / "posemb_resize.npz")
    assert_close(resize.positions(jnp.asarray(arrays["old"]), (4, 4), (7, 7)), arrays["new"])


def bicubic_1d(values, size):
    """PyTorch's bicubic along the first axis, from its formula: a = -0.75, edges clamped."""

    def weight(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = []
    for i in range(size):
        place = (i + 0.5) * len(values) / size - 0.5
        taps = range(int(np.floor(place)) - 1, int(np.floor(place)) + 3)
        out.append(sum(weight(place - t) * values[min(max(t, 0), len(values) - 1)] for t in taps))
    return np.stack(out)


@pytest.mark.parametrize("old, new", [((3, 5), (6, 7)), ((6, 4), (3, 9))], ids=str)
def test_resizing_is_pytorchs_bicubic_for_any_grid_also_a_smaller_one(old, new):
    table = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 8)).astype(np.float32)
    image = bicubic_1d(table[0, 1:].reshape(*old, 8).astype(np.float64), new[0])
    image = bicubic_1d(image.swapaxes(0, 1), new[1]).swapaxes(0, 1)
    ours = resize.positions(jnp.asarray(table), old, new)
    np.testing.assert_array_equal(ours[:, 0], table[:, 0])
    assert_close(ours[0, 1:], image.reshape(-1, 8))


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="10 rows is not one of a grid of 2 x 4"):
        resize.positions(jnp.zeros((1, 10, 4)), (2, 4), (3, 3))


def test_drop_path_drops_whole_branches_of_samples_and_scales_the_survivors():
    """Every sample is one of four: each branch dropped, or divided by the keep probability."""
    rate, batch = 0.4, 64
    block = Block(heads=2, mlp_width=16, compute=ComputeConfig())
    x = jax.random.normal(jax.random.key(0), (batch, 3, 8))
    params = block.init(jax.random.key(1), x, jnp.float32(0), True)

    def run(x, rate, key=None):
        rngs = {} if key is None else {"drop_path": key}
        return np.asarray(block.apply(params, x, jnp.float32(rate), key is None, rngs=rngs)[0])

    ours = run(x, rate, jax.random.key(2))
    # Attention's branch: the block without an MLP. The MLP's: that of a given input.
    silent = jax.tree.map(jnp.copy, params)
    silent["params"]["mlp"]["fc2"] = jax.tree.map(jnp.zeros_like, params["params"]["mlp"]["fc2"])
    attention = np.asarray(block.apply(silent, x, jnp.float32(0), True)[0]) - x
    mute = jax.tree.map(jnp.copy, params)
    mute["params"]["attn"]["proj"] = jax.tree.map(jnp.zeros_like, params["params"]["attn"]["proj"])
    seen = []
    for first in (0, 1):
        middle = x + first * attention / (1 - rate)
        mlp = np.asarray(block.apply(mute, middle, jnp.float32(0), True)[0]) - middle
        for second in (0, 1):
            expected = middle + second * mlp / (1 - rate)
            seen.append(np.abs(ours - expected).max((1, 2)) < 1e-5)
    counts = np.array(seen).sum(1)
    assert counts.sum() == batch  # each sample is exactly one of the four
    assert (counts > 0).all()  # the two branches are drawn independently
    np.testing.assert_allclose(run(x, 0.0, jax.random.key(2)), run(x, 0.0), atol=1e-6)


def test_drop_path_rates_grow_linearly_from_zero():
    """Blocks that are the identity but for their MLP's bias tell which rate each block had."""
    meta = {"img": 8, "patch": 4, "embed_dim": 8, "depth": 3, "heads": 2, "classes": 2}
    network = build("cls", meta, drop_path=0.6)
    patches = jnp.zeros((2000, 4, 48))
    params = jax.jit(network.init)(jax.random.key(0), patches[:1])["params"]
    blocks = jax.tree.map(jnp.zeros_like, params["encoder"]["stack"]["blocks"])
    direction = jnp.array([1.0, 10.0, 100.0])[:, None] * jnp.eye(8)[:3]  # one for each block
    blocks["mlp"]["fc2"]["bias"] = direction
    encoder = params["encoder"] | {"stack": {"blocks": blocks}}
    encoder["cls_token"] = jnp.zeros((1, 1, 8))
    encoder.pop("norm")
    bare = Encoder(network.spec, network.compute, final_norm=False)
    x = (
        bare.apply(
            {"params": encoder}, patches, deterministic=False, rngs={"drop_path": jax.random.key(3)}
        )[:, 0, :3]
        - encoder["pos_embed"][0, 0, :3]
    )
    dropped = np.asarray((x == 0).mean(0))
    np.testing.assert_allclose(dropped, [0.0, 0.3, 0.6], atol=0.05)
    kept = np.asarray(x.max(0))
    np.testing.assert_allclose(kept, [1.0, 10 / 0.7, 100 / 0.4], rtol=1e-5)


def test_a_fresh_head_is_tiny_and_scratch_is_normal_everywhere():
    _, meta, _, _ = load("avg")
    network = build("avg", meta | {"embed_dim": 256, "heads": 4})
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 16, 192)))["params"]
    assert abs(params["head"]["kernel"].std() / 2e-5 - 1) < 0.1
    assert not params["head"]["bias"].any()
    scratch = jax.jit(classifier.scratch_init)(params, jax.random.key(1))
    names = {optim.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(scratch)}
    before = {optim.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    redrawn = {name for name in names if not np.array_equal(names[name], before[name])}
    kernels = {name for name in names if name.endswith("kernel")}
    assert redrawn == kernels | {"encoder/pos_embed", "encoder/cls_token"}
    patches = "encoder/patch_embed/kernel"  # a convolution of 192 values, as PyTorch starts it
    assert abs(np.abs(names[patches]).max() / 192**-0.5 - 1) < 0.01
    assert abs(names[patches].std() / (3 * 192) ** -0.5 - 1) < 0.01
    assert all(abs(names[name].std() / 0.02 - 1) < 0.2 for name in redrawn - {patches})


@pytest.mark.parametrize(
    "changes, message",
    [
        (("avg", {"embed_dim": 66}), "width=66 is not divisible by heads=4"),
        (("max", {}), "pool='max' is unknown"),
        (("avg", {}, 1.0), "drop_path=1.0 must be"),
    ],
    ids=str,
)
def test_impossible_classifiers_are_refused(changes, message):
    pool, sizes, *drop_path = changes
    meta = {"img": 8, "patch": 4, "embed_dim": 64, "depth": 1, "heads": 4, "classes": 2}
    with pytest.raises(ValueError, match=message):
        build(pool, meta | sizes, *drop_path)


def partial_case(width=16):
    meta = {"img": 16, "patch": 4, "embed_dim": width, "depth": 4, "heads": 2, "classes": 3}
    network = build("avg", meta, scan_unroll=4)
    patches = jax.random.normal(jax.random.key(1), (4, 16, 48))
    params = jax.jit(network.init)(jax.random.key(0), patches)["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), (width, 3))
    return network, patches, params


def partial_loss(network, patches, trained):
    target = jnp.eye(3)[jnp.array([0, 1, 2, 0])]

    def loss(params):
        if trained is None:
            out = network.apply({"params": params}, patches)
        else:
            out = classifier.apply_partly_frozen(network, params, patches, trained)
        return optax.softmax_cross_entropy(out.logits_BY, target).mean()

    return jax.jit(jax.value_and_grad(loss))


def test_partial_fine_tuning_has_the_gradients_of_the_whole_where_it_trains_and_none_elsewhere():
    network, patches, params = partial_case()
    value, full = partial_loss(network, patches, None)(params)
    for trained in (0, 0.5, 2):
        share = classifier.trained_share(params, trained)
        ours_value, ours = partial_loss(network, patches, trained)(params)
        np.testing.assert_allclose(ours_value, value, rtol=1e-6)
        expected = jax.tree.map(lambda g, s: g * s, full, share)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_parts_that_are_trained_are_those_of_figure_9():
    _, _, params = partial_case()
    for trained, number in ((0, 0), (0.5, 6), (1, 12), (3, 36)):  # arrays of single layers
        share = classifier.trained_share(params, trained)
        blocks = jax.tree.leaves(share["encoder"].pop("stack"))
        assert sum(int(x.sum()) for x in blocks) == number
        assert all(not x for x in jax.tree.leaves(share["encoder"]))
        assert all(x == 1 for x in jax.tree.leaves((share["head"], share["fc_norm"])))


def test_the_frozen_part_costs_no_backward_pass():
    """FLOPs of the compiled gradient: with n of 4 blocks trained, under 1 + 2 n / 4 forward passes.

    Half a block is its MLP with the norm before it: two thirds of the FLOPs. Of the first trained
    block no gradient of the input is needed. Wide, so that matrix products count.
    """
    network, patches, params = partial_case(width=256)

    def flops(function):
        return function.lower(params).compile().cost_analysis()["flops"]

    forward = flops(jax.jit(lambda p: network.apply({"params": p}, patches)))
    measured = {n: flops(partial_loss(network, patches, n)) / forward for n in (0, 0.5, 1, 2)}
    for trained, blocks in ((0, 0), (0.5, 2 / 3), (1, 1), (2, 2)):
        assert measured[trained] < 1 + 2 * blocks / 4 + 0.01, measured
    for trained, passes in measured.items():
        config = SimpleNamespace(trained_blocks=trained)
        task = classify.Task(network, None, config)
        assert task.flops_multiplier == pytest.approx(passes, abs=0.05)
    assert measured[0] < measured[0.5] < measured[1] < measured[2]
    whole = flops(partial_loss(network, patches, None)) / forward
    # Gradients that are computed and then masked would exceed every one of these bounds.
    assert whole > 1 + 2 * max(measured) / 4 + 0.01
