"""Masked pre-training with the loss on all patches, visible ones too: an ablation of the paper.

Name it with `config.task = "all_patches"`. The paper's section 3 says that it costs about half a
percent of fine-tuned accuracy; arXiv 2512.15715, section 6.1, finds it substantially worse.
"""

import jax.numpy as jnp
from jax import Array

from mae_jax.tasks import pretrain


class Task(pretrain.Task):
    """The objective of the paper, with another mean."""

    def reconstruct(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Return also loss_BL for evaluation, whose mean over hidden patches is `objective`."""
        outputs = super().reconstruct(params, extra, batch)
        error_BL = jnp.square(outputs["pred_BLT"] - outputs["target_BLT"]).mean(-1)
        of_image_B1 = error_BL.mean(-1, keepdims=True)
        return outputs | {"loss_BL": jnp.broadcast_to(of_image_B1, error_BL.shape)}

    def objective(self, outputs: dict[str, Array]) -> Array:
        """Return the mean squared error of all patches."""
        return jnp.square(outputs["pred_BLT"] - outputs["target_BLT"]).mean()
