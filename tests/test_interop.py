"""Files that transformers, torch and timm wrote are read as they read them, without any of them."""

import dataclasses
import json
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official import DATA, STATE, assert_close
from safetensors.numpy import save_file
from tiny import assert_trees_equal

import mae_jax
from mae_jax.errors import UserError
from mae_jax.interop import names, pth, read
from mae_jax.models import masking, targets
from mae_jax.models.mae import masked_mse
from mae_jax.models.spec import ModelSpec, ViTSpec

B16 = ModelSpec((224, 224), (16, 16), 3, ViTSpec(768, 12, 12, 3072))
FULL = {"decoder": ViTSpec(512, 8, 16, 2048)}


def test_a_vitmae_of_transformers_predicts_the_same():
    golden = np.load(DATA / "hf_vitmae_tiny.npz")
    model, params = mae_jax.load(DATA / "hf_vitmae_tiny")
    kept = masking.num_kept(golden["noise"].shape[1], model.spec.mask_ratio)
    mask = masking.keep_lowest(jnp.asarray(golden["noise"]), kept)
    out = jax.jit(model.predict)(params, golden["images"], mask)
    target = targets.norm_pixels(model.normalize(golden["images"]), model.spec.patch_size)
    assert_close(out.pred_BLT, golden["pred"])
    assert_close(masked_mse(out.pred_BLT, target, mask.mask_BL), golden["loss"])
    np.testing.assert_array_equal(out.mask_BL, golden["mask"])


def test_a_checkpoint_of_torch_is_read_number_by_number():
    content = pth.read(DATA / "torch_checkpoint.pth")
    assert content["epoch"] == 3 and content["scaler"] == {"scale": 65536.0}
    assert vars(content["args"]) == {"norm_pix_loss": True, "blr": 1.5e-4, "device": "cpu"}
    assert content["model"]["weight"].shape == (2, 3)
    assert content["optimizer"]["param_groups"][0]["lr"] == 1e-3
    other = content["other"]
    assert (other["half"].dtype, other["bfloat16"].dtype) == (np.float16, jnp.bfloat16)
    np.testing.assert_array_equal(other["bfloat16"].astype(int), np.arange(4))
    np.testing.assert_array_equal(other["transposed"], np.arange(6).reshape(2, 3).T)
    np.testing.assert_array_equal(other["part"], [3, 4])
    assert other["number"] == 7


@pytest.mark.parametrize(
    ("label", "more"),
    [
        ("vit_base_patch16_224.mae", {}),
        ("vit_base_patch16_224, global_pool=avg", {"classes": 1000, "pool": "avg"}),
    ],
)
def test_names_and_shapes_are_those_of_timm(label, more):
    timm = json.loads((DATA / "timm_shapes.json").read_text())[label]
    spec = dataclasses.replace(B16, **more)
    ours = {x.names[0]: list(x.shape) for x in names.entries(spec, "official")}
    assert ours == timm


def test_a_full_base_has_the_official_number_of_values():
    wanted = names.entries(dataclasses.replace(B16, **FULL), "official")
    assert sum(np.prod(x.shape) for x in wanted) == 111_907_840  # REFERENCE section 1.1


@pytest.mark.parametrize("family", ["official", "hf"])
@pytest.mark.parametrize("more", [{"classes": 5, "pool": "cls"}, FULL])
def test_both_directions_of_the_table_are_inverse(family, more):
    encoder, five = ViTSpec(24, 2, 3, 40, trained_positions=True), (0.5,) * 5
    spec = ModelSpec((8, 6), (4, 2), 5, encoder, mean=five, std=five, **more)
    rng = np.random.default_rng(0)
    state = {}
    for entry in names.entries(spec, family):
        rows, *rest = entry.shape
        for name in entry.names:
            shape = (rows // len(entry.names), *rest)
            state[name] = rng.normal(size=shape).astype(np.float32)
    params, inferred = names.to_ours(dict(state), spec, family)
    assert_trees_equal(names.to_theirs(params, inferred, family), state)


def test_a_safetensors_file_in_bfloat16_is_read(tmp_path):
    half = {name: np.asarray(x, jnp.bfloat16) for name, x in STATE.items()}
    save_file(half, tmp_path / "x")
    tensors = read.open_file(tmp_path / "x").state
    assert {x.dtype for x in tensors.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_trees_equal(tensors, half)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]},
        {"dtype": "F32"},
        [],
    ],
)
def test_headers_that_lie_are_refused(entry, tmp_path):
    text = json.dumps({"x": entry}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(16)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="is damaged, or holds numbers of a type"):
        read.open_file(tmp_path / "x")


@pytest.mark.parametrize("sizes", [(5, 1), (2, 4), (-1, 1), (5, 0)])
def test_tensors_that_do_not_fit_their_storage_are_refused(sizes):
    shape, stride = sizes
    with pytest.raises(pickle.UnpicklingError, match="does not fit its storage|not made of"):
        pth._tensor(np.arange(4), 0, (shape,), (stride,))
