"""Classification: fine-tune a pre-trained encoder, or train one from scratch, with labels."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from mae_jax import checkpoint, flops, optim
from mae_jax.config import steps
from mae_jax.data import mixup, pipeline
from mae_jax.errors import UserError, nearest
from mae_jax.evals.features import open_labelled, require_labels
from mae_jax.models import classifier
from mae_jax.models.patchify import patchify
from mae_jax.models.vit import grid_of
from mae_jax.tasks.encoder import check_model, execution, load_encoder, normalize
from mae_jax.train import Task

DECAYED = ("matrix",)  # fine-tuning decays no tokens and no positions; REFERENCE section 3
# Of a checkpoint, what a classifier is started from as a whole, with its head
WHOLE = {"finetuned": checkpoint.PARAMS, "averaged": checkpoint.AVERAGED}
STARTS = ("pretrained", *WHOLE, "xavier", "normal")


def check(config: ConfigDict) -> None:
    """Check what a config says of fine-tuning.

    Raises:
      UserError: a value that cannot work.
    """

    def refuse(key: str, value: Any, wanted: str) -> None:
        raise UserError(f"config.{key}={value!r}: {wanted}")

    m, o, mix, data = config.model, config.optim, config.mix, config.data
    pipeline.check(data)
    check_model(config)
    if data.augment and m.channels not in (1, 3):
        refuse("data.augment", data.augment, f"is for 1 or 3 channels, not {m.channels}: set it ''")
    if config.start not in STARTS:
        refuse("start", config.start, f"unknown{nearest(config.start, list(STARTS))}")
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
    if not 0 < o.layer_decay <= 1:
        refuse("optim.layer_decay", o.layer_decay, "must be above 0 and at most 1")
    for key, value in (("smoothing", config.smoothing), ("erase", config.erase)):
        if not 0 <= value <= 1:
            refuse(key, value, "must be from 0 to 1")
    if not 0 <= config.ema < 1:
        refuse("ema", config.ema, "must be at least 0, which is none, and below 1")
    for key in ("mixup", "cutmix"):
        if not mix[key] >= 0:
            refuse(f"mix.{key}", mix[key], "must be at least 0, which is none")
    uneven = mix.group < 2 or mix.group % 2 or config.batch_size % mix.group
    if (mix.mixup or mix.cutmix) and uneven:
        refuse(
            "mix.group",
            mix.group,
            "images that are mixed with each other: must be even and divide"
            f" config.batch_size={config.batch_size}; or set config.mix.mixup and config.mix.cutmix"
            " to 0",
        )


def passes(trained_blocks: float, depth: int, mlp_ratio: float) -> float:
    """What an update costs, in forward passes: no backward pass goes into frozen blocks.

    Args:
      trained_blocks: of `depth`, from the last; -1 = all, 0.5 = the MLP of the last.
    """
    if not 0 <= trained_blocks < depth:
        return 3.0
    blocks = 2 * mlp_ratio / (4 + 2 * mlp_ratio) if trained_blocks == 0.5 else trained_blocks
    return 1 + 2 * blocks / depth


def make_task(config: ConfigDict, constrain: Callable[[Array], Array] = lambda x: x) -> Task:
    """The classifier of a config such as configs/finetune.py.

    Raises:
      UserError: a value of the config that cannot work, or a source without labels.
    """
    check(config)
    m, o, data = config.model, config.optim, config.data
    patch, size = tuple(m.patch_size), tuple(m.image_size)
    grid = grid_of(size, patch)
    values = math.prod(patch) * m.channels
    source = open_labelled(data.source, data.split, data.data_dir)
    classes = source.num_classes or 0
    trained = config.trained_blocks

    def build(constrain: Callable[[Array], Array]) -> classifier.Classifier:
        return classifier.build(
            grid,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            classes=classes,
            mlp_ratio=m.mlp_ratio,
            pool=m.pool,
            drop_path=m.drop_path,
            execution=execution(m, constrain),
        )

    network = build(constrain)

    def init(rng: Array) -> tuple[dict, dict]:
        params_rng, scratch_rng = jax.random.split(rng)
        example = jnp.zeros((1, math.prod(grid), values))
        params: Any = build(lambda x: x).init(params_rng, example)["params"]
        if config.start == "normal":
            params = classifier.scratch_init(params, scratch_rng)
        return params, averaged(params)

    def averaged(params: Any) -> dict:
        return {"ema": jax.tree.map(jnp.copy, params)} if config.ema else {}

    def prepare(batch: dict, rng: Callable[[str], Array]) -> dict:
        """Normalise, erase, mix: in this order, as the official code does."""
        image_BHWC = constrain(normalize(batch["image"], data.mean, data.std))
        target_BY = mixup.smooth(batch["label"], classes, config.smoothing)
        if config.erase:
            image_BHWC = mixup.erase(image_BHWC, rng("erase"), config.erase)
        if config.mix.mixup or config.mix.cutmix:
            groups = len(image_BHWC) // config.mix.group
            alphas = {"mixup": config.mix.mixup, "cutmix": config.mix.cutmix}
            mix = mixup.draw_mix(rng("mix"), groups, *size, **alphas)
            image_BHWC = constrain(mixup.mix_images(image_BHWC, mix))
            target_BY = mixup.mix_targets(target_BY, mix)
        return {"normalized": image_BHWC, "target": target_BY}

    def loss(params: dict, extra: dict, batch: dict, rng: Callable[[str], Array], train: bool):
        patches_BLP = patchify(batch["normalized"], patch)
        rngs = {"drop_path": rng("drop_path")}
        if 0 <= trained < m.depth:
            out: Any = classifier.apply_partly_frozen(
                network, params, patches_BLP, trained, not train, rngs
            )
        else:
            out = network.apply({"params": params}, patches_BLP, not train, rngs=rngs)
        return classifier.soft_cross_entropy(out.logits_BY, batch["target"]), (extra, {})

    def classify(params: dict, batch: dict) -> classifier.Output:
        image_BHWC = normalize(batch["image"], data.mean, data.std)
        out: Any = network.apply({"params": params}, patchify(image_BHWC, patch))
        return out

    predict = {
        "features": lambda params, extra, batch: {"pooled": classify(params, batch).features_BD},
        "logits": lambda params, extra, batch: classify(params, batch).logits_BY,
    }
    if config.ema:
        predict["averaged_logits"] = lambda params, extra, batch: (
            classify(extra["ema"], batch).logits_BY
        )

    def load(path: Any, state: Any) -> Any:
        if config.start in WHOLE:
            params = checkpoint.restore(path, state.params, WHOLE[config.start])
            return state.replace(params=params, extra=averaged(params))
        encoder = load_encoder(path, state.params["encoder"], config)
        params = state.params | {"encoder": encoder}
        return state.replace(params=params, extra=averaged(params))

    def optimizer(total_steps: int, steps_per_epoch: int):
        schedule = optim.cosine_schedule(
            optim.peak_lr(o.blr, config.batch_size),
            total_steps,
            steps(o.warmup, config.batch_size, steps_per_epoch),
            o.min_lr,
        )
        tx = optim.adamw(
            schedule,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            decayed=DECAYED,
            scales=scales,
        )
        return tx, schedule

    def scales(params: Any) -> Any:
        """Of the learning rate; 0, which stops weight decay too, for what is frozen."""
        decayed = optim.layer_scales(params, o.layer_decay)
        if not 0 <= trained < m.depth:
            return decayed
        return jax.tree.map(np.multiply, decayed, classifier.trained_share(params, trained))

    def follow(params: dict, extra: dict) -> dict:
        """The averaged weights after an update."""
        if not config.ema:
            return extra
        return {
            "ema": jax.tree.map(lambda a, p: a + (1 - config.ema) * (p - a), extra["ema"], params)
        }

    def batches(start_step: int, rows: np.ndarray) -> Iterator[tuple[dict, dict, list[str]]]:
        def check(labels: np.ndarray) -> None:
            require_labels(labels, classes)

        return pipeline.reported_batches(source, config, start_step, rows, check)

    return Task(
        inputs={
            "image": jax.ShapeDtypeStruct((*size, m.channels), np.uint8),
            "label": jax.ShapeDtypeStruct((), np.int32),
        },
        num_examples=len(source),
        init=init,
        prepare=prepare,
        loss=loss,
        predict=predict,
        optimizer=optimizer,
        batches=batches,
        flops_per_example=flops.encoder(math.prod(grid), values, m.width, m.depth, m.mlp_ratio)
        + 2.0 * m.width * classes,
        passes=passes(trained, m.depth, m.mlp_ratio),
        load=load,
        follow=follow,
    )
