"""Random tiny DINOv2, DINOv3, Pixio and timm encoders, and what transformers and timm make of them.

In an environment with the extra `torch`, `python tests/with_torch/encoders.py tests/data/encoders`
writes for each a folder as its library saves it, and tokens.npz. tests/test_encoders.py compares.
"""

import json
import sys
from pathlib import Path

import numpy as np

SIZES = ((16, 16), (24, 12), (8, 8))  # of images: that of the positions, and two others
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16)
TIMM = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0)


def images(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, (2, *size, 3), np.uint8)


def pixels_of(levels: np.ndarray):
    """Return images of levels as PyTorch's models take them: normalised, (B, C, H, W)."""
    import torch

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = ((levels.astype(np.float32) / 255 - mean) / std).astype(np.float32)
    return torch.tensor(normalized).permute(0, 3, 1, 2)


def shaken(model, seed: int):
    """Return a model in which no parameter is a constant, ready to be evaluated."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * (0.3 if x.ndim > 1 else 0.2))
    return model.eval()


def of_transformers() -> dict:
    """Return the encoders of transformers by the names of their folders."""
    import transformers as hf

    eager = dict(attn_implementation="eager")
    dinov2 = dict(TINY, mlp_ratio=2, layerscale_value=0.7, **eager)
    dinov3 = dict(TINY, intermediate_size=32, num_register_tokens=3, rope_theta=50.0, **eager)
    pixio = dict(TINY, mlp_ratio=2, n_cls_tokens=3, **eager)
    registers = dict(dinov2, num_register_tokens=3)
    models = {
        "dinov2": hf.Dinov2Model(hf.Dinov2Config(**dinov2)),
        "dinov2_registers": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**registers)),
        "dinov3": hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**dinov3)),
        "pixio": hf.PixioModel(hf.PixioConfig(**pixio)),
    }
    return {name: shaken(model, seed) for seed, (name, model) in enumerate(models.items())}


def of_timm() -> dict:
    """Return encoders of timm by the names of their folders."""
    import timm

    vit, small = "vit_base_patch16_224", dict(TIMM, dynamic_img_size=True)
    registers = dict(small, reg_tokens=3)
    rms = dict(norm_layer="rmsnorm", qk_norm=True)
    models = {
        "timm_registers": (vit, dict(registers, init_values=0.7, no_embed_class=True)),
        "timm_placed_registers": (vit, registers),
        "timm_rms": (vit, dict(TIMM, **rms)),
        "timm_dinov3": ("vit_small_patch16_dinov3", dict(TIMM, dynamic_img_size=True)),
        "timm_dinov3_biases": ("vit_small_patch16_dinov3_qkvb", TIMM),
    }
    made = {name: timm.create_model(kind, **options) for name, (kind, options) in models.items()}
    return {name: shaken(model, seed) for seed, (name, model) in enumerate(made.items())}


def write(directory: Path) -> None:
    """Write the folders and tokens.npz; its keys are NAME/HEIGHTxWIDTH and NAME/block1,
    and images/HEIGHTxWIDTH for the images.
    """
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tokens = {f"images/{size[0]}x{size[1]}": images(size) for size in SIZES}
    for name, model in of_transformers().items():
        model.save_pretrained(directory / name)
        for size in SIZES:
            with torch.no_grad():
                out = model(pixels_of(images(size)), output_hidden_states=True)
            tokens[f"{name}/{size[0]}x{size[1]}"] = out.last_hidden_state.numpy()
            if size == SIZES[0]:
                tokens[f"{name}/block1"] = out.hidden_states[1].numpy()
    for name, model in of_timm().items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), directory / name / "model.safetensors")
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        images_of = {"input_size": [3, 16, 16], "mean": mean, "std": std}
        config = {"architecture": name, "pretrained_cfg": images_of}
        (directory / name / "config.json").write_text(json.dumps(config) + "\n")
        of_any_size = "registers" in name or name == "timm_dinov3"
        for size in SIZES if of_any_size else SIZES[:1]:
            with torch.no_grad():
                out = model.forward_features(pixels_of(images(size)))
            tokens[f"{name}/{size[0]}x{size[1]}"] = out.numpy()
    np.savez(directory / "tokens.npz", **tokens)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
