"""Pre-trained weights from any file, as a model to call; and back into our own format.

Reads official .pth files, Hugging Face's ViTMAE and ViT directories, timm's files, and the runs and
checkpoints of this project.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import Array

from mae_jax import checkpoint
from mae_jax.errors import UserError
from mae_jax.evals import pixels
from mae_jax.interop import names, read
from mae_jax.interop.names import Spec, flatten, unflatten
from mae_jax.models import mae, masking, patch_embed, posemb
from mae_jax.models.classifier import Classifier, Output
from mae_jax.models.patchify import patchify, unpatchify
from mae_jax.models.vit import Block, ComputeConfig, Encoder, grid_of, layer_norm

READ_BYTES = 2**27  # of our own checkpoints, at a time


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of images."""

    images_BHWC: Array  # predicted for every patch, levels 0..255, float32
    mask_BL: Array  # 1 = hidden
    pred_BLP: Array  # the prediction itself, in the space of the target


@dataclass(frozen=True)
class Model:
    """Functions of (params, images): pure, and thus ready for jax.jit, vmap and grad.

    `images` are levels 0..255 of any type, (B, H, W, C), of the model's `spec.image_size`.
    """

    spec: Spec
    compute: ComputeConfig = ComputeConfig()

    def encode(self, params: Mapping, images: Array, layer: int | None = None) -> Array:
        """(B, 1 + L, D), float32: the cls token, then all patches row-major, nothing hidden.

        After the encoder's final norm (a classifier that averages patches has none), or, with
        `layer`, after so many blocks and without it.

        Raises:
          UserError: there is no such layer.
        """
        network, weights = self._encoder(), params["encoder"]
        if layer is not None:
            if not 1 <= layer <= self.spec.depth:
                raise UserError(f"layer={layer}: the encoder has layers 1 to {self.spec.depth}")
            network = network.clone(depth=layer, final_norm=False)
            weights = weights | {"stack": jax.tree.map(lambda x: x[:layer], weights["stack"])}
        tokens = network.apply({"params": weights}, self.patches(images))
        return jnp.asarray(tokens, jnp.float32)

    def blocks(self, params: Mapping, images: Array) -> tuple[Array, Array]:
        """The inside of `encode`, block by block.

        Returns:
          (1 + depth, B, 1 + L, D): the tokens before the first block and after each, un-normed.
          (depth, B, S, 1 + L): the attention of the cls token to all tokens, for each head.
        """
        encoder, s = params["encoder"], self.spec
        embed = encoder["patch_embed"]
        table_1ND = encoder.get("pos_embed", posemb.sincos_2d(s.width, s.grid)[None])
        x_BLD = self.patches(images) @ embed["kernel"] + embed["bias"]
        cls_B1D = jnp.broadcast_to(encoder["cls_token"], (len(x_BLD), 1, s.width))
        x_BND = jnp.concatenate([cls_B1D, x_BLD], axis=1) + table_1ND
        block = Block(s.heads, (s.hidden + 0.5) / s.width, self.compute)

        def step(x_BND: Array, layer: Mapping) -> tuple[Array, tuple[Array, Array]]:
            normed_BND = layer_norm("").apply({"params": layer["norm1"]}, x_BND)
            qkv = layer["attn"]["qkv"]
            qkv_BN3SF = jnp.einsum("bnd,dtsf->bntsf", normed_BND, qkv["kernel"]) + qkv["bias"]
            query_BSF, key_BNSF = qkv_BN3SF[:, 0, 0], qkv_BN3SF[:, :, 1]
            score_BSN = jnp.einsum("bsf,bnsf->bsn", query_BSF, key_BNSF)
            attention_BSN = jax.nn.softmax(score_BSN * query_BSF.shape[-1] ** -0.5)
            x_BND = block.apply({"params": layer}, x_BND, jnp.zeros(()), True)[0]
            return x_BND, (x_BND, attention_BSN)

        _, (after, attention) = jax.lax.scan(step, x_BND, encoder["stack"]["blocks"])
        return jnp.concatenate([x_BND[None], after]), attention

    def reconstruct(
        self, params: Mapping, images: Array, rng: Array, mask_ratio: float = 0.75
    ) -> Reconstruction:
        """Hide random patches and predict all.

        `mask_ratio` is a shape: under jax.jit name it in static_argnames.

        Raises:
          UserError: the weights have no decoder; a ratio that hides no patch or all.
        """
        score_BL = masking.random(rng, len(images), self.spec.grid, mask_ratio)
        kept = masking.num_kept(score_BL.shape[1], mask_ratio)
        return self.predict(params, images, masking.keep_lowest(score_BL, kept))

    def predict(
        self, params: Mapping, images: Array, mask: masking.Mask, statistics: str = "visible"
    ) -> Reconstruction:
        """`reconstruct` with a mask of one's own.

        Args:
          statistics: that undo normalised targets, see `evals.pixels.patch_statistics`.
        """
        s = self.spec
        if not s.decoder_width:
            raise UserError(
                "these weights have no decoder, so that nothing can be reconstructed: take a file"
                " with one, such as mae_pretrain_vit_base_full.pth"
            )
        if s.target not in pixels.CAPTIONS:
            raise UserError(
                f"these weights predict {s.target}, and no pixels: the decoder's output is that of"
                " mae_jax.models.mae.MAE; if it is levels of its own, load(path, target='pixels')"
            )
        network = mae.MAE(self._encoder(), self._decoder(), s.tokens_in_encoder)
        pred_BLP = jnp.asarray(network.apply({"params": params}, self.patches(images), mask))
        levels_BLP = pixels.predicted_levels(
            pred_BLP,
            patchify(jnp.asarray(images, jnp.float32), s.patch),
            mask.mask_BL,
            grid=s.grid,
            target=s.target,
            mean=s.mean,
            std=s.std,
            source=statistics,
        )
        return Reconstruction(unpatchify(levels_BLP, s.patch, s.grid), mask.mask_BL, pred_BLP)

    def classify(self, params: Mapping, images: Array) -> Output:
        """Features and logits of fine-tuned weights.

        Raises:
          UserError: the weights have no head.
        """
        if not self.spec.classes:
            raise UserError("these weights have no head, so that nothing can be classified")
        pool: Any = self.spec.pool
        network = Classifier(self._encoder(), self.spec.classes, pool)
        return Output(*network.apply({"params": params}, self.patches(images)))

    def patches(self, images: Array) -> Array:
        """(B, L, P): patches of the normalised images.

        Raises:
          UserError: images of another size, or one without a batch.
        """
        wanted = (*self.spec.image_size, self.spec.channels)
        if images.shape == wanted:
            raise UserError(f"an image of shape {wanted}: give a batch of them, images[None]")
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise UserError(
                f"images of shape {images.shape}: this model takes (batch, height, width, channels)"
                f" with {wanted} after the batch; load(path, image_size=...) makes one of another"
            )
        scaled_BHWC = jnp.asarray(images, jnp.float32) / 255
        normalized = (scaled_BHWC - jnp.asarray(self.spec.mean)) / jnp.asarray(self.spec.std)
        return patchify(normalized, self.spec.patch)

    def _encoder(self) -> Encoder:
        s = self.spec
        return Encoder(
            s.grid,
            s.width,
            s.depth,
            s.heads,
            (s.hidden + 0.5) / s.width,  # rounds down to exactly `hidden`
            trained_positions=s.positions,
            final_norm=not s.classes or s.pool == "cls",
            compute=self.compute,
        )

    def _decoder(self) -> mae.Decoder:
        s = self.spec
        return mae.Decoder(
            s.grid,
            s.values,
            s.decoder_width,
            s.decoder_depth,
            s.decoder_heads,
            (s.decoder_hidden + 0.5) / s.decoder_width,
            self.compute,
            trained_positions=s.decoder_positions,
        )


def load(path: str | os.PathLike, **options: Any) -> tuple[Model, dict]:
    """Weights of any known format, as a model and its parameters.

        model, params = mae_jax.load("mae_pretrain_vit_base_full.pth")
        images = np.zeros((1, 224, 224, 3), np.uint8)
        tokens = jax.jit(model.encode)(params, images)  # (1, 1 + 196, 768)
        out = model.reconstruct(params, images, jax.random.key(0), mask_ratio=0.75)
        out.images_BHWC  # levels 0..255

    Args:
      path: an official or timm .pth or .safetensors file, a Hugging Face directory, a workdir of
        this project, or one of its checkpoints.
      **options: as of `open_weights`.

    What the file does not say and had to be assumed is printed to stderr.

    Raises:
      UserError: it cannot be read, or not in full.
    """
    weights = open_weights(path, **options)
    for line in weights.report:
        if "taken as" in line:
            print(f"{path}: {line}", file=sys.stderr)
    return Model(weights.spec), jax.tree.map(jnp.asarray, weights.params)


class Weights(NamedTuple):
    """Parameters on the host, the network that they are of, and what happened on the way."""

    spec: Spec
    params: dict
    report: list[str]
    about: dict[str, str]  # origin, data and recipe, as far as they are known


def open_weights(
    path: str | os.PathLike,
    *,
    part: str = "all",
    image_size: int | tuple[int, int] | None = None,
    file_image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    target: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    allow_unused: bool = False,
    averaged: bool = False,
) -> Weights:
    """Read weights of any format, all of them or nothing.

    Args:
      part: "all" or "encoder".
      image_size: (height, width), or the side of a square, to make a model for; the positions,
        fixed or trained, are resized as the official fine-tuning does it.
      file_image_size: that of the file, where its patches are not in a square.
      channels: of images to make a model for; the patch embedding is adapted. Encoder only.
      heads, decoder_heads, target, mean, std: where the file does not say.
      allow_unused: go on though the file has tensors that the network has not.
      averaged: of a run with config.ema, such as one from scratch, the averaged weights.

    Raises:
      UserError: it cannot be read, a tensor is missing or does not fit, or one is left over;
        there are no averaged weights.
    """
    place = epath.Path(path)  # a workdir may be in a bucket
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    if part not in ("all", "encoder"):
        raise UserError(f"part={part!r} is unknown: choose all or encoder")
    if target not in (None, "pixels", "norm_pixels"):
        raise UserError(f"target={target!r} is unknown: choose pixels or norm_pixels")
    try:
        ours = _is_ours(place)
    except ImportError as error:  # gcsfs or s3fs
        raise UserError(f"{place} cannot be opened: {error}") from error
    if ours:
        spec, params, report, about = _open_ours(place, averaged)
        if part == "encoder":
            spec, params = _encoder_only(spec), {"encoder": params["encoder"]}
    elif averaged:
        raise UserError(f"averaged weights: only runs of this project have both, and not {place}")
    elif "://" in str(place):
        raise UserError(
            f"{place} is no workdir of this project; other files are read from local disks only:"
            " copy it first"
        )
    else:
        file = read.open_file(place)
        about = {"origin": f"{place.name} ({file.source})"}
        spec, notes = read.infer(
            file,
            heads=heads,
            decoder_heads=decoder_heads,
            image_size=file_image_size,
            target=target,
            name=place.name,
        )
        if mean and std:
            notes = [line for line in notes if not line.startswith("mean and std")]
        left = read.unused(file, spec)
        if left and not allow_unused:
            raise UserError(
                f"{place} has {len(left)} tensors that {file.source} has no place for:"
                f" {', '.join(left[:8])}{', ...' * (len(left) > 8)}. If they are not needed, say"
                " allow_unused"
            )
        whole = len(file.state) - len(left)
        if part == "encoder":
            spec = _encoder_only(spec)
            dropped = len(read.unused(file, spec)) - len(left)
            notes.append(f"part=encoder: {dropped} tensors of decoder and head left out")
            whole -= dropped
        params, spec = names.to_ours(file.state, spec, file.family)
        report = [f"{place}: {file.source}", f"matched: {whole} tensors", *file.notes, *notes]
        if left:
            report.append(f"unused: {', '.join(left)}")
        absent = [
            name
            for entry in names.entries(spec, file.family)
            for name in entry.names
            if name not in file.state
        ]
        if absent:
            report.append(f"missing, computed: {', '.join(absent)}")
        for side, kept in (("encoder", spec.positions), ("decoder", spec.decoder_positions)):
            if kept and not spec.classes:
                report.append(f"positions of the {side} are not the sine-cosine table: kept")
    given: dict[str, Any] = {name: tuple(x) for name, x in (("mean", mean), ("std", std)) if x}
    recoloured = channels and channels != spec.channels
    wanted = {name: x for name, x in given.items() if recoloured and len(x) == channels}
    spec = spec._replace(**{name: x for name, x in given.items() if name not in wanted})
    if target:
        spec = spec._replace(target=target)
    if image_size and tuple(image_size) != spec.image_size:
        spec, params, lines = _resized(spec, params, (image_size[0], image_size[1]))
        report += lines
    if channels and recoloured:
        report.append(f"patch_embed: adapted from {spec.channels} to {channels} channels")
        spec, params = _recoloured(spec, params, channels, wanted)
    for name in ("mean", "std"):
        if len(getattr(spec, name)) != spec.channels:
            raise UserError(
                f"{name} has {len(getattr(spec, name))} numbers for images of {spec.channels}"
                " channels: give one for each"
            )
    return Weights(spec, params, report, about)


def _encoder_only(spec: Spec) -> Spec:
    if spec.classes and spec.pool == "avg":
        raise UserError(
            "a classifier that averages patches has no final norm of its encoder (fc_norm comes"
            " after the mean): take it whole, with part=all"
        )
    return spec._replace(
        classes=0, decoder_width=0, decoder_depth=0, decoder_heads=0, decoder_hidden=0
    )


def _resized(spec: Spec, params: dict, size: tuple[int, int]) -> tuple[Spec, dict, list[str]]:
    """For images of another size. A fixed table, resized, is no fixed one any more."""
    grid = grid_of(size, spec.patch)
    lines = []
    params = {key: dict(value) for key, value in params.items()}
    for side, width in (("encoder", spec.width), ("decoder", spec.decoder_width)):
        if width:
            table = params[side].get("pos_embed")
            table = jnp.asarray(
                posemb.sincos_2d(width, spec.grid)[None] if table is None else table
            )
            params[side]["pos_embed"] = np.asarray(posemb.resize(table, spec.grid, grid))
            lines.append(f"resized: {side}/pos_embed, {spec.grid} -> {grid} patches")
    spec = spec._replace(grid=grid, positions=True, decoder_positions=spec.decoder_width > 0)
    return spec, params, lines


def _recoloured(spec: Spec, params: dict, channels: int, wanted: dict) -> tuple[Spec, dict]:
    """For images of other channels, with the mean and std that are wanted, or like the old ones.

    See `patch_embed.adapt`. Where neither side is grey nobody knows what the new channels have to
    do with the old ones, and weights are repeated in turn, as timm does.
    """
    if spec.decoder_width:
        raise UserError(
            f"the decoder predicts {spec.channels} channels, and cannot be adapted to {channels}:"
            " take part=encoder"
        )
    old = spec.channels
    like = {
        name: (float(np.mean(x)),) if channels == 1 else tuple(x[i % old] for i in range(channels))
        for name, x in (("mean", spec.mean), ("std", spec.std))
    }
    new = spec._replace(channels=channels, **like | wanted)
    kernel, bias = (params["encoder"]["patch_embed"][x] for x in ("kernel", "bias"))
    if 1 in (old, channels):
        before, after = (patch_embed.Pixels(s.patch, s.mean, s.std) for s in (spec, new))
        kernel, bias = map(np.asarray, patch_embed.adapt(kernel, bias, before, after))
    else:
        kernel = patch_embed.recolour(kernel, old, channels)
    embed = {"kernel": kernel, "bias": bias}
    return new, params | {"encoder": params["encoder"] | {"patch_embed": embed}}


def _is_ours(path: epath.Path) -> bool:
    return path.is_dir() and any((path / x).is_dir() for x in ("checkpoints", "state"))


def _open_ours(path: epath.Path, averaged: bool) -> Weights:
    step = checkpoint.find(path, "init_from")
    folders = (step, step.parent, step.parent.parent)
    configs = [folder / "config.json" for folder in folders if (folder / "config.json").exists()]
    if not configs:
        raise UserError(
            f"{step} lies in no workdir: the config.json that says what it is of is looked for"
            f" beside it and two folders above"
        )
    try:
        config = json.loads(configs[0].read_text())
        model, data = config["model"], config["data"]
        patch = tuple(model["patch_size"])
        common = dict(
            grid=grid_of(tuple(model["image_size"]), patch),
            patch=patch,
            channels=model["channels"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            mask_ratio=config.get("mask_ratio", 0.75),
            target=config.get("target", {}).get("name", "norm_pixels"),
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{configs[0]} is not the config of a run: {error!r}") from None
    flat = _read(step, checkpoint.AVERAGED if averaged else checkpoint.PARAMS)
    if averaged and not flat:
        raise UserError(f"{step} holds no averaged weights: its run had no config.ema")
    if "encoder/stack/blocks/attn/qkv/kernel" not in flat:
        raise UserError(f"{step} holds no encoder; its parameters: {', '.join(flat)[:200]}")
    about = {"origin": config.get("converted_from") or f"{path.name}, step {step.name}"}
    if "train_for" in config:
        about["data"] = str(data.get("source", ""))
        about["recipe"] = (
            f"{config['train_for']}, batch {config.get('batch_size')},"
            f" {', '.join(f'{k} {v}' for k, v in config.get('optim', {}).items())}"
        )
    report = [f"{step}: a checkpoint of this project", f"matched: {len(flat)} arrays"]
    if averaged:
        report.append("the averaged weights (config.ema)")
    elif config.get("ema"):
        report.append(
            "weights are taken as the last update left them: averaged=True for their mean"
        )
    return Weights(_spec_of(flat, common), unflatten(flat), report, about)


def _read(step: epath.Path, part: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, under these keys, by their paths, a few at a time.

    Of all that Orbax is asked for it holds the decoded chunks beside the result.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    waiting = flatten(checkpoint.shapes(step, part))
    prefix = "/".join(part) + "/"
    found: dict[str, np.ndarray] = {}
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        while waiting:
            group: dict[str, jax.ShapeDtypeStruct] = {}
            while waiting and sum(x.size * x.dtype.itemsize for x in group.values()) < READ_BYTES:
                name, shape = waiting.popitem()
                group[name] = shape.update(sharding=here)
            target = unflatten({prefix + name: shape for name, shape in group.items()})
            arguments = ocp.checkpoint_utils.construct_restore_args(target)
            arrays = reader.restore(
                step / "state",
                args=ocp.args.PyTreeRestore(target, arguments, partial_restore=True),
            )
            for name, x in flatten(arrays).items():
                found[name.removeprefix(prefix)] = np.asarray(x)
    return found


def _spec_of(flat: Mapping[str, np.ndarray], common: Mapping[str, Any]) -> Spec:
    """The network, from the shapes of its parameters and what they cannot tell."""

    def stack(side: str) -> tuple[int, int, int, int]:
        blocks = f"{side}/stack/blocks"
        depth, width, _, heads, _ = flat[f"{blocks}/attn/qkv/kernel"].shape
        return width, depth, heads, flat[f"{blocks}/mlp/fc1/kernel"].shape[-1]

    width, depth, heads, hidden = stack("encoder")
    more: dict[str, Any] = {}
    if "decoder/pred/kernel" in flat:
        keys = ("decoder_width", "decoder_depth", "decoder_heads", "decoder_hidden")
        more = dict(zip(keys, stack("decoder"), strict=True))
    if "head/kernel" in flat:
        more["classes"] = flat["head/kernel"].shape[-1]
        more["pool"] = "avg" if "fc_norm/scale" in flat else "cls"
    return Spec(
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        positions="encoder/pos_embed" in flat,
        decoder_positions="decoder/pos_embed" in flat,
        tokens_in_encoder="encoder/mask_token" in flat,
        **common,
        **more,
    )


def save(directory: str | os.PathLike, spec: Spec, params: dict, origin: str) -> None:
    """Write a workdir of ours with one checkpoint, of step 0, for config.init_from and `load`."""
    root = Path(directory)
    step = root.absolute() / "checkpoints" / "0"
    # Neither copied first nor in one database, whose parts Orbax would keep in memory until the
    # end: in chunks, of which a few are held.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns of what is left out here on purpose
    try:
        in_place = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, in_place))
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        chunks = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=2**26), {"params": params})
        tree = ocp.args.PyTreeSave({"params": params}, save_args=chunks)
        with ocp.Checkpointer(handler) as saver:
            saver.save(step / "state", args=tree)
    finally:
        logger.setLevel(level)
    (step / checkpoint.DIGESTS).write_text(json.dumps(checkpoint.digests(epath.Path(step))))
    config: dict[str, Any] = {
        "task": "classify" if spec.classes else "pretrain",
        "converted_from": origin,
        "mask_ratio": spec.mask_ratio,
        "target": {"name": spec.target},
        "model": {
            "image_size": spec.image_size,
            "patch_size": spec.patch,
            "channels": spec.channels,
            "width": spec.width,
            "depth": spec.depth,
            "heads": spec.heads,
            "mlp_ratio": spec.hidden / spec.width,
        },
        "data": {"mean": spec.mean, "std": spec.std},
    }
    if spec.decoder_width:
        keys = ("decoder_width", "decoder_depth", "decoder_heads")
        config["model"] |= {key: getattr(spec, key) for key in keys}
    if spec.classes:
        config["model"]["pool"] = spec.pool
    (root / "config.json").write_text(json.dumps(config, indent=1) + "\n")
