"""Huber's error in place of the square, so that a few wild pixels do not lead the gradient."""

from dataclasses import dataclass

import optax

from mae_jax.tasks import pretrain


@dataclass(frozen=True)
class Task(pretrain.Task):
    """The objective of the paper with another error; config.task names this module."""

    delta: float = 1.0

    @classmethod
    def from_config(cls, config, mesh=None):
        return cls(**vars(pretrain.Task.from_config(config, mesh)), delta=config.huber.delta)

    def objective(self, outputs):
        """Return the mean of Huber's error over hidden patches."""
        error_BLT = optax.huber_loss(outputs["pred_BLT"], outputs["target_BLT"], delta=self.delta)
        return (error_BLT.mean(-1) * outputs["mask_BL"]).sum() / outputs["mask_BL"].sum()
