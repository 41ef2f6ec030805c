"""Classification: fine-tune a pre-trained encoder, or train one from scratch, with labels."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from mae_jax import checkpoint, flops, optim
from mae_jax.config import nearest, steps
from mae_jax.data import mixup, pipeline
from mae_jax.evals.features import open_labelled, require_labels
from mae_jax.models import classifier, posemb
from mae_jax.models.patchify import patchify
from mae_jax.models.vit import Execution, grid_of
from mae_jax.tasks.pretrain import normalize
from mae_jax.train import Task

DECAYED = ("matrix",)  # fine-tuning decays no tokens and no positions; REFERENCE section 3
STARTS = ("pretrained", "xavier", "normal")


def check(config: ConfigDict) -> None:
    """Check what a config says of fine-tuning.

    Raises:
      ValueError: a value that cannot work.
    """

    def refuse(key: str, value: Any, wanted: str) -> None:
        raise ValueError(f"config.{key}={value!r}: {wanted}")

    m, o, mix, data = config.model, config.optim, config.mix, config.data
    pipeline.check(data)
    for name in ("mean", "std"):
        if len(data[name]) != m.channels:
            refuse(f"data.{name}", data[name], f"give a number for each of {m.channels} channels")
    if data.augment and m.channels not in (1, 3):
        refuse("data.augment", data.augment, f"is for 1 or 3 channels, not {m.channels}: set it ''")
    if config.start not in STARTS:
        refuse("start", config.start, f"unknown{nearest(config.start, list(STARTS))}")
    if config.start == "pretrained" and not (config.init_from or config.resume):
        refuse(
            "init_from",
            "",
            "which encoder is fine-tuned? Give --config=...:init=WORKDIR of its pre-training, or"
            " scratch=true to train without one",
        )
    if config.start != "pretrained" and config.init_from:
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


def make_task(config: ConfigDict, constrain: Callable[[Array], Array] = lambda x: x) -> Task:
    """The classifier of a config such as configs/finetune.py.

    Raises:
      ValueError: a value of the config that cannot work, or a source without labels.
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
        execution = Execution(
            jnp.dtype(m.dtype),
            jnp.dtype(m.residual_dtype),
            m.scan_unroll,
            m.remat,
            m.attention,
            constrain,
        )
        return classifier.build(
            grid,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            classes=classes,
            mlp_ratio=m.mlp_ratio,
            pool=m.pool,
            drop_path=m.drop_path,
            execution=execution,
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
        encoder = load_encoder(path, state.params["encoder"], patch, m.channels, grid, m.pool)
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
        load=load,
        follow=follow,
    )


def load_encoder(
    path: epath.Path,
    target: Any,
    patch: tuple[int, int],
    channels: int,
    grid: tuple[int, int],
    pool: Literal["avg", "cls"],
) -> Any:
    """The encoder of a checkpoint, as the start of a classifier's.

    Positions that the checkpoint does not hold are the sine-cosine table of its grid; those of
    another grid are resized. With pool "avg" its final norm is left out, as REFERENCE section 3 has
    it. Everything else must be on both sides.

    Args:
      target: the classifier's encoder: arrays, whose shapes and shardings are wanted.

    Raises:
      ValueError: the checkpoint has another patch size, number of channels or shape.
    """
    described = path.parent.parent / "config.json"
    made = json.loads(described.read_text())["model"] if described.exists() else None
    if made is not None:
        for key, theirs, ours in (
            ("patch_size", tuple(made["patch_size"]), tuple(patch)),
            ("channels", made["channels"], channels),
        ):
            if theirs != ours:
                raise ValueError(
                    f"config.init_from: the encoder of {path} has model.{key}={theirs}, this config"
                    f" {ours}, for which its patch embedding is of no use: set config.model.{key}"
                    f" to {theirs}, or pre-train with {ours}"
                )
    part = ("params", "encoder")
    saved = checkpoint.shapes(path, part)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(target)
    )
    everywhere = wanted["cls_token"].sharding
    positions = wanted.pop("pos_embed")
    if "pos_embed" in saved:
        shape = saved["pos_embed"].shape
        wanted["pos_embed"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
        old = grid_of_table(made, shape[1] - 1, grid, path)
    else:
        old = grid_of_table(made, None, grid, path)
    if pool == "avg" and "norm" in saved:
        wanted["norm"] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), saved["norm"]
        )
    encoder = checkpoint.restore(path, wanted, part)
    table = encoder.pop("pos_embed", posemb.sincos_2d(positions.shape[-1], old)[None])
    resize = jax.jit(partial(posemb.resize, old=old, new=grid), out_shardings=positions.sharding)
    return {name: encoder[name] for name in target if name != "pos_embed"} | {
        "pos_embed": resize(table)
    }


def grid_of_table(
    made: dict | None, patches: int | None, grid: tuple[int, int], path: epath.Path
) -> tuple[int, int]:
    """The (rows, columns) of patches that a checkpoint's positions are of.

    Args:
      made: the model of its config, or None if that is not there.
      patches: the length of its position table, or None if it has none.
      grid: that of the classifier; it is taken where nothing else is known and it may be right.

    Raises:
      ValueError: it cannot be told.
    """
    if made is not None:
        return grid_of(tuple(made["image_size"]), tuple(made["patch_size"]))
    if patches in (None, math.prod(grid)):
        return grid
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(
            f"config.init_from: {path} has positions for {patches} patches, which are no square,"
            " and no config.json that says what grid they are of: name the workdir of the run"
        )
    return side, side
