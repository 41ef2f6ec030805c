"""Write our parameters as the files of the PyTorch families, whole or not at all."""

import contextlib
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
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()  # an empty folder is as good as none
    if path.exists():
        raise UserError(f"{path} is there already: choose another name, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {str(path.absolute().parent)!r}")
    with files.replacing(path) as part:
        yield Path(part)


def refuse_pth(path: Path) -> None:
    """Raise UserError if an output has the name of PyTorch's own format, which is only read."""
    if path.suffix in (".pth", ".pt", ".bin"):
        raise UserError(
            f"{path}: {path.suffix} files are read, not written. Name the output"
            f" {path.with_suffix('.safetensors').name}: PyTorch reads safetensors files with"
            " safetensors.torch.load_file"
        )


def not_in_file(spec: ModelSpec) -> str:
    """Return the flags that say of a file without a config how its images are normalised.

    '' where that is what readers take for granted: mean and std of ImageNet, of 8 bits.
    """
    flags = [
        f"--{name}={','.join(map(str, getattr(spec, name)))}"
        for name in ("mean", "std", "value_range")
        if getattr(spec, name) != getattr(ModelSpec, name)
    ]
    return " ".join(flags)


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


def hf(path: Path, spec: ModelSpec, params: Mapping) -> None:
    """Write a directory for `from_pretrained`: config, weights and preprocessing.

    With a decoder it is a ViTMAEForPreTraining; without, a ViTModel, which ViTMAEModel reads as
    well; with a head, a ViTForImageClassification.

    Raises:
      UserError: the head reads averaged patches, which transformers' ViT does not know, or the
        decoder predicts something other than pixels.
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
    height, width = spec.image_size
    low, high = spec.value_range or (0, 255)
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "rescale_factor": 1 / (high - low),  # there is no offset there: it goes into the mean
        "image_mean": [mean + low / (high - low) for mean in spec.mean],
        "image_std": spec.std,
    }
    if low:
        preprocessor["value_low"] = low  # read by read.py, which takes it from the mean again
    path.mkdir()
    _write(path / "model.safetensors", state)
    files.write_json(path / "config.json", _config(spec))
    files.write_json(path / "preprocessor_config.json", preprocessor)


def _write(path: Path, state: Mapping[str, np.ndarray]) -> None:
    # The library writes an array's memory whatever its strides, and makes files that only their
    # owner can read. transformers refuses files that are not marked as PyTorch's.
    tensors = {name: np.ascontiguousarray(x) for name, x in state.items()}
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _config(spec: ModelSpec) -> dict[str, Any]:
    """Return what differs from transformers' defaults, and the sizes."""
    encoder, decoder = spec.encoder, spec.decoder
    config: dict[str, Any] = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": _side(spec.image_size),
        "patch_size": _side(spec.patch_size),
        "num_channels": spec.channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width,
        "layer_norm_eps": 1e-6,
    }
    if decoder:
        config |= {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": decoder.mlp_width,
            "mask_ratio": spec.mask_ratio,
            "norm_pix_loss": spec.target == "norm_pixels",
        }
    if spec.classes:
        labels = {i: f"LABEL_{i}" for i in range(spec.classes)}
        config["architectures"] = ["ViTForImageClassification"]
        config |= {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    return config


def _side(sides: tuple[int, int]) -> int | tuple[int, int]:
    return sides[0] if sides[0] == sides[1] else sides
