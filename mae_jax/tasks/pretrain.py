"""Masked pre-training: hide patches, predict them."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from mae_jax import flops, optim
from mae_jax.config import resolve, steps
from mae_jax.data import pipeline, sources
from mae_jax.errors import UserError
from mae_jax.evals.features import open_labelled, require_labels
from mae_jax.models import mae, masking, probe, targets
from mae_jax.models.patchify import patchify
from mae_jax.models.vit import grid_of
from mae_jax.tasks.encoder import check_model, execution, normalize
from mae_jax.train import Task


def make_task(config: ConfigDict, constrain: Callable[[Array], Array] = lambda x: x) -> Task:
    """The objective of the paper, for a config such as configs/pretrain.py.

    Raises:
      UserError: a value of the config that cannot work; what it is, and what would.
    """
    m, data = config.model, config.data
    patch = tuple(m.patch_size)
    grid = grid_of(tuple(m.image_size), patch)
    num_patches = math.prod(grid)
    values = math.prod(patch) * m.channels
    kept = masking.num_kept(num_patches, config.mask_ratio)
    check_model(config)
    pipeline.check(data)
    # An online probe: a linear head on the cls token, trained beside the model.
    online, source = None, sources.open_source(data.source, data.split, data.data_dir)
    if config.get("online_probe", False):
        source = open_labelled(data.source, data.split, data.data_dir)
        online = probe.LinearHead(source.num_classes or 0)

    score_patches = resolve(config.masking.name, masking)
    make_target = resolve(config.target.name, targets)
    tokens_in_encoder = config.masking.get("tokens_in_encoder", False)
    score = partial(score_patches, batch=2, grid=grid, ratio=config.mask_ratio)
    try:
        scores = jax.eval_shape(score, jax.random.key(0))
    except TypeError as error:
        raise UserError(
            f"masking {config.masking.name!r} is no function (rng, batch, grid, ratio) -> scores"
            f" ({error})"
        ) from error
    if scores.shape != (2, num_patches):
        raise UserError(
            f"masking {config.masking.name!r} returned scores of shape {scores.shape} for 2 images"
            f" of {num_patches} patches: it must return (batch, patches)"
        )

    like = jax.ShapeDtypeStruct((2, num_patches, values), jnp.float32)
    target = jax.eval_shape(make_target, like)
    if target.shape != like.shape:
        raise UserError(
            f"target {config.target.name!r} returned shape {target.shape} for patches of shape"
            f" {like.shape}: it must return the same shape"
        )

    def build(constrain: Callable[[Array], Array]) -> mae.MAE:
        return mae.build(
            grid,
            values,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            decoder_width=m.decoder_width,
            decoder_depth=m.decoder_depth,
            decoder_heads=m.decoder_heads,
            mlp_ratio=m.mlp_ratio,
            tokens_in_encoder=tokens_in_encoder,
            execution=execution(m, constrain),
        )

    network = build(constrain)

    def init(rng: Array) -> tuple[dict, dict]:
        patches_BLP = jnp.zeros((1, num_patches, values))
        mask = masking.keep_lowest(jnp.zeros((1, num_patches)), kept)
        params = build(lambda x: x).init(rng, patches_BLP, mask)["params"]
        if online is not None:
            example = jnp.zeros((1, m.width))
            params["online"] = online.init(jax.random.fold_in(rng, 1), example)["params"]
        return params, {}

    def prepare(batch: dict, rng: Callable[[str], Array]) -> dict:
        batch_size = len(batch["image"])
        score_BL = score_patches(rng("mask"), batch=batch_size, grid=grid, ratio=config.mask_ratio)
        return batch | {"score": score_BL}

    def reconstruct(params: dict, extra: dict, batch: dict) -> dict:
        del extra
        patches_BLP = patchify(normalize(batch["image"], data.mean, data.std), patch)
        mask = masking.keep_lowest(batch["score"], kept)

        def run(model: mae.MAE) -> tuple[Array, Array]:
            latent_BND = model.encode(patches_BLP, mask)
            return latent_BND, model.decode(latent_BND, mask)

        latent_BND, pred_BLP = network.apply({"params": params}, method=run)
        return {
            "latent_BND": latent_BND,
            "pred_BLP": pred_BLP,
            "mask_BL": mask.mask_BL,
            "target_BLP": make_target(patches_BLP),
        }

    def features(params: dict, extra: dict, batch: dict) -> dict:
        """Of the whole image: every patch, in its order, nothing hidden."""
        del extra
        patches_BLP = patchify(normalize(batch["image"], data.mean, data.std), patch)
        tokens_BND: Any = network.apply(
            {"params": params}, patches_BLP, method=lambda m, patches: m.encoder(patches)
        )
        return probe.pool(tokens_BND)

    def loss(params: dict, extra: dict, batch: dict, rng: Callable[[str], Array], train: bool):
        del rng, train
        out = reconstruct(params, extra, batch)
        error = mae.masked_mse(out["pred_BLP"], out["target_BLP"], out["mask_BL"])
        if online is None:
            return error, (extra, {})
        # The encoder gets no gradient of it, and its own loss is reported as ever.
        cls_BD = jax.lax.stop_gradient(probe.pool(out["latent_BND"])["cls"])
        logits_BY: Any = online.apply({"params": params["online"]}, cls_BD)
        own = optax.softmax_cross_entropy_with_integer_labels(logits_BY, batch["label"]).mean()
        return error + own, (extra, {"loss": error, "online_loss": own})

    def online_logits(params: dict, extra: dict, batch: dict) -> Any:
        cls_BD = features(params, extra, batch)["cls"]
        assert online is not None
        return online.apply({"params": params["online"]}, cls_BD)

    def optimizer(total_steps: int, steps_per_epoch: int):
        o = config.optim
        schedule = optim.cosine_schedule(
            optim.peak_lr(o.blr, config.batch_size),
            total_steps,
            steps(o.warmup, config.batch_size, steps_per_epoch),
            o.min_lr,
        )
        tx = optim.adamw(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
        return tx, schedule

    def batches(start_step: int, rows: np.ndarray) -> Iterator[tuple[dict, dict, list[str]]]:
        def check(labels: np.ndarray) -> None:
            if online is not None:
                require_labels(labels, source.num_classes or 0)

        return pipeline.reported_batches(source, config, start_step, rows, check)

    inputs = {"image": jax.ShapeDtypeStruct((*m.image_size, m.channels), np.uint8)}
    predict: dict[str, Callable] = {"reconstruction": reconstruct, "features": features}
    if online is not None:
        inputs["label"] = jax.ShapeDtypeStruct((), np.int32)
        predict["logits"] = online_logits

    return Task(
        inputs=inputs,
        num_examples=len(source),
        init=init,
        prepare=prepare,
        loss=loss,
        predict=predict,
        optimizer=optimizer,
        batches=batches,
        flops_per_example=flops.mae(
            num_patches,
            num_patches if tokens_in_encoder else kept,
            values,
            width=m.width,
            depth=m.depth,
            decoder_width=m.decoder_width,
            decoder_depth=m.decoder_depth,
            mlp_ratio=m.mlp_ratio,
        ),
    )
