"""An online probe: a linear classifier of the cls token, trained beside a task.

The encoder gets no gradient from it, and the loss that is reported stays that of the task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mae_jax import train
from mae_jax.data.labels import open_labelled
from mae_jax.models import probe
from mae_jax.tasks import pretrain


@dataclass(frozen=True)
class Task(train.Task):
    """A task like `pretrain.Task` with a probe: it needs `reconstruct` and `objective`."""

    task: pretrain.Task
    head: probe.LinearHead

    @classmethod
    def around(cls, task: Any) -> "Task":
        """Return `task` with a probe for the classes of its images.

        Raises:
          UserError: its images have no labels.
        """
        data = task.examples.data
        source = open_labelled(data.source, data.split, data.data_dir)
        classes = source.num_classes or 0
        examples = replace(task.examples, source=source, classes=classes)
        return cls(replace(task, examples=examples), probe.LinearHead(classes))

    @property
    def examples(self) -> Any:
        return self.task.examples

    @property
    def flops_per_example(self) -> float:
        return self.task.flops_per_example

    def init(self, rng: Array) -> tuple[dict, dict]:
        params, extra = self.task.init(rng)
        cls_BD = jnp.zeros((1, self.task.spec.encoder.width))
        head = self.head.init(jax.random.fold_in(rng, 1), cls_BD)["params"]
        return params | {"online": head}, extra

    def prepare(self, batch: dict, rng: Callable[[str], Array]) -> dict:
        return self.task.prepare(batch, rng)

    def loss(
        self, params: dict, extra: dict, batch: dict, rng: Callable[[str], Array], train: bool
    ) -> tuple[Array, tuple[dict, dict]]:
        outputs = self.task.reconstruct(params, extra, batch)
        error = self.task.objective(outputs)
        cls_BD = jax.lax.stop_gradient(probe.pool(outputs["latent_BND"])["cls"])
        logits_BY: Any = self.head.apply({"params": params["online"]}, cls_BD)
        own = optax.softmax_cross_entropy_with_integer_labels(logits_BY, batch["label"]).mean()
        return error + own, (extra, {"loss": error, "online_loss": own})

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
        return self.task.optimizer(total_steps, steps_per_epoch)
