"""CrossMAE: masked pre-training that predicts a share of the hidden patches, by cross-attention.

Name it with `config.task = "crossmae"`, or take the recipe configs/crossmae.py. The network is in
models/crossmae.py. Shape suffixes as there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import flops, train
from mae_jax.config import OPTIONAL_KEYS
from mae_jax.errors import refuse
from mae_jax.models import crossmae, masking
from mae_jax.models.patchify import normalize, to_patches
from mae_jax.tasks import pretrain


@dataclass(frozen=True)
class Task(pretrain.Task):
    """The objective of CrossMAE.

    Args:
      num_predicted: Q, how many hidden patches of each image are predicted in training.
    """

    num_predicted: int

    @classmethod
    def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> "Task":
        """Return the task of a config such as configs/crossmae.py.

        Raises:
          UserError: a value of the config cannot work, or the images cannot be opened.
        """
        plain = pretrain.Task.from_config(config, mesh)
        spec, compute, model = plain.spec, plain.network.compute, config.model
        if spec.tokens_in_encoder or model.get("decoder", "mae") != "mae":
            key = "masking.tokens_in_encoder" if spec.tokens_in_encoder else "model.decoder"
            refuse("task", "crossmae", f"it has its own decoder; leave config.{key} out")
        if spec.cls_tokens > 1:
            refuse("model.cls_tokens", spec.cls_tokens, "the decoder of task crossmae reads one")
        if spec.decoder:  # of blocks of its own, which have no options
            spec = replace(spec, decoder=replace(spec.decoder, block=None))
        share = model.get("decoder_share", OPTIONAL_KEYS["model.decoder_share"])
        hidden = spec.num_patches - plain.num_kept
        num_predicted = round(share * spec.num_patches)
        if not 1 <= num_predicted <= hidden:
            refuse(
                "model.decoder_share",
                share,
                f"of {spec.num_patches} patches {num_predicted} would be predicted, and {hidden}"
                f" are hidden: give a share from {1 / spec.num_patches:.4f} to mask_ratio",
            )
        maps = model.get("decoder_maps", 0)
        crossmae.choose_maps(spec.encoder.depth, maps)  # refuses more than there are
        network = crossmae.CrossMAE(spec, compute, maps=maps)
        return cls(**vars(plain) | {"network": network, "num_predicted": num_predicted})

    @property
    def flops_per_example(self) -> float:
        network: Any = self.network
        maps = len(crossmae.choose_maps(self.spec.encoder.depth, network.maps))
        return flops.crossmae(self.spec, self.num_kept, self.num_predicted, maps)

    def prepare(self, batch: dict, rng: train.Rng) -> dict:
        """Draw the masks of the global batch, and which hidden patches are predicted."""
        batch = super().prepare(batch, rng)
        return batch | {"query": jax.random.uniform(rng("query"), batch["score"].shape)}

    def reconstruct(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Encode the visible patches and predict a share of the others.

        Returns:
          latent_BND, pred_BQT, target_BQT and mask_BQ (all 1), under the names that `objective`
          knows: those of the predicted patches alone.
        """
        return self._predict(params, batch, batch["query"], self.num_predicted)[0]

    def reconstruct_all(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Predict all hidden patches, for evaluators; predictions of visible patches are 0.

        Returns:
          As `pretrain.Task.reconstruct`.
        """
        hidden = self.spec.num_patches - self.num_kept
        noise_BL = jnp.zeros(batch["score"].shape)
        out, target_BLT, query_BQ = self._predict(params, batch, noise_BL, hidden)
        rows_B1 = jnp.arange(len(query_BQ))[:, None]
        places = (rows_B1, query_BQ)
        pred_BLT = jnp.zeros(target_BLT.shape).at[places].set(out["pred_BLT"])
        mask_BL = jnp.zeros(noise_BL.shape).at[places].set(1.0)
        return out | {"pred_BLT": pred_BLT, "target_BLT": target_BLT, "mask_BL": mask_BL}

    def _predict(
        self, params: dict, batch: dict, noise_BL: Array, count: int
    ) -> tuple[dict[str, Array], Array, Array]:
        """Return what `reconstruct` does for `count` patches, all targets, and which they are."""
        images_BHWC = normalize(batch["image"], self.spec)
        patches_BLP = to_patches(images_BHWC, self.spec)
        mask = masking.keep_lowest(batch["score"], self.num_kept)
        query_BQ = crossmae.draw_queries(mask.mask_BL, noise_BL, count)
        latent_BND, pred_BQT = self.network.apply(
            {"params": params}, patches_BLP, mask, query_BQ, method="predict"
        )
        target_BLT = self.make_target(images_BHWC, self.spec.patch_size)
        out = {
            "latent_BND": latent_BND,
            "pred_BLT": pred_BQT,
            "target_BLT": jnp.take_along_axis(target_BLT, query_BQ[..., None], axis=1),
            "mask_BL": jnp.ones(query_BQ.shape),
        }
        return out, target_BLT, query_BQ

    def predict(self) -> Mapping[str, Callable]:
        return {**super().predict(), "reconstruction": self.reconstruct_all}
