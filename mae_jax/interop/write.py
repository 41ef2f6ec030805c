"""Write our parameters as the files of the PyTorch families, whole or not at all."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mae_jax import files
from mae_jax.errors import UserError
from mae_jax.interop.names import to_theirs
from mae_jax.models.spec import ModelSpec


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or folder, renamed if the body succeeds.

    Raises:
      UserError: `path` is there already, or its folder is not.
    """
    if path.exists():
        raise UserError(f"{path} is there already: choose another name, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {str(path.absolute().parent)!r}")
    with files.replacing(path) as part:
        yield Path(part)


def refuse_pth(path: Path) -> None:
    """Check that a file of weights is not to be named as PyTorch's own format."""
    if path.suffix in (".pth", ".pt", ".bin"):
        raise UserError(
            f"{path}: {path.suffix} files are read, not written. Name the output"
            f" {path.with_suffix('.safetensors').name}: PyTorch reads safetensors files with"
            " safetensors.torch.load_file"
        )


def official(path: Path, spec: ModelSpec, params: Mapping) -> None:
    """Write a .safetensors file with the official names."""
    _write(path, to_theirs(params, spec, "official"))


def timm(path: Path, spec: ModelSpec, params: Mapping) -> None:
    """Write a .safetensors with timm's names, for `timm.create_model(..., checkpoint_path=PATH)`.

    Raises:
      UserError: timm has no decoder.
    """
    if spec.decoder:
        raise UserError("timm has no decoder of masked autoencoders: convert with --part=encoder")
    official(path, spec, params)


def hf(path: Path, spec: ModelSpec, params: Mapping, about: Mapping[str, str]) -> None:
    """Write a directory for `from_pretrained`: config, weights, preprocessing and model card.

    With a decoder it is a ViTMAEForPreTraining; without, a ViTModel, which ViTMAEModel reads as
    well; with a head, a ViTForImageClassification.

    Raises:
      UserError: a head on averaged patches, which transformers' ViT has not; a decoder of anything
        but pixels.
    """
    if not spec.final_norm:
        raise UserError(
            "transformers' ViTForImageClassification reads the cls token; this classifier averages"
            " patches (global_pool) and cannot be written for it: convert --to=timm or official"
        )
    if spec.decoder and spec.target not in ("pixels", "norm_pixels"):
        raise UserError(
            f"the decoder predicts {spec.target}, transformers' ViTMAE only pixels: convert with"
            " --part=encoder"
        )
    state = to_theirs(params, spec, "hf")
    if not (spec.decoder or spec.classes):
        state = {name.removeprefix("vit."): x for name, x in state.items()}
    path.mkdir()
    _write(path / "model.safetensors", state)
    for name, content in (
        ("config.json", _config(spec)),
        ("preprocessor_config.json", _preprocessor(spec)),
    ):
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    (path / "README.md").write_text(_card(spec, about), encoding="utf-8")


def _write(path: Path, state: Mapping[str, np.ndarray]) -> None:
    # The library writes an array's memory whatever its strides, and makes files that only their
    # owner can read. transformers refuses files that are not marked as PyTorch's.
    tensors = {name: np.ascontiguousarray(x) for name, x in state.items()}
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _architecture(spec: ModelSpec) -> str:
    if spec.decoder:
        return "ViTMAEForPreTraining"
    return "ViTForImageClassification" if spec.classes else "ViTModel"


def _side(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


def _config(spec: ModelSpec) -> dict:
    encoder, decoder = spec.encoder, spec.decoder
    config: dict[str, Any] = {
        "architectures": [_architecture(spec)],
        "model_type": "vit_mae" if decoder else "vit",
        "image_size": _side(spec.image_size),
        "patch_size": _side(spec.patch_size),
        "num_channels": spec.channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
    if decoder:
        config |= {
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": decoder.hidden,
            "mask_ratio": spec.mask_ratio,
            "norm_pix_loss": spec.target == "norm_pixels",
        }
    if spec.classes:
        labels = {str(i): f"LABEL_{i}" for i in range(spec.classes)}
        config |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    return config


def _preprocessor(spec: ModelSpec) -> dict:
    height, width = spec.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _card(spec: ModelSpec, about: Mapping[str, str]) -> str:
    architecture = _architecture(spec)
    options = ", add_pooling_layer=False" if architecture == "ViTModel" else ""
    encoder, (rows, columns) = spec.encoder, spec.patch_size
    size = " x ".join(map(str, spec.image_size))
    lines = [
        f"- Network: ViT, width {encoder.width}, depth {encoder.depth}, {encoder.heads} heads,"
        f" patches of {rows} x {columns}, images of {size} with {spec.channels} channels"
    ]
    if spec.decoder:
        target = {
            "pixels": "pixels, after mean and std normalisation",
            "norm_pixels": "pixels of each patch, normalised by the patch's mean and deviation",
        }[spec.target]
        lines.append(f"- Target of the decoder: {target}; mask ratio {spec.mask_ratio}")
    for key, title in (("data", "Data"), ("recipe", "Recipe"), ("origin", "Converted from")):
        lines.append(
            f"- {title}: {about.get(key) or 'not recorded in the source of these weights'}"
        )
    lines.append(f"- Licence: {about.get('licence') or 'that of the source; not recorded here'}")
    return f"""---
library_name: transformers
tags: [masked-autoencoder, vision]
---
# Masked autoencoder (He et al., arXiv 2111.06377)

{chr(10).join(lines)}

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("PATH"{options})
```

Converted with mae_jax. LayerNorm's epsilon is 1e-6, with which MAE's weights were trained.
"""
