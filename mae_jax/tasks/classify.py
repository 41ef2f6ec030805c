"""Classification: fine-tune a pre-trained encoder, or train one from scratch, with labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import checkpoint, flops, layer_decay, train
from mae_jax.config import refuse_unread
from mae_jax.errors import nearest, refuse
from mae_jax.models import classifier, mixup
from mae_jax.models.patchify import normalize, to_patches
from mae_jax.models.spec import ModelSpec
from mae_jax.tasks import common
from mae_jax.tasks.examples import TrainImages
from mae_jax.tasks.init_from import load_encoder, require_same_tokens_and_blocks, saved_spec

DECAYED = ("matrix",)  # fine-tuning decays no tokens and no positions; docs/REFERENCE.md section 3
# The part of a checkpoint that a whole classifier, with its head, starts from.
WHOLE = {"finetuned": checkpoint.PARAMS, "averaged": checkpoint.AVERAGED}
STARTS = ("pretrained", *WHOLE, "xavier", "normal")


@dataclass(frozen=True)
class Task(train.Task):
    """Fine-tuning, or supervised training from scratch, as configs/finetune.py describes it."""

    network: classifier.Classifier
    examples: TrainImages
    config: ConfigDict

    @classmethod
    def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> "Task":
        """Return the task of a config such as configs/finetune.py.

        Raises:
          UserError: a value of the config cannot work, or the images have no labels.
        """
        spec = ModelSpec.from_config(config.to_dict(), classes=1)
        check(config)
        images = TrainImages.from_config(config, spec, labelled=True)
        spec = replace(spec, classes=images.classes)
        compute = common.compute(config.model, mesh)
        return cls(classifier.Classifier(spec, compute), images, config)

    @property
    def spec(self) -> ModelSpec:
        return self.network.spec

    @property
    def flops_per_example(self) -> float:
        return flops.encoder(self.spec) + 2.0 * self.spec.encoder.width * self.spec.classes

    @property
    def partly_frozen(self) -> bool:
        """True if only the last config.trained_blocks blocks are trained (paper, Figure 9)."""
        return 0 <= self.config.trained_blocks < self.spec.encoder.depth

    @property
    def flops_multiplier(self) -> float:
        """The cost of an update in forward passes: no backward pass goes into frozen blocks."""
        if not self.partly_frozen:
            return 3.0
        vit, blocks = self.spec.encoder, self.config.trained_blocks
        if blocks == 0.5:
            blocks = vit.mlp_width / (2 * vit.width + vit.mlp_width)  # the MLP's share of a block
        return 1 + 2 * blocks / vit.depth

    def init(self, rng: Array) -> tuple[dict, dict]:
        params_rng, scratch_rng = jax.random.split(rng)
        patches_BLP = jnp.zeros((1, self.spec.num_patches, self.spec.patch_dim))
        params: Any = self.network.init(params_rng, patches_BLP)["params"]
        if self.config.start == "normal":
            params = classifier.scratch_init(params, scratch_rng)
        return params, self.averaged(params)

    def averaged(self, params: Any) -> dict:
        """Return the state of averaged weights that start from `params`; {} without config.ema."""
        return {"ema": jax.tree.map(jnp.copy, params)} if self.config.ema else {}

    def prepare(self, batch: dict, rng: train.Rng) -> dict:
        """Normalise, erase, mix: in this order, as the official code does."""
        mix, constrain = self.config.mix, self.network.compute.constrain
        image_BHWC = constrain(normalize(batch["image"], self.spec))
        target_BY = mixup.smooth(batch["label"], self.spec.classes, self.config.smoothing)
        if self.config.erase:
            image_BHWC = mixup.erase(image_BHWC, rng("erase"), self.config.erase)
        if mix.mixup or mix.cutmix:
            groups = len(image_BHWC) // mix.group
            alphas = {"mixup": mix.mixup, "cutmix": mix.cutmix}
            drawn = mixup.draw_mix(rng("mix"), groups, *self.spec.image_size, **alphas)
            image_BHWC = constrain(mixup.mix_images(image_BHWC, drawn))
            target_BY = mixup.mix_targets(target_BY, drawn)
        return {"normalized": image_BHWC, "target": target_BY}

    def loss(
        self, params: dict, extra: dict, batch: dict, rng: train.Rng, train: bool
    ) -> tuple[Array, tuple[dict, dict]]:
        patches_BLP = to_patches(batch["normalized"], self.spec)
        rngs = {"drop_path": rng("drop_path")}
        out: Any
        if self.partly_frozen:
            out = classifier.apply_partly_frozen(
                self.network, params, patches_BLP, self.config.trained_blocks, not train, rngs
            )
        else:
            out = self.network.apply({"params": params}, patches_BLP, not train, rngs=rngs)
        loss_B = optax.softmax_cross_entropy(out.logits_BY, batch["target"])
        return loss_B.mean(), (extra, {})

    def classify(self, params: dict, batch: dict) -> classifier.Output:
        """Return features and logits of whole images."""
        images_BHWC = normalize(batch["image"], self.spec)
        patches_BLP = to_patches(images_BHWC, self.spec)
        out: Any = self.network.apply({"params": params}, patches_BLP)
        return out

    def predict(self) -> Mapping[str, Callable]:
        def features(params: dict, extra: dict, batch: dict) -> dict[str, Array]:
            return {"pooled": self.classify(params, batch).features_BD}

        def logits(params: dict, extra: dict, batch: dict) -> Array:
            return self.classify(params, batch).logits_BY

        def averaged_logits(params: dict, extra: dict, batch: dict) -> Array:
            return self.classify(extra["ema"], batch).logits_BY

        predict = {"features": features, "logits": logits}
        return predict | ({"averaged_logits": averaged_logits} if self.config.ema else {})

    def load(self, path: Any, state: train.TrainState) -> train.TrainState:
        """Return a fresh state with the encoder of a checkpoint, or with the whole classifier."""
        if self.config.start in WHOLE:
            require_same_tokens_and_blocks(saved_spec(path), self.spec, path)
            params = checkpoint.restore(path, state.params, WHOLE[self.config.start])
        else:
            encoder = load_encoder(path, state.params["encoder"], self.spec)
            params = state.params | {"encoder": encoder}
        return replace(state, params=params, extra=self.averaged(params))

    def optimizer(
        self, total_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        o, batch_size = self.config.optim, self.config.batch_size
        schedule = common.learning_rate(o, batch_size, total_steps, steps_per_epoch)
        return common.optimizer(o, schedule, decayed=DECAYED, scales=self.scales), schedule

    def scales(self, params: Any) -> Any:
        """Return learning-rate multipliers; 0 freezes a parameter (and its weight decay)."""
        scales = layer_decay.layer_scales(params, self.config.optim.layer_decay)
        if not self.partly_frozen:
            return scales
        trained = classifier.trained_share(params, self.config.trained_blocks)
        return jax.tree.map(np.multiply, scales, trained)

    def after_update(self, state: train.TrainState) -> train.TrainState:
        """Return the state with its averaged weights moved towards the new ones (config.ema)."""
        if not self.config.ema:
            return state
        ema = optax.incremental_update(state.params, state.extra["ema"], 1 - self.config.ema)
        return replace(state, extra=state.extra | {"ema": ema})


def check(config: ConfigDict) -> None:
    """Check the values of a config that only this task reads.

    Raises:
      UserError: a value that cannot work.
    """
    m, data = config.model, config.data
    refuse_unread(config, "data.repeat")
    if data.augment and m.channels not in (1, 3):
        refuse("data.augment", data.augment, f"is for 1 or 3 channels, not {m.channels}: set it ''")
    if config.start not in STARTS:
        refuse("start", config.start, f"unknown{nearest(config.start, STARTS)}")
    loaded = config.start in ("pretrained", *WHOLE)
    if loaded and not (config.init_from or config.resume):
        refuse(
            "init_from",
            "",
            "which encoder is fine-tuned? Give --config=...:init=WORKDIR of its pre-training, or"
            " scratch=true to train without one",
        )
    if not loaded and config.init_from:
        refuse("init_from", config.init_from, f"not used with start={config.start!r}")
    n = config.trained_blocks
    if n not in (-1, 0.5) and (n % 1 or not 0 <= n <= m.depth):
        refuse("trained_blocks", n, f"give -1 (all), 0.5 (the last MLP), or 0 to {m.depth} blocks")
    if 0 <= n < m.depth and (m.get("block", {}).get("registers") or m.get("cls_tokens", 1) > 1):
        refuse("trained_blocks", n, "with registers or several class tokens give -1, all blocks")
    mix, batch_size = config.mix, config.batch_size
    uneven = mix.group < 2 or mix.group % 2 or batch_size % mix.group
    if (mix.mixup or mix.cutmix) and uneven:
        refuse(
            "mix.group",
            mix.group,
            "images that are mixed with each other: must be even and divide"
            f" config.batch_size={batch_size}; or set config.mix.mixup and config.mix.cutmix to 0",
        )
