"""Masked pre-training: hide patches, predict them. Shape suffixes as in models/vit.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import flops, models, train
from mae_jax.config import refuse_unread, resolve, resolve_group
from mae_jax.models import mae, masking, masks, pca, probe, targets
from mae_jax.models.patchify import normalize, to_patches
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder
from mae_jax.tasks import common
from mae_jax.tasks.examples import TrainImages
from mae_jax.tasks.init_from import load_adapted
from mae_jax.tasks.shapes import check_predictions, check_scores, width_of_target


@dataclass(frozen=True)
class Task(train.Task):
    """The objective of the paper. A fork subclasses it and overrides one method.

    Args:
      optim: config.optim.
      score_patches: see models/masking.py.
      make_target: see models/targets.py.
    """

    network: mae.MAE
    examples: TrainImages
    optim: Mapping[str, Any]
    score_patches: Callable[..., Array]
    make_target: Callable[..., Array]

    @classmethod
    def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> "Task":
        """Return the task of a config such as configs/pretrain.py.

        Raises:
          UserError: a value of the config cannot work, or the images cannot be opened.
        """
        if config.task == "pretrain":
            refuse_unread(config, "model.decoder_maps", "model.decoder_share")
        score_patches = resolve_group(
            config.masking, "masking", masking, masks, others=masking.KEYS
        )
        make_target = resolve_group(config.target, "target", targets, pca)
        spec = ModelSpec.from_config(config.to_dict())
        masking.num_kept(spec.num_patches, spec.mask_ratio)  # refuses an impossible ratio
        check_scores(score_patches, config.masking.name, spec)
        target_dim = width_of_target(make_target, config.target.name, spec)
        spec = replace(spec, target_dim=target_dim)
        decoder = resolve(config.model.get("decoder", "mae"), models, member="Decoder")
        network = mae.MAE(spec, common.compute(config.model, mesh), decoder)
        check_predictions(network)
        labelled = config.get("online_probe", False)  # its probe reads labels
        images = TrainImages.from_config(config, spec, labelled)
        return cls(network, images, config.optim, score_patches, make_target)

    @property
    def spec(self) -> ModelSpec:
        return self.network.spec

    @property
    def num_kept(self) -> int:
        """K, the patches that the encoder sees."""
        return masking.num_kept(self.spec.num_patches, self.spec.mask_ratio)

    @property
    def flops_per_example(self) -> float:
        return flops.mae(self.spec, self.num_kept)

    def init(self, rng: Array) -> tuple[dict, dict]:
        patches_BLP = jnp.zeros((1, self.spec.num_patches, self.spec.patch_dim))
        mask = masking.keep_lowest(jnp.zeros((1, self.spec.num_patches)), self.num_kept)
        return self.network.init(rng, patches_BLP, mask)["params"], {}

    def prepare(self, batch: dict, rng: train.Rng) -> dict:
        """Draw the scores of the whole batch, so that masks do not depend on the mesh."""
        size, spec = len(batch["image"]), self.spec
        score_BL = self.score_patches(
            rng("mask"), batch=size, grid=spec.grid, ratio=spec.mask_ratio
        )
        return batch | {"score": score_BL}

    def reconstruct(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Encode the visible patches and predict all of them.

        Returns:
          latent_BND, pred_BLT, target_BLT and mask_BL (1 = hidden).
        """
        images_BHWC = normalize(batch["image"], self.spec)
        patches_BLP = to_patches(images_BHWC, self.spec)
        mask = masking.keep_lowest(batch["score"], self.num_kept)
        variables = {"params": params}
        latent_BND: Any = self.network.apply(variables, patches_BLP, mask, method="encode")
        pred_BLT: Any = self.network.apply(variables, latent_BND, mask, method="decode")
        return {
            "latent_BND": latent_BND,
            "pred_BLT": pred_BLT,
            "target_BLT": self.make_target(images_BHWC, self.spec.patch_size),
            "mask_BL": mask.mask_BL,
        }

    def objective(self, outputs: dict[str, Array]) -> Array:
        """Return the loss: the squared error of `reconstruct` over hidden patches."""
        return mae.masked_mse(outputs["pred_BLT"], outputs["target_BLT"], outputs["mask_BL"])

    def loss(
        self, params: dict, extra: dict, batch: dict, rng: train.Rng, train: bool
    ) -> tuple[Array, tuple[dict, dict]]:
        return self.objective(self.reconstruct(params, extra, batch)), (extra, {})

    def load(self, path: Any, state: train.TrainState) -> train.TrainState:
        """Return `state` with the parameters of a checkpoint (config.init_from), adapted."""
        if adapted := load_adapted(path, state.params, self.network):
            return replace(state, params=adapted)
        return super().load(path, state)

    def patches(self, batch: dict) -> Array:
        """Return the patches (B, L, P) of the normalised images."""
        return to_patches(normalize(batch["image"], self.spec), self.spec)

    def features(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Return features (B, D) of whole images, nothing hidden: `cls` and `mean`."""
        patches_BLP = self.patches(batch)
        tokens_BND: Any = self.network.apply({"params": params}, patches_BLP, method="encode")
        return probe.pool(tokens_BND)

    def block_features(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Return `features` after each block, (depth, B, D)."""
        encoder, variables = Encoder(self.spec, self.network.compute), {"params": params["encoder"]}
        tokens: Any = encoder.apply(variables, self.patches(batch), return_blocks=True)
        return probe.pool_blocks(*tokens)

    def patch_features(self, params: dict, extra: dict, batch: dict, block: int) -> Array:
        """Return the patch tokens (B, L, D) after a block, counted from 1; nothing is hidden."""
        encoder = Encoder(self.spec, self.network.compute)
        return probe.patch_tokens(encoder, params["encoder"], self.patches(batch), block)

    def predict(self) -> Mapping[str, Callable]:
        return {
            "reconstruction": self.reconstruct,
            "features": self.features,
            "block_features": self.block_features,
            "patch_features": self.patch_features,
        }

    def optimizer(
        self, total_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        batch_size = self.examples.batch_size
        schedule = common.learning_rate(self.optim, batch_size, total_steps, steps_per_epoch)
        return common.optimizer(self.optim, schedule), schedule
