"""The encoder of every task: its images, how it is run, and the checkpoint that it starts from."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from mae_jax import checkpoint
from mae_jax.distributed import log_once
from mae_jax.errors import UserError, nearest
from mae_jax.models import patch_embed, posemb
from mae_jax.models.vit import ComputeConfig, grid_of

PART = ("params", "encoder")  # of a checkpoint
ATTENTION = ("xla", "cudnn")
DTYPES = ("float32", "bfloat16", "float16")


def normalize(images_BHWC: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 images to float32: scaled to 0..1, minus the mean, over the standard deviation."""
    scaled_BHWC = images_BHWC.astype(jnp.float32) / 255
    return (scaled_BHWC - jnp.asarray(mean)) / jnp.asarray(std)


def check_model(config: ConfigDict) -> None:
    """Check config.model, the rates of config.optim, and that each channel has a mean and std.

    Raises:
      UserError: a value that cannot work.
    """
    m, o = config.model, config.optim
    for name in ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads",
                 "channels", "scan_unroll"):  # fmt: skip
        if m.get(name, 1) < 1:
            raise UserError(f"config.model.{name}={m[name]} must be at least 1")
    if m.mlp_ratio * min(m.width, m.get("decoder_width", m.width)) < 1:
        raise UserError(f"config.model.mlp_ratio={m.mlp_ratio} leaves nothing inside the MLPs")
    if m.attention not in ATTENTION:
        raise UserError(
            f"config.model.attention={m.attention!r}{nearest(m.attention, list(ATTENTION))}"
        )
    for name in ("dtype", "residual_dtype"):
        if m[name] not in DTYPES:
            raise UserError(f"config.model.{name}={m[name]!r}: give one of {', '.join(DTYPES)}")
    for name in ("blr", "min_lr", "weight_decay"):
        if not 0 <= o.get(name, 0) < math.inf:
            raise UserError(f"config.optim.{name}={o[name]} must be at least 0")
    for name in ("b1", "b2", "momentum"):
        if not 0 <= o.get(name, 0) < 1:
            raise UserError(f"config.optim.{name}={o[name]} must be at least 0 and below 1")
    for name in ("mean", "std"):
        given, channels = len(config.data[name]), config.model.channels
        if given != channels:
            raise UserError(
                f"config.data.{name} has {given} numbers for images of {channels} channels: give"
                " one for each channel"
            )


def compute(model: ConfigDict, constrain: Callable[[Array], Array]) -> ComputeConfig:
    """How config.model says that a network is run."""
    return ComputeConfig(
        jnp.dtype(model.dtype),
        jnp.dtype(model.residual_dtype),
        model.scan_unroll,
        model.remat,
        model.attention,
        constrain,
    )


def load_encoder(path: epath.Path, target: Any, config: ConfigDict) -> dict:
    """The encoder of a checkpoint, as the start of another; what had to be adapted is printed.

    The patch embedding is adapted where the config says another patch size or number of channels
    than the checkpoint's, see `patch_embed.adapt`. Trained positions that the checkpoint does not
    hold are the sine-cosine table of its grid; those of another grid are resized. A final norm that
    the target does not have is left out, as REFERENCE section 3 has it for average pooling, and so
    is the mask token of `tokens_in_encoder`. Everything else must be on both sides.

    Args:
      path: of a checkpoint, such as WORKDIR/checkpoints/STEP.
      target: the encoder that is wanted: arrays, whose shapes and shardings count.

    Raises:
      UserError: there is no encoder, it has other arrays or shapes, or channels that cannot be
        adapted; both sides are shown.
    """
    saved = checkpoint.shapes(path, PART)
    if not saved:
        there = ", ".join(checkpoint.shapes(path, PART[:1])) or "none"
        raise UserError(
            f"config.init_from: {path} holds no encoder; its parameters: {there}. Name a run of"
            " pre-training or fine-tuning, or what mae-jax convert --to=ours wrote"
        )
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(target)
    )
    everywhere = wanted["cls_token"].sharding

    def take(name: str) -> None:
        """Read something as it is saved, in no shards."""
        wanted[name] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), saved[name]
        )

    described = path.parent.parent / "config.json"
    made = json.loads(described.read_text()) if described.exists() else None
    new = _pixels(config)
    old = new if made is None else _pixels(made)
    adapted = (old.patch, len(old.mean)) != (new.patch, len(new.mean))
    if adapted:
        take("patch_embed")
    positions = wanted.pop("pos_embed", None)
    if positions is not None and "pos_embed" in saved:
        take("pos_embed")
    if "norm" in wanted and "norm" not in saved:
        raise UserError(
            f"config.init_from: {path} is of a classifier that averages patches: its encoder has no"
            " final norm, which this task reads. Name the run of pre-training that it started from"
        )
    for name in ("norm", "mask_token"):
        if name in saved and name not in wanted:
            take(name)
    found = checkpoint.restore(path, wanted, PART)

    told = []
    if adapted:
        told.append(f"patch embedding of {old} adapted to {new}")
        found["patch_embed"] = _adapted(found["patch_embed"], target["patch_embed"], old, new, path)
    if positions is not None:
        grid = grid_of(tuple(config.model.image_size), new.patch)
        table = found.get("pos_embed")
        before = _grid_of_table(made, None if table is None else table.shape[1] - 1, grid, path)
        if table is None:
            table = posemb.sincos_2d(positions.shape[-1], before)[None]
        if before != grid:
            told.append(f"positions of {before[0]} x {before[1]} patches resized to"
                        f" {grid[0]} x {grid[1]}")  # fmt: skip
        resize = partial(posemb.resize, old=before, new=grid)
        found["pos_embed"] = jax.jit(resize, out_shardings=positions.sharding)(table)
    if told:
        log_once(f"encoder of {path}: {'; '.join(told)}")
    return {name: found[name] for name in target}


def _pixels(config: Any) -> patch_embed.Pixels:
    """Of a config, or of the config.json of a run."""
    data = config["data"]
    patch = tuple(config["model"]["patch_size"])
    return patch_embed.Pixels(patch, tuple(data["mean"]), tuple(data["std"]))


def _adapted(
    embed: Any, target: Any, old: patch_embed.Pixels, new: patch_embed.Pixels, path: epath.Path
) -> dict:
    def change(embed: Any) -> dict:
        kernel, bias = patch_embed.adapt(embed["kernel"], embed["bias"], old, new)
        return {"kernel": kernel, "bias": bias}

    shardings = jax.tree.map(lambda x: x.sharding, dict(target))
    try:
        return jax.jit(change, out_shardings=shardings)(dict(embed))
    except ValueError as error:
        raise UserError(
            f"config.init_from: the encoder of {path} is of {old}, this config of {new}: {error}."
            f" Set config.model.channels to {len(old.mean)} or 1, or pre-train with {len(new.mean)}"
        ) from None


def _grid_of_table(
    made: dict | None, patches: int | None, grid: tuple[int, int], path: epath.Path
) -> tuple[int, int]:
    """The (rows, columns) of patches that a checkpoint's positions are of.

    Args:
      made: its config, or None if that is not there.
      patches: the length of its position table, or None if it has none.
      grid: that which is wanted; taken where nothing else is known and it may be right.

    Raises:
      UserError: it cannot be told.
    """
    if made is not None:
        return grid_of(tuple(made["model"]["image_size"]), tuple(made["model"]["patch_size"]))
    if patches in (None, math.prod(grid)):
        return grid
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(
            f"config.init_from: {path} has positions for {patches} patches, which are no square,"
            " and no config.json that says what grid they are of: name the workdir of the run"
        )
    return side, side
