"""Analytic FLOPs of the networks, and the peaks of chips."""

from typing import NamedTuple

from mae_jax.models.spec import ModelSpec, ViTSpec


class Chip(NamedTuple):
    """One device as JAX counts them: a chip, or for TPU v2 and v3 one of its two cores."""

    tflops: float  # dense bf16 peak, TFLOP/s
    hbm: float | None = None  # memory, GiB
    hbm_rate: float | None = None  # GB/s
    link_rate: float | None = None  # GB/s sent to its neighbours, over all links at once
    slow_rate: float | None = None  # GB/s sent between slices or nodes
    source: str = ""


# Of the TPUs' links: half of what the page calls bidirectional bandwidth per chip, or where it has
# none (v3, v4) the all-reduce bandwidth of a Pod over its chips; on v5e and v6e the two agree.
CHIPS = {
    "TPU v2": Chip(22.5, source="cloud.google.com/tpu/docs/v2"),
    "TPU v3": Chip(61.5, 16, 450, 166, source="cloud.google.com/tpu/docs/v3, per core"),
    "TPU v4": Chip(275, 32, 1200, 268, source="cloud.google.com/tpu/docs/v4"),
    "TPU v5 lite": Chip(197, 16, 819, 200, 3.1, "cloud.google.com/tpu/docs/v5e"),
    "TPU v5": Chip(459, 95, 2765, 600, 6.25, "cloud.google.com/tpu/docs/v5p"),
    "TPU v6 lite": Chip(918, 32, 1638, 400, source="cloud.google.com/tpu/docs/v6e"),
    "NVIDIA V100": Chip(125, 32, 900, 150, source="NVIDIA V100 SXM2 data sheet"),
    "NVIDIA A100": Chip(312, 80, 2039, 300, source="NVIDIA A100 80GB SXM data sheet"),
    "NVIDIA H100": Chip(989, 80, 3350, 450, source="NVIDIA H100 SXM data sheet"),
    "NVIDIA H200": Chip(989, 140, 4800, 450, source="NVIDIA H200 SXM data sheet"),
}
ALIASES = {
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
    "Tesla V100": "NVIDIA V100",
}


def chip(device_kind: str) -> Chip | None:
    """Return the entry of a device, or None for an unknown one."""
    names = [name for name in (*CHIPS, *ALIASES) if device_kind.startswith(name)]
    if not names:
        return None
    longest = max(names, key=len)
    return CHIPS[ALIASES.get(longest, longest)]


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of one device in FLOP/s (bf16, dense), or None for an unknown one."""
    found = chip(device_kind)
    return found.tflops * 1e12 if found else None


def stack(vit: ViTSpec, tokens: int) -> float:
    """Return forward FLOPs per image of a stack of blocks on `tokens` tokens.

    Counts matrix products only, two for each multiply-add.
    """
    linear = 4 * vit.width**2 + 2 * vit.width * vit.mlp_width
    attention = 2 * tokens * vit.width
    return 2.0 * vit.depth * tokens * (linear + attention)


def encoder(spec: ModelSpec, patches: int | None = None) -> float:
    """Return forward FLOPs per image of patch embedding and blocks; `patches` None = all."""
    patches = spec.num_patches if patches is None else patches
    embed = 2.0 * patches * spec.patch_dim * spec.encoder.width
    return embed + stack(spec.encoder, patches + spec.cls_tokens + spec.encoder.registers)


def mae(spec: ModelSpec, kept: int) -> float:
    """Return forward FLOPs per image of a masked autoencoder; a training step costs three times."""
    assert spec.decoder is not None
    seen = spec.num_patches if spec.tokens_in_encoder else kept
    embed = (seen + spec.cls_tokens) * spec.encoder.width
    pred = spec.num_patches * spec.target_dim
    ends = 2.0 * spec.decoder.width * (embed + pred)
    return encoder(spec, seen) + ends + stack(spec.decoder, spec.num_patches + spec.cls_tokens)


def crossmae(spec: ModelSpec, kept: int, predicted: int, maps: int) -> float:
    """Return forward FLOPs per image of models/crossmae.py.

    Args:
      kept, predicted: patches that the encoder sees, and that the decoder predicts.
      maps: tokens before and after encoder blocks, that the decoder reads.
    """
    assert spec.decoder is not None
    vit, width, tokens = spec.decoder, spec.encoder.width, kept + 1
    of_tokens = tokens * width * (maps + 2 * vit.width)
    of_query = 2 * vit.width**2 + 2 * tokens * vit.width + 2 * vit.width * vit.mlp_width
    pred = predicted * vit.width * spec.target_dim
    return encoder(spec, kept) + 2.0 * (vit.depth * (of_tokens + predicted * of_query) + pred)
