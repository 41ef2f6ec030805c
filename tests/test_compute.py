"""Networks run as their devices allow: cuDNN's attention against ours, and automatic choices."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import assert_trees_equal, run, tiny_config

from mae_jax.models import kernels, mae, masking
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.compute import DTYPES, ComputeConfig, why_no_cudnn
from mae_jax.models.spec import ModelSpec, ViTSpec
from mae_jax.models.vit import Encoder

H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
V100 = SimpleNamespace(platform="gpu", device_kind="Tesla V100", compute_capability="7.0")
MI300 = SimpleNamespace(platform="gpu", device_kind="AMD MI300X", compute_capability="gfx942")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "refusal"),
    [
        (H100, "bfloat16", (64, 32), ""),
        (H100, "float16", (80,), ""),
        (H100, "float32", (64,), "it takes bfloat16 and float16"),
        (H100, "bfloat16", (64, 20), "width / heads is 20"),
        (H100, "bfloat16", (136,), "width / heads is 136"),
        (V100, "bfloat16", (64,), "from A100 on, and this is Tesla V100"),
        (MI300, "bfloat16", (64,), "NVIDIA GPUs, and this is AMD MI300X"),
        (TPU, "bfloat16", (64,), "NVIDIA GPUs, and this is TPU v5 lite"),
        (CPU, "bfloat16", (64,), "NVIDIA GPUs, and this is cpu"),
    ],
)
def test_attention_is_cudnns_where_it_can_run_and_ours_elsewhere(device, dtype, heads, refusal):
    sizes = [("width", "heads", "depth"), ("decoder_width", "decoder_heads", "decoder_depth")]
    model = tiny_config().model.to_dict() | {"dtype": dtype}
    for keys, head in zip(sizes, (*heads, heads[0]), strict=False):
        model |= dict(zip(keys, (2 * head, 2, 3), strict=True))
    reason = why_no_cudnn(device, dtype, heads)
    assert refusal in reason and bool(refusal) == bool(reason)
    chosen = ComputeConfig.from_config(model, device=device).attention
    assert chosen == ("xla" if refusal else "cudnn")
    asked = partial(ComputeConfig.from_config, model | {"attention": "cudnn"}, device=device)
    if refusal:
        with pytest.raises(ValueError, match=f"config.model.attention=cudnn: .*{refusal}"):
            asked()
    else:
        assert asked().attention == "cudnn"
    assert ComputeConfig.from_config(model | {"attention": "xla"}, device=device).attention == "xla"


@pytest.mark.parametrize(("device", "blocks"), [(H100, 5), (TPU, 5), (CPU, 1)])
def test_blocks_are_unrolled_on_accelerators_and_scanned_on_cpus(device, blocks):
    model = tiny_config().model.to_dict() | {"depth": 3, "decoder_depth": 5}
    assert ComputeConfig.from_config(model, device=device).scan_unroll == blocks
    chosen = ComputeConfig.from_config(model | {"scan_unroll": 2}, device=device)
    assert chosen.scan_unroll == 2
    assert chosen.split_heads == chosen.plain_biases == (device is H100)
    with pytest.raises(ValueError, match="scan_unroll=-1 must be at least 0"):
        ComputeConfig.from_config(model | {"scan_unroll": -1}, device=device)


def test_cudnn_where_it_cannot_run_is_refused_before_anything_is_written(tmp_path):
    config = tiny_config()
    config.model.attention = "cudnn"
    with pytest.raises(ValueError, match="config.model.attention=cudnn: it is for NVIDIA GPUs"):
        run(config, tmp_path / "new", (1, 1, 1))
    assert not (tmp_path / "new").exists()


@pytest.fixture
def anywhere(monkeypatch):
    """Let JAX's portable kernel stand in for cuDNN's, which has the same meaning."""
    original = jax.nn.dot_product_attention

    def portable(*arrays, implementation, **options):
        assert implementation == "cudnn"
        assert arrays[0].shape[1] % 2 == 0, "cuDNN's gradient takes even lengths only"
        return original(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", portable)


def network_of(grid: int, attention: str, block=None, cls_tokens: int = 1, **compute) -> mae.MAE:
    encoder, decoder = ViTSpec(32, 2, 2, 64, block=block), ViTSpec(16, 2, 1, 32)
    sizes = (4 * grid,) * 2, (4, 4), 3
    spec = ModelSpec(*sizes, encoder, decoder, cls_tokens=cls_tokens)
    return mae.MAE(spec, ComputeConfig(attention=attention, **compute))


def inputs_of(grid: int, kept: int):
    rng = np.random.default_rng(grid)
    patches = jnp.asarray(rng.normal(size=(3, grid**2, 48)), jnp.float32)
    return patches, masking.keep_lowest(jnp.asarray(rng.random((3, grid**2))), kept)


BLOCK = BlockOptions(registers=2, qk_norm=True, rope=100.0)
OPTIONS = {"block": BLOCK, "cls_tokens": 4}


# Tokens of the encoder and of the decoder: 5 and 17, 6 and 17, 10 and 26; 11 and 20 with options.
@pytest.mark.parametrize(
    ("grid", "kept", "compute"),
    [
        (4, 4, {}),
        (4, 5, {}),
        (5, 9, {}),
        (4, 4, {"scan_unroll": 2, "remat": True}),
        (4, 5, OPTIONS),
    ],
    ids=str,
)
def test_cudnns_attention_gives_our_loss_and_gradients(anywhere, grid, kept, compute):
    inputs = inputs_of(grid, kept)
    ours = network_of(grid, "xla", **compute)
    params = jax.jit(ours.init)(jax.random.key(0), *inputs)

    def value(network, params):
        pred = network.apply(params, *inputs)
        assert pred.shape == (3, grid**2, 48)
        return (pred * jnp.sin(jnp.arange(pred.size)).reshape(pred.shape)).mean()

    fused = network_of(grid, "cudnn", **compute)
    got, expected = (jax.jit(jax.value_and_grad(partial(value, n)))(params) for n in (fused, ours))
    assert_trees_equal(got, expected, rtol=1e-4, atol=1e-6)


def test_the_tokens_of_blocks_are_without_padding(anywhere):
    patches, _ = inputs_of(4, 4)
    both = []
    for attention in ("xla", "cudnn"):
        model = network_of(4, attention)
        encoder = Encoder(model.spec, model.compute)
        params = jax.jit(encoder.init)(jax.random.key(0), patches)
        both.append(jax.jit(partial(encoder.apply, return_blocks=True))(params, patches))
    assert both[1][1].shape == (3, 3, 17, 32)
    assert_trees_equal(both[1], both[0], atol=1e-5)


def test_a_padded_stream_without_its_length_would_give_other_tokens(anywhere, monkeypatch):
    patches, _ = inputs_of(4, 4)
    model = network_of(4, "cudnn")
    encoder = Encoder(model.spec, model.compute)
    params = jax.jit(encoder.init)(jax.random.key(0), patches)
    padded, kernel = encoder.apply(params, patches), jax.nn.dot_product_attention

    def forgetful(*arrays, query_seq_lengths, key_value_seq_lengths, **options):
        assert query_seq_lengths.shape == key_value_seq_lengths.shape == (3,)
        return kernel(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", forgetful)
    assert np.abs(encoder.apply(params, patches) - padded).max() > 1e-3


def gradients(compute: ComputeConfig) -> tuple:
    """Return the loss of a small network and its gradients by name."""
    vit = ViTSpec(width=32, depth=1, heads=2, mlp_width=64)
    spec = ModelSpec((32, 32), (8, 8), 3, vit, decoder=vit)
    network = mae.MAE(spec, compute)
    patches_BLP = jax.random.normal(jax.random.key(0), (4, 16, 192))
    mask = masking.keep_lowest(jax.random.uniform(jax.random.key(1), (4, 16)), 4)
    params = jax.jit(network.init)(jax.random.key(2), patches_BLP, mask)

    def loss(params):
        return mae.masked_mse(network.apply(params, patches_BLP, mask), patches_BLP, mask.mask_BL)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return value, {"/".join(name): x for name, x in flatten_dict(grads).items()}


def is_rounded(x: jax.Array) -> bool:
    return bool((x.astype(jnp.bfloat16).astype(jnp.float32) == x).all())


def relative_error(x: jax.Array, exact: jax.Array) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def test_gradients_of_matrices_are_summed_in_the_type_of_products_or_in_float32():
    exact = gradients(ComputeConfig())[1]
    value, short = gradients(ComputeConfig(jnp.bfloat16))
    same_value, long = gradients(ComputeConfig(jnp.bfloat16, float32_sums=True))
    assert value == same_value
    matrices = [name for name in exact if name.endswith("kernel")]
    assert len(matrices) == 11
    for name in matrices:
        assert is_rounded(short[name]), f"{name} was not summed in bfloat16"
        assert not is_rounded(long[name]), name
    errors = [
        np.mean([relative_error(g[name], exact[name]) for name in matrices]) for g in (long, short)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("plain", [False, True])
def test_gradients_of_attentions_biases_are_summed_in_float32(plain):
    exact = gradients(ComputeConfig())[1]
    grads = gradients(ComputeConfig(jnp.bfloat16, plain_biases=plain))[1]
    biases = [name for name in exact if "attn" in name and name.endswith("bias")]
    assert len(biases) == 4
    for name in biases:
        assert not is_rounded(grads[name]), name
        assert relative_error(grads[name], exact[name]) < 0.03, name


@pytest.mark.parametrize("offset", [0, 3])
def test_a_variance_of_one_pass_differs_less_than_bfloat16_rounds(offset):
    x_BND = offset + jax.random.normal(jax.random.key(0), (2, 5, 64))
    scale_D, bias_D, weight_BND = jax.random.normal(jax.random.key(1), (3, 2, 5, 64))
    scale_D, bias_D = scale_D[0, 0], bias_D[0, 0]

    def loss(x_BND, scale_D, bias_D, one_pass):
        y_BND = kernels.normalise(x_BND, scale_D, bias_D, 1e-6, one_pass)
        return (y_BND * weight_BND).sum(), y_BND

    grad = jax.grad(loss, (0, 1, 2), has_aux=True)
    two, one = (grad(x_BND, scale_D, bias_D, one_pass) for one_pass in (False, True))
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        assert np.abs(a - b).max() < 2**-17 * np.abs(a).max()


def test_a_variance_of_one_pass_is_never_negative():
    constant_BND = jnp.broadcast_to(jnp.linspace(10, 1000, 100)[None, :, None], (1, 100, 48))
    y_BND = kernels.normalise(constant_BND, jnp.ones(48), jnp.zeros(48), 1e-6, True)
    assert np.isfinite(y_BND).all()


def test_only_products_in_16_bits_have_norms_of_one_pass():
    chosen = {dtype: ComputeConfig(jnp.dtype(dtype)).one_pass_norms for dtype in DTYPES}
    assert chosen == {"float32": False, "bfloat16": True, "float16": True}
