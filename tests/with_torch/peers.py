"""Against the peers themselves: transformers, timm and torch, both directions.

Not part of the ordinary tests, which need no PyTorch. In an environment with the extra `torch`:

    python -m pytest tests/with_torch/peers.py

`python tests/with_torch/peers.py tests/data` writes the files of tests/data that transformers, timm
and torch made, from which the ordinary tests take the same numbers.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mae_jax
from mae_jax.commands import convert
from mae_jax.interop import pth
from mae_jax.models import masking
from mae_jax.models.posemb import sincos_2d

TINY = dict(
    image_size=32,
    patch_size=8,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    decoder_hidden_size=8,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
)
SIZES = {"tiny": TINY, "base": {}}  # transformers' defaults are B/16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = Path(__file__).parents[2] / "weights/cifar10-s"
HEADS = ["--heads=2", "--decoder_heads=2"]  # of TINY, for files that do not say
EXACT = dict(layer_norm_eps=1e-6, norm_pix_loss=True, attn_implementation="eager")


def vitmae(size: str, positions: str = "sincos"):
    """A random ViTMAEForPreTraining; every parameter differs from a constant."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES[size], **EXACT)).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.02)
    set_positions(model, positions)
    return model


def set_positions(model, positions: str):
    """Give a ViTMAE the sine-cosine tables, exact in float32, or random ones."""
    import torch

    grid = (model.config.image_size // model.config.patch_size,) * 2
    with torch.no_grad():
        for x in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            if positions == "sincos":
                x.copy_(torch.tensor(sincos_2d(x.shape[-1], grid)))
            else:
                x.copy_(torch.randn_like(x) * 0.3)


def run_vitmae(model, images: np.ndarray, noise: np.ndarray):
    import torch

    with torch.no_grad():
        out = model(pixel_values=pixels_of(images), noise=torch.tensor(noise))
    return out.logits.numpy(), float(out.loss), out.mask.numpy()


def pixels_of(images: np.ndarray):
    """Return images of levels as PyTorch's models take them: normalised, (B, C, H, W)."""
    import torch

    normalized = ((images.astype(np.float32) / 255 - MEAN) / STD).astype(np.float32)
    return torch.tensor(normalized).permute(0, 3, 1, 2)


def draw(model) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    side = model.config.image_size
    noise = rng.random((2, (side // model.config.patch_size) ** 2), np.float32)
    return rng.integers(0, 256, (2, side, side, 3), np.uint8), noise


def assert_close(ours, theirs):
    worst = np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs))
    print(f"relative difference {worst:.2e}")
    assert worst <= 1e-5


def ours(path, images, noise):
    """Prediction and loss of mae_jax for weights of any format, of images as in `pixels_of`."""
    from mae_jax.models import targets
    from mae_jax.models.mae import masked_mse

    model, params = mae_jax.load(path, mean=MEAN, std=STD)
    kept = masking.num_kept(noise.shape[1], model.spec.mask_ratio)
    mask = masking.keep_lowest(jnp.asarray(noise), kept)
    out = model.predict(params, images, mask)
    target = targets.norm_pixels(model.normalize(images), model.spec.patch_size)
    return out.pred_BLT, float(masked_mse(out.pred_BLT, target, mask.mask_BL)), mask.mask_BL


def run(*arguments) -> None:
    assert convert.main([str(x) for x in arguments]) == 0


@pytest.mark.parametrize(
    ("size", "positions"), [("tiny", "sincos"), ("tiny", "random"), ("base", "sincos")]
)
def test_vitmae_there_and_back(size, positions, tmp_path):
    from transformers import ViTMAEForPreTraining

    theirs = vitmae(size, positions)
    theirs.save_pretrained(tmp_path / "in")
    images, noise = draw(theirs)
    pred, loss, mask = run_vitmae(theirs, images, noise)
    our_pred, our_loss, our_mask = ours(tmp_path / "in", images, noise)
    assert_close(our_pred, pred)
    assert_close(our_loss, loss)
    np.testing.assert_array_equal(our_mask, mask)

    run(tmp_path / "in", tmp_path / "ours", "--to=ours")
    run(tmp_path / "ours", tmp_path / "out", "--to=hf")
    model, info = ViTMAEForPreTraining.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    for (name, a), b in zip(theirs.state_dict().items(), model.state_dict().values(), strict=True):
        if positions == "random" or "pos" not in name:
            np.testing.assert_array_equal(a, b, name)
    assert_close(run_vitmae(model.eval(), images, noise)[0], pred)


def test_the_published_weights_predict_the_same_in_transformers():
    from transformers import ViTMAEForPreTraining

    theirs = ViTMAEForPreTraining.from_pretrained(
        PUBLISHED, dtype="float32", attn_implementation="eager"
    ).eval()
    set_positions(theirs, "sincos")  # the file's are float16; ours are computed anew
    images, noise = draw(theirs)
    pred, loss, mask = run_vitmae(theirs, images, noise)
    our_pred, our_loss, our_mask = ours(PUBLISHED, images, noise)
    assert_close(our_pred, pred)
    assert_close(our_loss, loss)
    np.testing.assert_array_equal(our_mask, mask)


def test_an_encoder_loads_as_vit_and_as_vitmae_without_complaint(tmp_path, caplog):
    import torch
    from transformers import ViTMAEModel, ViTModel

    vitmae("tiny").save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", "--to=hf", "--part=encoder")
    images, _ = draw(vitmae("tiny"))
    model, params = mae_jax.load(tmp_path / "out")
    tokens = model.encode(params, images)
    for cls, options in ((ViTModel, {"add_pooling_layer": False}), (ViTMAEModel, {})):
        peer, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
        assert not any(info.values()), (cls, info)
        if cls is ViTModel:
            with torch.no_grad():
                assert_close(tokens, peer.eval()(pixels_of(images)).last_hidden_state.numpy())


def test_a_classifier_there_and_back(tmp_path):
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    encoder = {k: v for k, v in TINY.items() if not k.startswith("decoder")}
    config = ViTConfig(**encoder, num_labels=5, layer_norm_eps=1e-6, initializer_range=0.1)
    ViTForImageClassification(config).save_pretrained(tmp_path / "in")
    peer = ViTForImageClassification.from_pretrained(tmp_path / "in").eval()
    images, _ = draw(peer)
    pixels = pixels_of(images)
    model, params = mae_jax.load(tmp_path / "in")
    with torch.no_grad():
        assert_close(model.classify(params, images).logits_BY, peer(pixels).logits.numpy())
    run(tmp_path / "in", tmp_path / "out", "--to=hf")
    back, info = ViTForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    for a, b in zip(peer.parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm_loads_strictly_and_gives_equal_features(pool, tmp_path):
    import timm
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(0)
    classes = 0 if pool == "token" else 7
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    name = "vit_base_patch16_224"
    peer = timm.create_model(name, global_pool=pool, num_classes=classes, **sizes).eval()
    torch.save(peer.state_dict(), tmp_path / "in.pth")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    pixels = pixels_of(images)
    model, params = mae_jax.load(tmp_path / "in.pth", heads=2)
    with torch.no_grad():
        if classes:
            assert_close(model.classify(params, images).logits_BY, peer(pixels).numpy())
        else:
            assert_close(model.encode(params, images), peer.forward_features(pixels).numpy())
    run(tmp_path / "in.pth", tmp_path / "out.safetensors", "--to=timm", "--heads=2")
    peer.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)


def test_torch_reads_what_is_written_and_what_torch_writes_is_read(tmp_path):
    import torch
    from safetensors.torch import load_file

    vitmae("tiny").save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "a.safetensors", "--to=official")
    theirs = load_file(tmp_path / "a.safetensors")
    torch.save({"model": theirs}, tmp_path / "a.pth")
    own = pth.read(tmp_path / "a.pth")["model"]
    assert list(theirs) == list(own)
    assert all(np.array_equal(theirs[name].numpy(), own[name]) for name in own)
    run(tmp_path / "a.pth", tmp_path / "b.safetensors", "--to=official", *HEADS)
    again = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(theirs[name], again[name]) for name in theirs | again)


def write_golden(directory: Path) -> None:
    """The files of tests/data that the peers make; see tests/data/README.md."""
    import timm
    import torch

    model = vitmae("tiny", "random")
    model.save_pretrained(directory / "hf_vitmae_tiny")
    images, noise = draw(model)
    pred, loss, mask = run_vitmae(model, images, noise)
    arrays = dict(images=images, noise=noise, pred=pred, loss=loss, mask=mask)
    np.savez(directory / "hf_vitmae_tiny.npz", **arrays)

    linear = torch.nn.Linear(3, 2)
    checkpoint = {
        "model": linear.state_dict(),
        "optimizer": torch.optim.AdamW(linear.parameters()).state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(norm_pix_loss=True, blr=1.5e-4, device="cpu"),
        "other": {
            "half": torch.arange(4).half(),
            "bfloat16": torch.arange(4).bfloat16(),
            "transposed": torch.arange(6).reshape(2, 3).T,
            "part": torch.arange(10)[3:5],
            "number": torch.tensor(7),
        },
    }
    torch.save(checkpoint, directory / "torch_checkpoint.pth")
    shapes = {}
    for label, options in (
        ("vit_base_patch16_224.mae", {"num_classes": 0}),
        ("vit_base_patch16_224, global_pool=avg", {"num_classes": 1000, "global_pool": "avg"}),
    ):
        with torch.device("meta"):
            peer = timm.create_model(label.split(",")[0], **options)
        shapes[label] = {name: list(x.shape) for name, x in peer.state_dict().items()}
    (directory / "timm_shapes.json").write_text(json.dumps(shapes, indent=0) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    write_golden(Path(sys.argv[1]))
