"""Start from what another run trained (config.init_from): an encoder, or all of it."""

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from etils import epath

from mae_jax import checkpoint
from mae_jax.distributed import log_once
from mae_jax.errors import UserError
from mae_jax.models import mae, resize
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.spec import ModelSpec

ENCODER, DECODER = ("params", "encoder"), ("params", "decoder")  # keys of a checkpoint


def load_adapted(path: epath.Path, params: Any, network: mae.MAE) -> dict | None:
    """Return the parameters of a checkpoint of other patches, adapted; None if they are the same.

    The decoder is adapted if all else is the same, and otherwise that of `params`, a fresh one.

    Raises:
      UserError: see `load_encoder` and `require_same_tokens_and_blocks`.
    """
    saved, spec = saved_spec(path), network.spec
    if saved is None or patches_of(saved) == patches_of(spec):
        require_same_tokens_and_blocks(saved, spec, path)
        return None
    parts = {"encoder": load_encoder(path, params["encoder"], spec)}
    plain = network.make_decoder is mae.Decoder and spec.cls_tokens == 1
    size, patch = spec.image_size, spec.patch_size
    if plain and replace(saved, image_size=size, patch_size=patch, target_dim=0) == spec:
        parts["decoder"] = load_decoder(path, params["decoder"], saved, spec)
    return params | parts


def load_encoder(path: epath.Path, target: Any, spec: ModelSpec) -> dict:
    """Return the encoder of a checkpoint in the shardings of `target`; print what was adapted.

    - A patch embedding of another patch size or number of channels is adapted (`models/resize.py`).
    - Trained positions that the checkpoint lacks are the sine-cosine table of its grid; positions
      of another grid are resized.
    - A final norm that the target lacks is left out (docs/REFERENCE.md section 3), and so is the
      mask token of `tokens_in_encoder`. Everything else must be on both sides.

    Args:
      path: of a checkpoint, such as WORKDIR/checkpoints/STEP.
      target: the arrays of the wanted encoder; only shapes and shardings are read.
      spec: the network that the encoder becomes a part of.

    Raises:
      UserError: there is no encoder, it has other arrays or shapes, other options of blocks, or
        channels that cannot be adapted; both sides are shown.
    """
    target, saved = dict(target), checkpoint.shapes(path, ENCODER)
    if not saved:
        present = ", ".join(checkpoint.shapes(path, ENCODER[:1])) or "none"
        raise UserError(
            f"config.init_from: {path} holds no encoder; its parameters: {present}. Name a run of"
            " pre-training or fine-tuning, or what mae-jax convert --to=ours wrote"
        )
    if "norm" in target and "norm" not in saved:
        raise UserError(
            f"config.init_from: {path} is of a classifier that averages patches: its encoder has no"
            " final norm, which this task reads. Name the run of pre-training that it started from"
        )
    old = saved_spec(path)
    require_same_tokens_and_blocks(old, spec, path)
    adapted = old is not None and patches_of(old) != patches_of(spec)
    dropped = {"norm", "mask_token"} & (saved.keys() - target.keys())
    resized = {"pos_embed"} & saved.keys() & target.keys()
    as_saved = dropped | resized | ({"patch_embed"} if adapted else set())
    replicated = target["cls_token"].sharding

    shapes = {name: jax.tree.map(wanted, target[name]) for name in target.keys() - {"pos_embed"}}
    shapes |= {
        name: jax.tree.map(partial(wanted, sharding=replicated), saved[name]) for name in as_saved
    }
    restored = checkpoint.restore(path, shapes, ENCODER)

    notes = []
    if old is not None and adapted:
        notes.append(f"patch embedding of {patches_of(old)} adapted to {patches_of(spec)}")
        embed = restored["patch_embed"]
        restored["patch_embed"] = adapt_patches(embed, target["patch_embed"], old, spec, path)
    if "pos_embed" in target:
        table, sharding = restored.get("pos_embed"), target["pos_embed"].sharding
        grid = old.grid if old else grid_of_table(table, spec, path)
        if grid != spec.grid:
            notes.append(
                f"positions of {grid[0]} x {grid[1]} patches resized to"
                f" {spec.grid[0]} x {spec.grid[1]}"
            )
        resized = partial(resize.positions_of, old=grid, vit=spec.encoder, spec=spec)
        restored["pos_embed"] = jax.jit(resized, out_shardings=sharding)(table)
    if notes:
        log_once(f"encoder of {path}: {'; '.join(notes)}")
    return {name: restored[name] for name in target}


def wanted(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Return shape and type of an array that is restored in its own sharding, or in another."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding)


def load_decoder(path: epath.Path, target: Any, old: ModelSpec, new: ModelSpec) -> dict:
    """Return the decoder of a checkpoint in the shardings of `target`; predictions are resized.

    Args:
      path: of a checkpoint.
      target: the arrays of the wanted decoder; only shapes and shardings are read.
      old, new: networks that differ in the sizes of images and patches only.
    """
    shapes = jax.tree.map(wanted, dict(target))
    replicated = target["norm"]["scale"].sharding
    saved = checkpoint.shapes(path, (*DECODER, "pred"))
    shapes["pred"] = jax.tree.map(partial(wanted, sharding=replicated), saved)
    decoder = checkpoint.restore(path, shapes, DECODER)

    def resized_prediction(pred: dict) -> dict:
        kernel, bias = resize.prediction(
            pred["kernel"], pred["bias"], old.patch_size, new.patch_size
        )
        return {"kernel": kernel, "bias": bias}

    shardings = jax.tree.map(lambda x: x.sharding, dict(target["pred"]))
    log_once(f"decoder of {path}: predictions of {patches_of(old)} resized to {patches_of(new)}")
    return decoder | {"pred": jax.jit(resized_prediction, out_shardings=shardings)(decoder["pred"])}


def patches_of(spec: ModelSpec) -> str:
    """Return what a patch is, in words."""
    return f"{spec.patch_size[0]} x {spec.patch_size[1]} pixels of {spec.channels} channel(s)"


def saved_spec(path: epath.Path) -> ModelSpec | None:
    """Return the network of a checkpoint by the config.json of its workdir, or None without one."""
    config = path.parent.parent / "config.json"
    return ModelSpec.from_config(json.loads(config.read_text())) if config.exists() else None


def require_same_tokens_and_blocks(old: ModelSpec | None, new: ModelSpec, path: epath.Path) -> None:
    """Check that there are as many class tokens and channel groups, and that blocks are alike.

    No array would tell that rotary positions differ. The initial value of layer_scale, which
    matters to a fresh network only, may differ.

    Raises:
      UserError: they differ.
    """

    def options(spec: ModelSpec) -> BlockOptions:
        block = spec.encoder.block or BlockOptions()
        return replace(block, layer_scale=float(block.layer_scale > 0))

    if old is not None and old.cls_tokens != new.cls_tokens:
        raise UserError(
            f"config.init_from: {path} has {old.cls_tokens} class tokens, and"
            f" config.model.cls_tokens={new.cls_tokens}: give the same"
        )
    if old is not None and old.channel_groups != new.channel_groups:
        raise UserError(
            f"config.init_from: {path} has the channel groups {old.channel_groups or 'none'}, and"
            f" config.model.channel_groups={new.channel_groups}: give the same"
        )
    if old is not None and options(old) != options(new):
        raise UserError(
            f"config.init_from: the blocks of {path} have {old.encoder.block or 'no options'}, and"
            f" config.model.block says {new.encoder.block or 'none'}: give the same"
        )


def adapt_patches(
    embed: Any, target: Any, old: ModelSpec, new: ModelSpec, path: epath.Path
) -> dict:
    """Return a patch embedding for the patches of `new`, in the shardings of `target`.

    Raises:
      UserError: the channels cannot be adapted.
    """

    def adapt(embed: Any) -> dict:
        kernel, bias = resize.patch_embedding(embed["kernel"], embed["bias"], old, new)
        return {"kernel": kernel, "bias": bias}

    shardings = jax.tree.map(lambda x: x.sharding, dict(target))
    try:
        return jax.jit(adapt, out_shardings=shardings)(dict(embed))
    except UserError as error:
        raise UserError(
            f"config.init_from: the encoder of {path} is of {patches_of(old)}, this config of"
            f" {patches_of(new)}: {error}. Set config.model.channels to {old.channels} or 1, or"
            f" pre-train with {new.channels}"
        ) from None


def grid_of_table(table: Any, spec: ModelSpec, path: epath.Path) -> tuple[int, int]:
    """Return the grid of positions without a config.json: that of `spec` if it fits, or a square.

    Raises:
      UserError: neither can be.
    """
    patches = spec.num_patches if table is None else table.shape[1] - spec.cls_tokens
    if patches == spec.num_patches:
        return spec.grid
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(
            f"config.init_from: {path} has positions for {patches} patches, which are no square,"
            " and no config.json that says what grid they are of: name the workdir of the run"
        )
    return side, side
