"""Options of blocks, config.model.block: a group of keys that the plain recipe does not name."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mae_jax.errors import UserError, nearest


@dataclass(frozen=True)
class BlockOptions:
    """Options of the blocks of an encoder or decoder; models/modern.py has what they do.

    Args:
      registers: learned tokens beside those of the image; an encoder's only (arXiv 2309.16588).
      qk_norm: an RMSNorm of queries and keys of each head, before they meet (arXiv 2302.05442).
      layer_scale: the initial scale of both branches of a block; 0 = none (arXiv 2103.17239).
      norm: "rms" in place of every LayerNorm, that after the blocks too (arXiv 1910.07467).
      rope: the base of the frequencies of 2-D rotary positions, 100 in arXiv 2508.10104; 0 = none.
      eps: what every norm but those of qk_norm adds to the variance; DINOv3 has 1e-5.

    Raises:
      UserError: an unknown norm.
    """

    registers: int = 0
    qk_norm: bool = False
    layer_scale: float = 0.0
    norm: Literal["layer", "rms"] = "layer"
    rope: float = 0.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.norm not in ("layer", "rms"):
            raise UserError(f"config.model.block.norm={self.norm!r}: give layer or rms")

    def __str__(self) -> str:
        """Return the options that are not the paper's, such as 'registers=4, norm=rms'."""
        default = BlockOptions()
        values = dataclasses.asdict(self).items()
        return ", ".join(f"{name}={x}" for name, x in values if x != getattr(default, name))

    @classmethod
    def from_config(cls, group: Mapping[str, Any]) -> "BlockOptions | None":
        """Return the options of config.model.block, or None if all are the paper's.

        Raises:
          UserError: there is no such option.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in group:
            if name not in known:
                raise UserError(f"config.model.block.{name}: no such option{nearest(name, known)}")
        return cls(**group).or_none()

    def of_decoder(self) -> "BlockOptions | None":
        """Return the options of the decoder beside an encoder with these: it has no registers."""
        return dataclasses.replace(self, registers=0).or_none()

    def or_none(self) -> "BlockOptions | None":
        """Return None if the options are those of the paper's block."""
        return None if self == BlockOptions() else self
