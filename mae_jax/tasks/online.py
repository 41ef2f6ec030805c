"""An online probe: a linear classifier of the cls token, trained beside a task.

The encoder gets no gradient from it, and the loss that is reported stays that of the task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax import Array

from mae_jax import train
from mae_jax.models import probe
from mae_jax.models.vit import merge_cls
from mae_jax.tasks import pretrain


@dataclass(frozen=True)
class OnlineProbe(train.Task):
    """A task with a probe; the task must have `reconstruct`, `objective` and `features`."""

    task: pretrain.Task
    head: probe.LinearHead

    @property
    def examples(self) -> Any:
        return self.task.examples

    @property
    def flops_per_example(self) -> float:
        return self.task.flops_per_example

    @property
    def flops_multiplier(self) -> float:
        return self.task.flops_multiplier

    def init(self, rng: Array) -> tuple[dict, dict]:
        params, extra = self.task.init(rng)
        cls_BD = jnp.zeros((1, self.task.spec.encoder.width))
        head = self.head.init(jax.random.fold_in(rng, 1), cls_BD)["params"]
        return params | {"online": head}, extra

    def prepare(self, batch: dict, rng: train.Rng) -> dict:
        return self.task.prepare(batch, rng)

    def loss(
        self, params: dict, extra: dict, batch: dict, rng: train.Rng, train: bool
    ) -> tuple[Array, tuple[dict, dict]]:
        outputs, metrics = self.task.reconstruct(params, extra, batch), dict[str, Any]()
        if type(self.task).loss is pretrain.Task.loss:
            error = self.task.objective(outputs)
        else:  # of a fork, which computes the outputs once more
            error, (extra, metrics) = self.task.loss(params, extra, batch, rng, train)
        latent_BND = merge_cls(outputs["latent_BND"], self.task.spec.cls_tokens)
        cls_BD = jax.lax.stop_gradient(probe.pool(latent_BND)["cls"])
        logits_BY: Any = self.head.apply({"params": params["online"]}, cls_BD)
        own = optax.softmax_cross_entropy_with_integer_labels(logits_BY, batch["label"]).mean()
        return error + own, (extra, {"loss": error} | metrics | {"online_loss": own})

    def logits(self, params: dict, extra: dict, batch: dict) -> Array:
        """Return the probe's logits (B, Y) of whole images."""
        cls_BD = self.task.features(params, extra, batch)["cls"]
        logits_BY: Any = self.head.apply({"params": params["online"]}, cls_BD)
        return logits_BY

    def predict(self) -> Mapping[str, Callable]:
        return {**self.task.predict(), "logits": self.logits}

    def optimizer(
        self, total_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        tx, schedule = self.task.optimizer(total_steps, steps_per_epoch)
        if self.task.optim.get("clip_norm"):  # the probe's gradient must not shorten the model's

            def label(params: dict) -> dict:
                return {name: "probe" if name == "online" else "model" for name in params}

            tx = optax.partition({"model": tx, "probe": tx}, label)
        return tx, schedule

    def after_update(self, state: train.TrainState) -> train.TrainState:
        return self.task.after_update(state)

    def load(self, path: epath.Path, state: train.TrainState) -> train.TrainState:
        """Return a fresh state with the task's parameters of a checkpoint and a fresh probe."""
        params = dict(state.params)
        head = params.pop("online")
        state = self.task.load(path, replace(state, params=params))
        return replace(state, params=state.params | {"online": head})
