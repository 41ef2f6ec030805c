"""DINOv2, DINOv3, Pixio and timm's encoders: the features that their own libraries give."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from official import DATA, assert_close, write_pth
from safetensors.numpy import load_file, save_file

import mae_jax
from mae_jax.commands import convert
from mae_jax.errors import UserError
from mae_jax.interop.open import open_weights
from mae_jax.pretrained import Model

FOLDER = DATA / "encoders"
TOKENS = np.load(FOLDER / "tokens.npz")
KEYS = [key for key in TOKENS.files if not key.startswith("images/")]
SQUARE = (16, 16)  # the images that the position tables are of
HEADS = {"heads": 2}


def encoded(model, params, layer=None):
    images = TOKENS["images/{}x{}".format(*model.spec.image_size)]
    return np.asarray(jax.jit(model.encode, static_argnums=2)(params, images, layer))


def wanted(spec, key):
    """Return golden tokens with the mean of class tokens before patches, without registers."""
    tokens, cls = TOKENS[key], spec.cls_tokens
    patches = tokens[:, cls + spec.encoder.registers :]
    return np.concatenate([tokens[:, :cls].mean(1, keepdims=True), patches], 1)


@pytest.mark.parametrize("key", KEYS)
def test_tokens_are_those_of_the_library_that_wrote_the_file(key):
    name, _, what = key.partition("/")
    block1 = what == "block1"
    size = SQUARE if block1 else tuple(map(int, what.split("x")))
    model, params = mae_jax.load(FOLDER / name, image_size=size, **HEADS)
    assert_close(encoded(model, params, 1 if block1 else None), wanted(model.spec, key), key)


@pytest.mark.parametrize(
    ("name", "block", "cls_tokens"),
    [
        ("dinov2", "layer_scale=1.0", 1),
        ("dinov2_registers", "registers=3, layer_scale=1.0", 1),
        ("dinov3", "registers=3, layer_scale=1.0, rope=50.0, eps=1e-05", 1),
        ("pixio", "None", 3),
        ("timm_registers", "registers=3, layer_scale=1.0", 1),
        ("timm_placed_registers", "registers=3", 1),
        ("timm_rms", "qk_norm=True, norm=rms", 1),
        ("timm_dinov3", "registers=4, layer_scale=1.0, rope=100.0, eps=1e-05", 1),
        ("timm_dinov3_biases", "registers=4, layer_scale=1.0, rope=100.0, eps=1e-05", 1),
    ],
)
def test_options_are_told_by_names_and_shapes(name, block, cls_tokens):
    spec = open_weights(FOLDER / name, **HEADS).spec
    assert (str(spec.encoder.block), spec.cls_tokens) == (block, cls_tokens)
    assert (spec.image_size, spec.patch_size) == (SQUARE, (4, 4))


@pytest.mark.parametrize("change", [{"rope": 0.0}, {"rope": 100.0}, {"eps": 1e-6}], ids=str)
def test_what_no_tensor_says_matters(change):
    """The contrast: with other positions or another epsilon DINOv3's features are others."""
    model, params = mae_jax.load(FOLDER / "dinov3")
    block = dataclasses.replace(model.spec.encoder.block, **change)
    encoder = dataclasses.replace(model.spec.encoder, block=block)
    ours = encoded(Model(dataclasses.replace(model.spec, encoder=encoder)), params)
    theirs = wanted(model.spec, "dinov3/16x16")
    assert np.abs(ours - theirs).max() > 5e-5 * np.abs(theirs).max()


def changed(tmp_path, name, change, **config):
    """Return a copy of a folder whose tensors were changed, and what its config says."""
    copy = shutil.copytree(FOLDER / name, tmp_path / name)
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors")
    said = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(said))
    return copy


def features(path, **options):
    options = {} if path.name == "ours" else HEADS | options
    return encoded(*mae_jax.load(path, **options))


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "dinov3", "pixio"])
def test_a_file_alone_and_a_part_of_a_larger_model_are_the_same(name, tmp_path):
    """Without a config DINOv3's base of frequencies is the published one, which this is not."""
    prefix = {"dinov3": "dinov3_vit"}.get(name, name.replace("registers", "with_registers"))
    state = load_file(FOLDER / name / "model.safetensors")
    inside = {f"{prefix}.{key}": x for key, x in state.items()}
    (tmp_path / "alone").mkdir()
    save_file(inside, tmp_path / "alone" / "model.safetensors")
    size = {"image_size": SQUARE}
    found = features(tmp_path / "alone" / "model.safetensors", **size)
    with_config = changed(tmp_path, name, lambda _: inside, rope_theta=100.0)
    np.testing.assert_array_equal(found, features(with_config))
    if name != "dinov3":
        np.testing.assert_array_equal(found, features(FOLDER / name))
    else:
        with pytest.raises(UserError, match="give the image_size of the file"):
            features(tmp_path / "alone" / "model.safetensors")


def test_dinov3_may_have_no_registers(tmp_path):
    """transformers writes an empty tensor of them."""

    def change(state):
        return state | {"embeddings.register_tokens": np.zeros((1, 0, 16), np.float32)}

    with_none = open_weights(changed(tmp_path, "dinov3", change)).spec.encoder.block
    assert str(with_none) == "layer_scale=1.0, rope=50.0, eps=1e-05"


def test_a_head_on_the_cls_token_and_the_mean_is_left_out_with_a_word(tmp_path):
    head = {"classifier.weight": np.ones((5, 32), np.float32), "classifier.bias": np.ones(5)}

    def change(state):
        return {f"dinov2.{key}": x for key, x in state.items()} | head

    path = changed(tmp_path, "dinov2", change)
    weights = open_weights(path)
    assert not weights.spec.classes
    assert any(line.startswith("left out: the head") for line in weights.report)
    np.testing.assert_array_equal(features(path), features(FOLDER / "dinov2"))


def test_dinov2s_own_files_are_read_by_their_names(tmp_path):
    """register_tokens, positions of the cls token, and a mask token of the pre-training."""
    state = load_file(FOLDER / "timm_registers" / "model.safetensors")
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = np.concatenate([np.zeros((1, 1, 16), np.float32), state["pos_embed"]], 1)
    state["mask_token"] = np.ones((1, 16), np.float32)
    path = write_pth(tmp_path / "a.pth", state, wrapped=False)
    np.testing.assert_array_equal(features(path), features(FOLDER / "timm_registers"))


def gated(state):
    return {key: np.concatenate([x, x]) if ".fc1." in key else x for key, x in state.items()}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("dinov2", {"encoder.layer.0.mlp.weights_in.weight": 1}, "weights_in.weight, a gated MLP"),
        ("dinov3", {"layer.0.mlp.gate_proj.weight": 1}, "gate_proj.weight, a gated MLP"),
        ("timm_registers", gated, "shape .128, 16. before .16, 64., a gated MLP"),
        ("timm_registers", {"blocks.0.attn.q_norm.bias": 1}, "q_norm.bias, a LayerNorm of queries"),
        ("timm_dinov3", {"reg_token": None}, "gamma_1, of timm's models beside its plain ViT"),
        ("timm_dinov3", {"pos_embed": 17}, "gamma_1, of timm's models beside its plain ViT"),
        ("timm_registers", {"blocks.0.attn.q_bias": 1}, "q_bias, of timm's models beside"),
        ("timm_dinov3_biases", {"blocks.1.attn.v_bias": None}, "missing.*blocks.1.attn.qkv.bias"),
        ("timm_registers", {"reg_token": None, "pos_embed": None}, "has no pos_embed, and nothing"),
        ("dinov2_registers", {"embeddings.position_embeddings": None}, "no vit.embeddings.posit"),
        ("pixio", {"embeddings.position_embeddings": None}, "no vit.embeddings.position_embeddi"),
        ("timm_registers", {"rope.freqs": 1}, "rope.freqs, of rotary positions"),
        ("timm_registers", {"norm_pre.weight": 1}, "norm_pre.weight, a norm before the blocks"),
        ("timm_registers", {"cls_token": None}, "has no cls_token"),
        ("dinov2", {"encoder.layer.1.layer_scale2.lambda1": None}, "layer_scale2.lambda1"),
        ("dinov3", {"layer.1.attention.v_proj.bias": None}, "value.bias"),
    ],
)
def test_what_our_blocks_have_not_is_refused_by_its_name(name, change, words, tmp_path):
    def apply(state):
        if callable(change):
            return change(state)
        added = {key: np.ones((1, n, 16), np.float32) for key, n in change.items() if n}
        return {key: x for key, x in (state | added).items() if change.get(key, 1) is not None}

    with pytest.raises(UserError, match=words):
        open_weights(changed(tmp_path, name, apply), **HEADS)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"model_type": "dinov4"}, "model_type 'dinov4'.*dinov3_vit, pixio can be read"),
    ],
)
def test_what_a_config_says_is_checked(config, words, tmp_path):
    with pytest.raises(UserError, match=words):
        open_weights(changed(tmp_path, "dinov3", dict, **config))


@pytest.mark.parametrize("name", ["dinov3", "pixio"])
def test_conversion_keeps_them_in_our_format_and_refuses_the_others(name, tmp_path):
    ours = tmp_path / "ours"
    assert convert.main([str(FOLDER / name), str(ours), "--to=ours"]) == 0
    np.testing.assert_array_equal(features(ours), features(FOLDER / name))
    for to in ("hf", "timm", "official"):
        with pytest.raises(UserError, match="which other formats cannot hold"):
            convert.main([str(FOLDER / name), str(tmp_path / f"x_{to}"), f"--to={to}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
