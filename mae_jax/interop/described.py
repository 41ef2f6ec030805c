"""The description of a network beside its weights: from shapes and a config.json, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mae_jax.models.block_options import BlockOptions
from mae_jax.models.spec import ModelSpec, ViTSpec


def spec_of(shapes: Mapping[str, tuple], config: Mapping[str, Any]) -> ModelSpec:
    """Return the network whose parameters these are.

    Args:
      shapes: parameter path -> shape, such as "encoder/stack/blocks/attn/qkv/kernel".
      config: of the run; its sizes are replaced by those of `shapes`.
    """

    options = BlockOptions.from_config(config["model"].get("block", {}))

    def vit(side: str) -> ViTSpec:
        depth, width, _, heads, _ = shapes[f"{side}/stack/blocks/attn/qkv/kernel"]
        mlp_width = shapes[f"{side}/stack/blocks/mlp/fc1/kernel"][-1]
        trained = f"{side}/pos_embed" in shapes
        block = options and (options if side == "encoder" else options.of_decoder())
        return ViTSpec(width, depth, heads, mlp_width, 0.0, trained, block)

    classes = shapes["head/kernel"][-1] if "head/kernel" in shapes else 0
    plain = config.get("model", {}).get("decoder", "mae") == "mae"  # else a fork's decoder
    decoded = plain and "decoder/stack/blocks/attn/qkv/kernel" in shapes
    return ModelSpec.from_config(
        config,
        encoder=vit("encoder"),
        decoder=vit("decoder") if decoded else None,
        target_dim=shapes["decoder/pred/kernel"][-1] if decoded else 0,
        cls_tokens=shapes["encoder/cls_token"][1],
        tokens_in_encoder="encoder/mask_token" in shapes,
        classes=classes,
        pool="avg" if "fc_norm/scale" in shapes else "cls",
    )


def encoder_only(spec: ModelSpec) -> ModelSpec:
    """Return the description of the encoder, which has a final norm."""
    return dataclasses.replace(
        spec, decoder=None, target_dim=0, classes=0, pool="cls", tokens_in_encoder=False
    )


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return a config for `ModelSpec.from_config`; shapes of parameters say what it leaves out."""
    e, d = spec.encoder, spec.decoder
    model: dict[str, Any] = {
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "channels": spec.channels,
        "width": e.width,
        "depth": e.depth,
        "heads": e.heads,
        "mlp_ratio": e.mlp_width / e.width,
    }
    if d:
        model |= {"decoder_width": d.width, "decoder_depth": d.depth, "decoder_heads": d.heads}
    if spec.cls_tokens > 1:
        model["cls_tokens"] = spec.cls_tokens
    if spec.channel_groups:
        model["channel_groups"] = spec.channel_groups
    if e.block:
        model["block"] = dataclasses.asdict(e.block)
    if spec.classes:
        model["pool"] = spec.pool
    return {
        "mask_ratio": spec.mask_ratio,
        "target": {"name": spec.target},
        "model": model,
        "data": {"mean": spec.mean, "std": spec.std, "value_range": spec.value_range},
    }
