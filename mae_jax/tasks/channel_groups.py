"""Masked pre-training of images of many bands, with masks of their own for groups of channels.

Name it with `config.task = "channel_groups"` and give config.model.channel_groups, or take the
recipe configs/bands.py. See models/channel_groups.py, also for the shape suffixes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import train
from mae_jax.errors import refuse
from mae_jax.models import channel_groups, mae, masking
from mae_jax.models.channel_groups import Groups
from mae_jax.models.spec import ModelSpec
from mae_jax.tasks import pretrain


@dataclass(frozen=True)
class Task(pretrain.Task):
    """The objective of the paper for the tokens of channel groups.

    The target of a token is that of its patch, for the token's own channels. In evaluations all
    groups of a patch are hidden together, so that nothing of a hidden place is seen.
    """

    @classmethod
    def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> "Task":
        """Return the task of a config such as configs/bands.py.

        Raises:
          UserError: a value of the config cannot work, or the images cannot be opened.
        """
        groups = ModelSpec.from_config(config.to_dict()).channel_groups
        if not groups:
            refuse("task", config.task, "give config.model.channel_groups")
        one_group = ConfigDict(config.to_dict())
        del one_group.model["channel_groups"]
        plain = pretrain.Task.from_config(one_group, mesh)
        spec = replace(plain.spec, channel_groups=groups)
        if spec.target_dim != spec.patch_dim:
            refuse("target.name", config.target.name, "channel groups predict pixels")
        return cls(**vars(plain) | {"network": plain.network.clone(spec=spec)})

    @property
    def groups(self) -> Groups:
        return self.spec.channel_groups

    @property
    def num_kept(self) -> int:
        """K, the tokens that the encoder sees: as many of each group."""
        places = self.spec.num_patches // len(self.groups)
        return len(self.groups) * masking.num_kept(places, self.spec.mask_ratio)

    def prepare(self, batch: dict, rng: train.Rng) -> dict:
        """Draw a mask for each group of each image of the global batch."""
        size, spec, count = len(batch["image"]), self.spec, len(self.groups)
        score_NA = self.score_patches(
            rng("mask"), batch=size * count, grid=spec.grid, ratio=spec.mask_ratio
        )
        score_BGA = score_NA.reshape(size, count, -1)
        return batch | {"score": channel_groups.independent(score_BGA)}

    def reconstruct(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        outputs = super().reconstruct(params, extra, batch)
        return outputs | {"target_BLT": channel_groups.split(outputs["target_BLT"], self.groups)}

    def objective(self, outputs: dict[str, Array]) -> Array:
        error_BLP = jnp.square(outputs["pred_BLT"] - outputs["target_BLT"])
        error_BL = channel_groups.channel_mean(error_BLP, self.groups)
        return mae.masked_mean(error_BL, outputs["mask_BL"])

    def reconstruct_places(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Predict whole patches, for evaluators; `score` (B, A) hides all channels of a patch.

        Returns:
          As `pretrain.Task.reconstruct`, of the A places of patches, and their losses loss_BL.
        """
        places = masking.keep_lowest(batch["score"], self.num_kept // len(self.groups))
        mask = channel_groups.shared(places, self.groups)
        outputs = super().reconstruct(params, extra, batch | {"score": mask.restore_BL})
        pred_BAP = channel_groups.merge(outputs["pred_BLT"], self.groups)
        error_BAP = jnp.square(pred_BAP - outputs["target_BLT"])
        error_BLP = jnp.tile(error_BAP, (1, len(self.groups), 1))
        error_BL = channel_groups.channel_mean(error_BLP, self.groups)
        loss_BA = rearrange(error_BL, "b (g a) -> b g a", g=len(self.groups)).mean(1)
        return outputs | {"pred_BLT": pred_BAP, "mask_BL": places.mask_BL, "loss_BL": loss_BA}

    def patch_features(self, params: dict, extra: dict, batch: dict, block: int) -> Array:
        """Return one feature (B, A, D) for each place: the mean of its tokens."""
        tokens_BLD = super().patch_features(params, extra, batch, block)
        return rearrange(tokens_BLD, "b (g a) d -> b g a d", g=len(self.groups)).mean(1)

    def predict(self) -> Mapping[str, Callable]:
        return {**super().predict(), "reconstruction": self.reconstruct_places}
