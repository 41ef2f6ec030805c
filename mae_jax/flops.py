"""Work and peaks: analytic FLOPs of the networks, and what the chips can do."""

from typing import NamedTuple


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
ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def chip(device_kind: str) -> Chip | None:
    """What a device can do, or None where we do not know it."""
    names = [name for name in (*CHIPS, *ALIASES) if device_kind.startswith(name)]
    if not names:
        return None
    longest = max(names, key=len)
    return CHIPS[ALIASES.get(longest, longest)]


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in FLOP/s (bf16, dense), or None where we do not know it."""
    found = chip(device_kind)
    return found.tflops * 1e12 if found else None


def stack(tokens: int, width: int, depth: int, mlp_ratio: float = 4.0) -> float:
    """Forward FLOPs (2 per multiply-add, matrix products only) of a stack of blocks, per image."""
    linear = (4 + 2 * mlp_ratio) * width * width
    attention = 2 * tokens * width
    return 2.0 * depth * tokens * (linear + attention)


def encoder(tokens: int, values: int, width: int, depth: int, mlp_ratio: float = 4.0) -> float:
    """Forward FLOPs of patch embedding and blocks for `tokens` patches and the cls token."""
    return 2.0 * tokens * values * width + stack(tokens + 1, width, depth, mlp_ratio)


def mae(
    patches: int,
    kept: int,
    values: int,
    *,
    width: int,
    depth: int,
    decoder_width: int,
    decoder_depth: int,
    mlp_ratio: float = 4.0,
) -> float:
    """Forward FLOPs of a masked autoencoder per image; a training step costs three times that."""
    ends = 2.0 * decoder_width * ((kept + 1) * width + (patches + 1) * values)
    return (
        encoder(kept, values, width, depth, mlp_ratio)
        + ends
        + stack(patches + 1, decoder_width, decoder_depth, mlp_ratio)
    )
