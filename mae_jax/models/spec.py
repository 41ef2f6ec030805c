"""The one description of a network.

Every module of `models/`, the FLOP counts, the names of other families and the JSON beside weights
read `ModelSpec`. How a network is run, which changes no parameter, is in compute.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mae_jax.errors import UserError
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.channel_groups import Groups, parse_groups

Size = tuple[int, int]  # (height, width)


def patch_grid(image_size: Size, patch_size: Size) -> Size:
    """Return the rows and columns of patches.

    Raises:
      UserError: the image is not a whole number of patches.
    """
    if len(image_size) != 2 or len(patch_size) != 2:
        raise UserError(
            f"image_size={tuple(image_size)} and patch_size={tuple(patch_size)} are written as"
            " (height, width), such as (224, 224) and (16, 16)"
        )
    for side, image, patch in zip(("high", "wide"), image_size, patch_size, strict=True):
        if patch < 1 or image < patch or image % patch:
            below = max(image // max(patch, 1), 1) * patch
            raise UserError(
                f"an image {image} pixels {side} is not a whole number of patches of {patch}:"
                f" choose an image size such as {below} or {below + patch}, or another patch size"
            )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


@dataclass(frozen=True)
class ViTSpec:
    """A stack of Transformer blocks with its position table: an encoder, or a decoder.

    Args:
      mlp_width: the width between the two layers of an MLP.
      drop_path: the rate of the last block; rates grow linearly from 0 at the first.
      trained_positions: the position table is a parameter; otherwise it is sine-cosine.
      block: options of the blocks (config.model.block); None = those of the paper.
      name: what precedes the keys in error messages, such as 'decoder_'.

    Raises:
      UserError: a size below 1, a width that the heads do not divide, a rate outside [0, 1).
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    drop_path: float = 0.0
    trained_positions: bool = False
    block: BlockOptions | None = None
    name: dataclasses.InitVar[str] = ""

    def __post_init__(self, name: str) -> None:
        for key in ("width", "heads"):
            if getattr(self, key) < 1:
                raise UserError(f"{name}{key}={getattr(self, key)} must be at least 1")
        if self.mlp_width < 1:
            raise UserError(f"mlp_ratio leaves nothing inside the MLPs of {name}width={self.width}")
        if self.width % self.heads:
            raise UserError(
                f"{name}width={self.width} is not divisible by {name}heads={self.heads}: choose a"
                f" multiple such as {name}width={(self.width // self.heads + 1) * self.heads}"
            )
        if self.width % 4:
            raise UserError(
                f"{name}width={self.width}: sine-cosine positions need a width divisible by 4"
            )
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path={self.drop_path} must be at least 0 and below 1")
        if self.block and self.block.rope and self.width // self.heads % 4:
            raise UserError(
                f"config.model.block.rope={self.block.rope}: {name}width / {name}heads ="
                f" {self.width // self.heads} must be divisible by 4, since two numbers are turned"
                " by an angle of the row and two by one of the column"
            )

    @property
    def registers(self) -> int:
        """R, the tokens beside those of the image."""
        return self.block.registers if self.block else 0


@dataclass(frozen=True)
class ModelSpec:
    """A network and the images that it takes.

    An encoder alone, a masked autoencoder (with a `decoder`) or a classifier (with `classes`).

    Args:
      mean, std: one number for each channel, of pixels scaled to 0..1.
      value_range: pixel values that are scaled to 0 and 1; () = those of 8 bits, 0 and 255.
      target_dim: how many numbers the decoder predicts for each patch (T); 0 = `patch_dim`.
      cls_tokens: class tokens, each with a position of its own; a feature "cls" is their mean.
      channel_groups: channels of each token of a patch, see channel_groups.py; () = all of one.
      tokens_in_encoder: the encoder sees hidden patches too, as mask tokens (paper, Table 1c).
      target, mask_ratio: what the decoder predicts, and the share of hidden patches in training.
      classes, pool: of the head. "avg" reads the mean of the patches, "cls" the cls token.

    Raises:
      UserError: sizes that do not fit each other.
    """

    image_size: Size
    patch_size: Size
    channels: int
    encoder: ViTSpec
    decoder: ViTSpec | None = None
    target_dim: int = 0
    cls_tokens: int = 1
    channel_groups: Groups = ()
    tokens_in_encoder: bool = False
    target: str = "norm_pixels"
    mask_ratio: float = 0.75
    classes: int = 0
    pool: Literal["avg", "cls"] = "cls"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    value_range: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        patch_grid(self.image_size, self.patch_size)
        if self.channels < 1:
            raise UserError(f"channels={self.channels} must be at least 1")
        if self.pool not in ("avg", "cls"):
            raise UserError(f"pool={self.pool!r} is unknown: choose avg or cls")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise UserError(
                    f"{name} has {len(getattr(self, name))} numbers for images of {self.channels}"
                    " channels: give one for each channel"
                )
        if self.channel_groups and self.encoder.block and self.encoder.block.rope:
            raise UserError("config.model.block.rope turns patches, not their channel_groups")
        if self.decoder and not self.target_dim:
            object.__setattr__(self, "target_dim", self.patch_dim)

    @property
    def grid(self) -> Size:
        """Rows and columns of patches."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """L, the patches of an image, each counted for every channel group."""
        return math.prod(self.grid) * self.num_groups

    @property
    def num_groups(self) -> int:
        """The number of channel groups; 1 without any."""
        return max(len(self.channel_groups), 1)

    @property
    def patch_dim(self) -> int:
        """P, the numbers of a patch."""
        return math.prod(self.patch_size) * self.channels

    @property
    def final_norm(self) -> bool:
        """True if the encoder ends in a LayerNorm; a classifier that averages has its own."""
        return not self.classes or self.pool == "cls"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> "ModelSpec":
        """Return the network of a config: `config.to_dict()`, or the config.json of a workdir.

        Args:
          config: nested dicts with `model`, `data.mean` and `data.std`.
          changes: fields that the config does not say, such as `classes` and `target_dim`.

        Raises:
          UserError: sizes that do not fit each other.
        """
        model, decoder = config["model"], None
        if "decoder_width" in model and not changes.get("classes"):
            decoder = _vit(model, "decoder_")
        fields: dict[str, Any] = {
            "image_size": tuple(model["image_size"]),
            "patch_size": tuple(model["patch_size"]),
            "channels": model["channels"],
            "encoder": _vit(model, trained_positions=bool(changes.get("classes"))),
            "decoder": decoder,
            "cls_tokens": model.get("cls_tokens", 1),
            "channel_groups": parse_groups(model.get("channel_groups", ()), model["channels"]),
            "tokens_in_encoder": config.get("masking", {}).get("tokens_in_encoder", False),
            "target": config.get("target", {}).get("name", "norm_pixels"),
            "mask_ratio": config.get("mask_ratio", 0.75),
            "pool": model.get("pool", "cls"),
            "mean": tuple(config["data"]["mean"]),
            "std": tuple(config["data"]["std"]),
            "value_range": tuple(config["data"].get("value_range", ())),
        }
        return cls(**fields | changes)


def _vit(model: Mapping[str, Any], prefix: str = "", trained_positions: bool = False) -> ViTSpec:
    width = model[f"{prefix}width"]
    if model[f"{prefix}depth"] < 1:
        raise UserError(f"{prefix}depth={model[f'{prefix}depth']} must be at least 1")
    block = BlockOptions.from_config(model.get("block", {}))
    return ViTSpec(
        width,
        model[f"{prefix}depth"],
        model[f"{prefix}heads"],
        int(width * model.get("mlp_ratio", 4.0) + 1e-6),  # a ratio such as 60 / 44 gives 60
        drop_path=0.0 if prefix else model.get("drop_path", 0.0),
        trained_positions=trained_positions or model.get("cls_tokens", 1) > 1,
        block=block.of_decoder() if block and prefix else block,
        name=prefix,
    )
