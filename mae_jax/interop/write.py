"""Our parameters to the files of the PyTorch families, whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mae_jax.errors import UserError
from mae_jax.interop import pth, safetensors
from mae_jax.interop.names import Spec, to_theirs


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which becomes `path` at the end and vanishes on an error.

    Raises:
      UserError: `path` is there already, or its folder is not.
    """
    if path.exists():
        raise UserError(f"{path} is there already: choose another name, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {str(path.absolute().parent)!r}")
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def official(path: Path, spec: Spec, params: Mapping) -> None:
    """A .pth with the official names: {"model": state dict}."""
    pth.write(path, to_theirs(params, spec, "official"))


def timm(path: Path, spec: Spec, params: Mapping) -> None:
    """A .safetensors with timm's names, for `timm.create_model(..., checkpoint_path=PATH)`.

    Raises:
      UserError: timm has no decoder.
    """
    if spec.decoder_width:
        raise UserError("timm has no decoder of masked autoencoders: convert with --part=encoder")
    safetensors.write(path, to_theirs(params, spec, "official"))


def hf(path: Path, spec: Spec, params: Mapping, about: Mapping[str, str]) -> None:
    """A directory for `from_pretrained`: config, weights, preprocessing and model card.

    With a decoder it is a ViTMAEForPreTraining; without, a ViTModel, which ViTMAEModel reads as
    well; with a head, a ViTForImageClassification.

    Raises:
      UserError: a head on averaged patches, which transformers' ViT has not; a decoder of anything
        but pixels.
    """
    if spec.classes and spec.pool == "avg":
        raise UserError(
            "transformers' ViTForImageClassification reads the cls token; this classifier averages"
            " patches (global_pool) and cannot be written for it: convert --to=timm or official"
        )
    if spec.decoder_width and spec.target not in ("pixels", "norm_pixels"):
        raise UserError(
            f"the decoder predicts {spec.target}, transformers' ViTMAE only pixels: convert with"
            " --part=encoder"
        )
    state = to_theirs(params, spec, "hf")
    if not (spec.decoder_width or spec.classes):
        state = {name.removeprefix("vit."): x for name, x in state.items()}
    path.mkdir()
    safetensors.write(path / "model.safetensors", state)
    for name, content in (
        ("config.json", _config(spec)),
        ("preprocessor_config.json", _preprocessor(spec)),
    ):
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    (path / "README.md").write_text(_card(spec, about), encoding="utf-8")


def _architecture(spec: Spec) -> str:
    if spec.decoder_width:
        return "ViTMAEForPreTraining"
    return "ViTForImageClassification" if spec.classes else "ViTModel"


def _side(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


def _config(spec: Spec) -> dict:
    config: dict[str, Any] = {
        "architectures": [_architecture(spec)],
        "model_type": "vit_mae" if spec.decoder_width else "vit",
        "image_size": _side(spec.image_size),
        "patch_size": _side(spec.patch),
        "num_channels": spec.channels,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
    if spec.decoder_width:
        config |= {
            "decoder_hidden_size": spec.decoder_width,
            "decoder_num_hidden_layers": spec.decoder_depth,
            "decoder_num_attention_heads": spec.decoder_heads,
            "decoder_intermediate_size": spec.decoder_hidden,
            "mask_ratio": spec.mask_ratio,
            "norm_pix_loss": spec.target == "norm_pixels",
        }
    if spec.classes:
        labels = {str(i): f"LABEL_{i}" for i in range(spec.classes)}
        config |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    return config


def _preprocessor(spec: Spec) -> dict:
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


def _card(spec: Spec, about: Mapping[str, str]) -> str:
    architecture = _architecture(spec)
    options = ", add_pooling_layer=False" if architecture == "ViTModel" else ""
    unknown = "not recorded in the source of these weights"
    size = " x ".join(map(str, spec.image_size))
    rows = [
        f"- Network: ViT, width {spec.width}, depth {spec.depth}, {spec.heads} heads, patches of"
        f" {spec.patch[0]} x {spec.patch[1]}, images of {size} with {spec.channels} channels"
    ]
    if spec.decoder_width:
        target = {
            "pixels": "pixels, after mean and std normalisation",
            "norm_pixels": "pixels of each patch, normalised by the patch's mean and deviation",
        }.get(spec.target, spec.target)
        rows.append(f"- Target of the decoder: {target}; mask ratio {spec.mask_ratio}")
    rows += [
        f"- {title}: {about.get(key) or unknown}"
        for key, title in (("data", "Data"), ("recipe", "Recipe"), ("origin", "Converted from"))
    ]
    rows.append(f"- Licence: {about.get('licence') or 'that of the source; not recorded here'}")
    return f"""---
library_name: transformers
tags: [masked-autoencoder, vision]
---
# Masked autoencoder (He et al., arXiv 2111.06377)

{chr(10).join(rows)}

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("PATH"{options})
```

Converted with mae_jax. LayerNorm's epsilon is 1e-6, with which MAE's weights were trained.
"""
