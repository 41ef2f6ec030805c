"""Linear and attentive probes: heads trained on the features of a frozen encoder."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import flops, optimizers, train
from mae_jax.config import refuse_unread
from mae_jax.errors import nearest, refuse
from mae_jax.models import probe
from mae_jax.models.patchify import normalize, to_patches
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder
from mae_jax.tasks import common
from mae_jax.tasks.examples import TrainImages
from mae_jax.tasks.init_from import load_encoder

FEATURES = ("pretrained", "random", "pixels")
HEADS = ("linear", "attentive")
POOLS = ("cls", "global_pool")
OPTIMIZERS = ("lars", "adamw")


@dataclass(frozen=True)
class Task(train.Task):
    """The probe of a config such as configs/linprobe.py.

    A head for each base rate of (config.optim.blr, *config.optim.sweep) is trained at once, all
    from the same start and on the same features: the encoder runs once, forward only. It stands in
    `extra`, which no gradient and no optimizer sees.
    """

    encoder: Encoder
    head: probe.LinearHead | probe.AttentiveHead
    examples: TrainImages
    config: ConfigDict

    @classmethod
    def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> "Task":
        """Return the task of a config such as configs/linprobe.py.

        Raises:
          UserError: a value of the config cannot work, or the images have no labels.
        """
        check(config)
        spec = ModelSpec.from_config(config.to_dict())
        # The encoder may come with positions of its own, which stay as they are here.
        spec = replace(spec, encoder=replace(spec.encoder, trained_positions=True))
        encoder = Encoder(spec, common.compute(config.model, mesh))
        images = TrainImages.from_config(config, spec, labelled=True)
        p = config.probe
        head = (
            probe.LinearHead(images.classes)
            if p.head == "linear"
            else probe.AttentiveHead(images.classes, p.attention_heads)
        )
        return cls(encoder, head, images, config)

    @property
    def spec(self) -> ModelSpec:
        return self.encoder.spec

    @property
    def flops_per_example(self) -> float:
        return 0.0 if self.of_pixels else flops.encoder(self.spec)

    @property
    def flops_multiplier(self) -> float:
        return 1.0

    @property
    def linear(self) -> bool:
        return self.config.probe.head == "linear"

    @property
    def of_pixels(self) -> bool:
        return self.config.features == "pixels"

    @property
    def rates(self) -> tuple[float, ...]:
        """The base rate of each head (R)."""
        return (self.config.optim.blr, *self.config.optim.sweep)

    def init(self, rng: Array) -> tuple[dict, dict]:
        encoder_rng, head_rng = jax.random.split(rng)
        spec, extra = self.spec, {}
        example = jnp.zeros((1, spec.num_patches, spec.patch_dim))
        if not self.of_pixels:
            extra["encoder"] = self.encoder.init(encoder_rng, example)["params"]
            example = jnp.zeros((1, spec.num_patches, spec.encoder.width))
        if self.linear:
            width = example[0].size if self.of_pixels else spec.encoder.width
            extra["batch_norm"] = probe.initial_stats(width)
            example = jnp.zeros((1, width))
        params = probe.init_heads(self.head, head_rng, example, len(self.rates))
        return {"probe": params}, extra

    def prepare(self, batch: dict, rng: train.Rng) -> dict:
        return batch

    def patches(self, batch: dict) -> Array:
        """Return the patches (B, L, P) of the normalised images."""
        return to_patches(normalize(batch["image"], self.spec), self.spec)

    def represent(self, extra: dict, batch: dict) -> Array:
        """Return what the heads see: (B, D), or (B, L, D) for attentive ones."""
        patches_BLP = self.patches(batch)
        if self.of_pixels:
            return patches_BLP.reshape(len(patches_BLP), -1) if self.linear else patches_BLP
        # The official average-pooled probe pools the tokens before the final norm, then norms.
        averaged = self.linear and self.config.probe.pool == "global_pool"
        encoder = self.encoder.clone(final_norm=False) if averaged else self.encoder
        tokens_BND: Any = encoder.apply({"params": extra["encoder"]}, patches_BLP)
        if not self.linear:
            return tokens_BND[:, 1:]
        pooled = probe.pool(tokens_BND)
        return probe.bare_norm(pooled["mean"]) if averaged else pooled["cls"]

    def logits(self, params: dict, extra: dict, batch: dict, train: bool) -> tuple[Array, dict]:
        """Return the logits (B, R, Y) of each head, and `extra` with its running statistics."""
        x = self.represent(extra, batch)
        if self.linear:
            group = self.config.probe.bn_group
            x, stats = probe.batch_norm(x, extra["batch_norm"], group, train)
            extra = extra | {"batch_norm": stats}
        return probe.apply_heads(self.head, params["probe"], x), extra

    def loss(
        self, params: dict, extra: dict, batch: dict, rng: train.Rng, train: bool
    ) -> tuple[Array, tuple[dict, dict]]:
        """Return the sum of the heads' losses, which gives each head its own gradient.

        The loss that is reported is that of the first head.
        """
        logits_BRY, extra = self.logits(params, extra, batch, train)
        label_BR = jnp.broadcast_to(batch["label"][:, None], logits_BRY.shape[:2])
        loss_R = optax.softmax_cross_entropy_with_integer_labels(logits_BRY, label_BR).mean(0)
        return loss_R.sum(), (extra, {"loss": loss_R[0]})

    def features(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Return features (B, D) of whole images: `cls` and `mean`, or pixels as both."""
        patches_BLP = self.patches(batch)
        if self.of_pixels:
            flat_BD = patches_BLP.reshape(len(patches_BLP), -1)
            return {"cls": flat_BD, "mean": flat_BD}
        tokens_BND: Any = self.encoder.apply({"params": extra["encoder"]}, patches_BLP)
        return probe.pool(tokens_BND)

    def block_features(self, params: dict, extra: dict, batch: dict) -> dict[str, Array]:
        """Return `features` after each block, (depth, B, D)."""
        variables = {"params": extra["encoder"]}
        tokens: Any = self.encoder.apply(variables, self.patches(batch), return_blocks=True)
        return probe.pool_blocks(*tokens)

    def predict(self) -> Mapping[str, Callable]:
        def logits(params: dict, extra: dict, batch: dict) -> Array:
            return self.logits(params, extra, batch, False)[0]

        blocks = {} if self.of_pixels else {"block_features": self.block_features}
        return {"features": self.features, "logits": logits, **blocks}

    def load(self, path: Any, state: train.TrainState) -> train.TrainState:
        """Return a fresh state with the encoder of a checkpoint."""
        encoder = load_encoder(path, state.extra["encoder"], self.spec)
        return replace(state, extra=state.extra | {"encoder": encoder})

    def optimizer(
        self, total_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        o, batch_size = self.config.optim, self.config.batch_size
        schedule = common.learning_rate(o, batch_size, total_steps, steps_per_epoch)

        def make(scale: Array) -> optax.GradientTransformation:
            def scaled(step: Any) -> Any:
                return scale * schedule(step)

            if o.name == "lars":
                return optimizers.lars(scaled, momentum=o.momentum, weight_decay=o.weight_decay)
            return common.adamw(o, scaled, decayed=("matrix",))

        return optimizers.side_by_side(make, tuple(rate / o.blr for rate in self.rates)), schedule


def check(config: ConfigDict) -> None:
    """Check the values of a config that only this task reads.

    Raises:
      UserError: a value that cannot work.
    """
    p, o, m = config.probe, config.optim, config.model
    check_features(config)
    refuse_unread(config, "optim.clip_norm", "data.repeat")
    if o.name == "lars":
        refuse_unread(config, "optim.eps")
    for key, value, choices in (
        ("probe.head", p.head, HEADS),
        ("probe.pool", p.pool, POOLS),
        ("optim.name", o.name, OPTIMIZERS),
    ):
        if value not in choices:
            refuse(key, value, f"unknown{nearest(str(value), choices)}")
    group, size = p.bn_group, config.batch_size // config.grad_accum
    if p.head == "linear" and (group < 2 or size % group):
        refuse(
            "probe.bn_group",
            group,
            f"must be at least 2 and divide the {size} images of a pass: choose {size}, the whole"
            " pass, or change config.batch_size",
        )
    pixels = config.features == "pixels"
    width = math.prod(m.patch_size) * m.channels if pixels else m.width
    if p.head == "attentive" and (width % p.attention_heads):
        refuse("probe.attention_heads", p.attention_heads, f"must divide the width, {width}")
    if not o.blr:
        refuse("optim.blr", o.blr, "the base rate of a head must be above 0")


def check_features(config: ConfigDict) -> None:
    """Check which features of a frozen encoder a config reads.

    Raises:
      UserError: config.features is unknown, or config.init_from does not go with it.
    """
    features = config.features
    if features not in FEATURES:
        refuse("features", features, f"unknown{nearest(str(features), FEATURES)}")
    if features == "pretrained" and not (config.init_from or config.resume):
        refuse(
            "init_from",
            "",
            "which encoder is measured? Give --config=...:init=WORKDIR of its pre-training, or"
            " config.features='random' or 'pixels' to see what an untrained one gives",
        )
    if features != "pretrained" and config.init_from:
        refuse("init_from", config.init_from, f"not used with features={features!r}")
