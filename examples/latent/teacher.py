"""Predict what a teacher makes of the whole image, in place of pixels.

The teacher is the moving average of the encoder. The student sees the visible patches, and predicts
for each hidden one the teacher's features of it. In this minimal form after data2vec 2.0 (Baevski
et al., 2022, arXiv 2212.07525), I-JEPA (Assran et al., 2023, arXiv 2301.08243) and CAPI (Darcet et
al., 2025, arXiv 2502.08769).

Nothing in mae_jax knows of it: `Task` below overrides a few methods of the pre-training. The
teacher is kept where averaged weights of fine-tuning are, so that `mae_jax.load(DIR,
averaged=True)` and every command with `--averaged` read it.

Shape suffixes as in mae_jax/models/vit.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mae_jax import config as configs
from mae_jax import flops
from mae_jax.data.pipeline import steps_per_epoch
from mae_jax.errors import UserError
from mae_jax.models import mae
from mae_jax.models.patchify import normalize, patchify
from mae_jax.models.vit import Encoder
from mae_jax.tasks import pretrain


class Decoder(mae.Decoder):
    """The predictor: MAE's decoder, as wide at its end as the teacher's features.

    It has a name of its own, in config.model.decoder, because it predicts no pixels: `visualize`
    then says so, and `load` reads the encoder alone.
    """


@dataclass(frozen=True)
class Task(pretrain.Task):
    """Pre-training with a latent target.

    Args:
      decay: of the teacher at the first update; it grows linearly to `last_decay` at the last one.
      total_steps: updates of the run.
      blocks: the target is the mean of so many last blocks of the teacher.
    """

    decay: float
    last_decay: float
    total_steps: int
    blocks: int

    @classmethod
    def from_config(cls, config: Any, mesh: Any = None) -> "Task":
        """Return the task of recipe.py.

        Raises:
          UserError: a value of the config cannot work.
        """
        plain, teacher = pretrain.Task.from_config(config, mesh), config.teacher
        spec, old = plain.spec, plain.network
        for name in ("decay", "last_decay"):
            if not 0 <= teacher[name] <= 1:
                raise UserError(f"config.teacher.{name}={teacher[name]}: give a number from 0 to 1")
        if not 1 <= teacher.blocks <= spec.encoder.depth:
            raise UserError(
                f"config.teacher.blocks={teacher.blocks}: the encoder has {spec.encoder.depth}"
                " blocks, give at least 1 and no more"
            )
        epoch = steps_per_epoch(len(plain.examples), config.batch_size)
        spec = replace(spec, target_dim=spec.encoder.width)
        changes = {
            "network": mae.MAE(spec, old.compute, old.make_decoder),
            "total_steps": configs.steps(config.train_for, config.batch_size, epoch),
            **{name: teacher[name] for name in ("decay", "last_decay", "blocks")},
        }
        return cls(**vars(plain) | changes)

    @property
    def flops_per_example(self) -> float:
        # The loop counts three passes for an update; the teacher has one, and no backward pass.
        return flops.mae(self.spec, self.num_kept) + flops.encoder(self.spec) / 3

    def init(self, rng: Array) -> tuple[dict, dict]:
        params, _ = super().init(rng)
        return params, copy_of(params)

    def teach(self, extra: dict, images_BHWC: Array) -> Array:
        """Return the teacher's features of every patch (B, L, D): the student's target.

        Each token is standardised, which keeps the features from shrinking; blocks are standardised
        before their mean, so that each of them counts.
        """
        encoder = Encoder(self.spec, self.network.compute)
        patches_BLP = patchify(images_BHWC, self.spec.patch_size)
        variables = {"params": extra["ema"]["encoder"]}
        tokens: Any = encoder.apply(variables, patches_BLP, return_blocks=True)
        blocks_MBLD = tokens[1][-self.blocks :, :, 1:].astype(jnp.float32)
        target_BLD = standardise(standardise(blocks_MBLD).mean(0))
        return jax.lax.stop_gradient(target_BLD)

    def reconstruct(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        target_BLD = self.teach(extra, normalize(batch["image"], self.spec))
        return super().reconstruct(params, extra, batch) | {"target_BLT": target_BLD}

    def objective(self, outputs: dict[str, Array]) -> Array:
        """Return the smooth L1 error over hidden patches; the square was unstable for others."""
        error_BLT = optax.huber_loss(outputs["pred_BLT"], outputs["target_BLT"], delta=1.0)
        return (error_BLT.mean(-1) * outputs["mask_BL"]).sum() / outputs["mask_BL"].sum()

    def loss(self, params: dict, extra: dict, batch: dict, rng: Any, train: bool) -> Any:
        """Return also how much the teacher's mean feature differs between the images of a batch.

        It goes to 0 if all images get the same features: the collapse that such targets risk.
        """
        del rng, train
        outputs = self.reconstruct(params, extra, batch)
        pooled_BD = outputs["target_BLT"].mean(1)
        return self.objective(outputs), (extra, {"teacher_std": pooled_BD.std(0).mean()})

    def after_update(self, state: Any) -> Any:
        """Move the teacher towards the encoder."""
        done = jnp.minimum(state.step / max(self.total_steps, 1), 1.0)
        decay = self.decay + (self.last_decay - self.decay) * done
        moved = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new,
            state.extra["ema"],
            {"encoder": state.params["encoder"]},
        )
        return replace(state, extra={"ema": moved})

    def load(self, path: Any, state: Any) -> Any:
        """Return a fresh state with the parameters of a checkpoint, student and teacher alike."""
        state = super().load(path, state)
        return replace(state, extra=copy_of(state.params))

    def predict(self) -> Mapping[str, Callable]:
        """Return the functions that evaluators use, with the features of the teacher."""

        def of_teacher(function: Callable) -> Callable:
            return lambda params, extra, *args: function(extra["ema"], extra, *args)

        functions = super().predict().items()
        return {name: of_teacher(f) if "features" in name else f for name, f in functions}


def standardise(x: Array) -> Array:
    """Return x with mean 0 and variance 1 over the last axis: layer norm without scale and bias."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)


def copy_of(params: dict) -> dict:
    """Return a teacher that is the encoder as it is now."""
    return {"ema": {"encoder": jax.tree.map(jnp.copy, params["encoder"])}}
