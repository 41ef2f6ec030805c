"""Work and peaks: analytic FLOPs of the networks, and what the chips can do."""

# Dense bf16 peak of one chip as JAX counts devices (TPU v2 and v3: one core), in TFLOP/s.
# Sources: the cloud's public TPU pages (v2 to v6e), NVIDIA data sheets (without sparsity).
PEAK_TFLOPS = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA V100": 125.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in FLOP/s (bf16, dense), or None where we do not know it."""
    matches = [name for name in PEAK_TFLOPS if device_kind.startswith(name)]
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12 if matches else None


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
