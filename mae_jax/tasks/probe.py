"""Linear and attentive probes: heads trained on the features of an encoder that stays as it is."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from mae_jax import flops, optim
from mae_jax.config import steps
from mae_jax.data import pipeline
from mae_jax.errors import UserError, nearest
from mae_jax.evals.features import open_labelled, require_labels
from mae_jax.models import probe
from mae_jax.models.patchify import patchify
from mae_jax.models.vit import Encoder, grid_of
from mae_jax.tasks.encoder import check_model, execution, load_encoder, normalize
from mae_jax.train import Task

FEATURES = ("pretrained", "random", "pixels")
HEADS = ("linear", "attentive")
POOLS = ("cls", "global_pool")


def check(config: ConfigDict) -> None:
    """Check what a config says of the probe.

    Raises:
      UserError: a value that cannot work.
    """

    def refuse(key: str, value: Any, wanted: str) -> None:
        raise UserError(f"config.{key}={value!r}: {wanted}")

    p, o = config.probe, config.optim
    for key, value, known in (
        ("features", config.features, FEATURES),
        ("probe.head", p.head, HEADS),
        ("probe.pool", p.pool, POOLS),
        ("optim.name", o.name, ("lars", "adamw")),
    ):
        if value not in known:
            refuse(key, value, f"unknown{nearest(str(value), list(known))}")
    if config.features == "pretrained" and not config.init_from:
        refuse(
            "init_from",
            "",
            "which encoder is probed? Give --config=...:init=WORKDIR of its pre-training, or"
            " config.features='random' or 'pixels' to see what an untrained one gives",
        )
    if config.features != "pretrained" and config.init_from:
        refuse("init_from", config.init_from, f"not used with features={config.features!r}")
    group, size = p.bn_group, config.batch_size // config.grad_accum
    if p.head == "linear" and (group < 2 or size % group):
        refuse(
            "probe.bn_group",
            group,
            f"must be at least 2 and divide the {size} images of a pass: choose {size}, the whole"
            " pass, or change config.batch_size",
        )
    m, width = config.model, config.model.width
    if config.features == "pixels":
        width = math.prod(m.patch_size) * m.channels
    if p.head == "attentive" and (p.attention_heads < 1 or width % p.attention_heads):
        refuse("probe.attention_heads", p.attention_heads, f"must divide the width, {width}")
    if not o.blr > 0 or not all(rate > 0 for rate in o.sweep):
        refuse("optim.sweep", tuple(o.sweep), f"base rates, and blr={o.blr}, must be positive")


def make_task(config: ConfigDict, constrain: Callable[[Array], Array] = lambda x: x) -> Task:
    """The probe of a config such as configs/linprobe.py.

    A head for each base rate of (config.optim.blr, *config.optim.sweep) is trained at once, all
    from the same start and on the same features: the encoder runs once, forward only. It stands in
    `extra`, which no gradient and no optimizer sees.

    Raises:
      UserError: a value of the config that cannot work, or a source without labels.
    """
    check(config)
    check_model(config)
    pipeline.check(config.data)
    m, p, o, data = config.model, config.probe, config.optim, config.data
    patch = tuple(m.patch_size)
    grid = grid_of(tuple(m.image_size), patch)
    values = math.prod(patch) * m.channels
    source = open_labelled(data.source, data.split, data.data_dir)
    classes = source.num_classes or 0
    rates = (o.blr, *o.sweep)
    linear = p.head == "linear"
    raw = config.features == "pixels"

    def build(constrain: Callable[[Array], Array], final_norm: bool = True) -> Encoder:
        return Encoder(
            grid,
            m.width,
            m.depth,
            m.heads,
            m.mlp_ratio,
            trained_positions=True,  # by the encoder's own training, that is, not here
            final_norm=final_norm,
            execution=execution(m, constrain),
        )

    # The official average-pooled probe has the tokens before the final norm pooled, then normed.
    encoder = build(constrain, final_norm=not (linear and p.pool == "global_pool"))
    normed = build(constrain)
    head = probe.LinearHead(classes) if linear else probe.AttentiveHead(classes, p.attention_heads)

    def patches(batch: dict) -> Array:
        return patchify(normalize(batch["image"], data.mean, data.std), patch)

    def represent(extra: dict, batch: dict) -> Array:
        """What the heads see: (B, D), or (B, L, D) for attentive ones."""
        patches_BLP = patches(batch)
        if raw:
            return patches_BLP.reshape(len(patches_BLP), -1) if linear else patches_BLP
        tokens_BND: Any = encoder.apply({"params": extra["encoder"]}, patches_BLP)
        if not linear:
            return tokens_BND[:, 1:]
        pooled = probe.pool(tokens_BND)
        return pooled["cls"] if p.pool == "cls" else probe.bare_norm(pooled["mean"])

    def features(params: dict, extra: dict, batch: dict) -> dict:
        del params
        if raw:
            flat_BD = patches(batch).reshape(len(batch["image"]), -1)
            return {"cls": flat_BD, "mean": flat_BD}
        tokens_BND: Any = normed.apply({"params": extra["encoder"]}, patches(batch))
        return probe.pool(tokens_BND)

    def init(rng: Array) -> tuple[dict, dict]:
        encoder_rng, head_rng = jax.random.split(rng)
        extra = {}
        if not raw:
            example = jnp.zeros((1, math.prod(grid), values))
            extra["encoder"] = build(lambda x: x).init(encoder_rng, example)["params"]
        if linear:
            width = math.prod(m.image_size) * m.channels if raw else m.width
            extra["batch_norm"] = probe.initial_stats(width)
            example = jnp.zeros((1, width))
        else:
            example = jnp.zeros((1, math.prod(grid), values if raw else m.width))
        return {"probe": probe.init_heads(head, head_rng, example, len(rates))}, extra

    def logits(params: dict, extra: dict, batch: dict, train: bool) -> tuple[Array, dict]:
        x = represent(extra, batch)
        if linear:
            x, stats = probe.batch_norm(x, extra["batch_norm"], p.bn_group, train)
            extra = extra | {"batch_norm": stats}
        return probe.apply_heads(head, params["probe"], x), extra

    def loss(params: dict, extra: dict, batch: dict, rng: Callable[[str], Array], train: bool):
        del rng
        logits_BRY, extra = logits(params, extra, batch, train)
        label_BR = jnp.broadcast_to(batch["label"][:, None], logits_BRY.shape[:2])
        loss_R = optax.softmax_cross_entropy_with_integer_labels(logits_BRY, label_BR).mean(0)
        # The sum gives each head its own gradient; what is reported is the first one's.
        return loss_R.sum(), (extra, {"loss": loss_R[0]})

    def load(path: Any, state: Any) -> Any:
        pretrained = load_encoder(path, state.extra["encoder"], config)
        return state.replace(extra=state.extra | {"encoder": pretrained})

    def optimizer(total_steps: int, steps_per_epoch: int):
        schedule = optim.cosine_schedule(
            optim.peak_lr(o.blr, config.batch_size),
            total_steps,
            steps(o.warmup, config.batch_size, steps_per_epoch),
            o.min_lr,
        )

        def make(scale: Array) -> optax.GradientTransformation:
            def scaled(step):
                return scale * schedule(step)

            if o.name == "lars":
                return optim.lars(scaled, momentum=o.momentum, weight_decay=o.weight_decay)
            return optim.adamw(
                scaled, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, decayed=("matrix",)
            )

        return optim.side_by_side(make, tuple(rate / o.blr for rate in rates)), schedule

    def batches(start_step: int, rows: np.ndarray) -> Iterator[tuple[dict, dict, list[str]]]:
        def check(labels: np.ndarray) -> None:
            require_labels(labels, classes)

        return pipeline.reported_batches(source, config, start_step, rows, check)

    forward = 0.0 if raw else flops.encoder(math.prod(grid), values, m.width, m.depth, m.mlp_ratio)
    return Task(
        inputs={
            "image": jax.ShapeDtypeStruct((*m.image_size, m.channels), np.uint8),
            "label": jax.ShapeDtypeStruct((), np.int32),
        },
        num_examples=len(source),
        init=init,
        prepare=lambda batch, rng: batch,
        loss=loss,
        predict={
            "features": features,
            "logits": lambda params, extra, batch: logits(params, extra, batch, False)[0],
        },
        optimizer=optimizer,
        batches=batches,
        flops_per_example=forward,
        passes=1.0,
        load=load,
    )
