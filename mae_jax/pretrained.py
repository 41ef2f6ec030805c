"""Pre-trained weights of any format, as a model to call."""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.errors import UserError
from mae_jax.evals import pixels
from mae_jax.interop.open import open_weights
from mae_jax.models import channel_groups, mae, masking, probe
from mae_jax.models.block import LayerNorm
from mae_jax.models.classifier import Classifier, Output
from mae_jax.models.compute import ComputeConfig
from mae_jax.models.patchify import normalize, patchify, to_levels, to_patches, unpatchify
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Encoder


class Reconstruction(NamedTuple):
    """The prediction of a masked autoencoder for images."""

    images_BHWC: Array  # predicted for every patch, levels 0..255, float32
    mask_BL: Array  # 1 = hidden
    pred_BLT: Array  # the prediction itself, in the space of the target


@dataclass(frozen=True)
class Model:
    """Functions of (params, images): pure, and thus ready for jax.jit, vmap and grad.

    Each is compiled at its first call for a shape of images; models alike share the programs.

    `images` are values as in the files, (B, H, W, C), of the model's `spec.image_size` and of any
    type: levels 0..255, or those that `spec.value_range` is for.
    """

    spec: ModelSpec
    compute: ComputeConfig = ComputeConfig()

    @partial(jax.jit, static_argnames=("self", "layer"))
    def encode(self, params: Mapping, images: Array, layer: int | None = None) -> Array:
        """Return (B, 1 + L, D), float32: the cls token, then all patches row-major, none hidden.

        With `layer` they are the tokens after that many blocks, without the encoder's final norm.
        """
        spec, weights = self.spec, params["encoder"]
        if layer is not None:
            if not 1 <= layer <= spec.encoder.depth:
                raise UserError(f"layer={layer}: the encoder has layers 1 to {spec.encoder.depth}")
            spec, weights = probe.first_blocks(spec, weights, layer)
        network = Encoder(spec, self.compute, final_norm=layer is None and spec.final_norm)
        tokens: Any = network.apply({"params": weights}, self.patches(images))
        return tokens.astype(jnp.float32)

    @partial(jax.jit, static_argnames="self")
    def blocks(self, params: Mapping, images: Array) -> tuple[Array, Array]:
        """Return the tokens before the first block and after each, and the cls token's attention.

        Tokens are (1 + depth, B, 1 + L, D), without the final norm; attention, of the cls token to
        all tokens, is (depth, B, S, 1 + L).

        Raises:
          UserError: the blocks have options (`spec.encoder.block`), or there are several class
            tokens or channel groups.
        """
        options, cls, groups = self.spec.encoder.block, self.spec.cls_tokens, self.spec.num_groups
        if options or cls > 1 or groups > 1:
            several = f"{cls} class tokens" if cls > 1 else f"{groups} tokens for each patch"
            raise UserError(
                "attention is drawn only of plain blocks with one class token and one token for"
                f" each patch, and these have {options or several}"
            )
        weights = params["encoder"]
        network = Encoder(self.spec, self.compute, final_norm=False)
        tokens: Any = network.apply({"params": weights}, self.patches(images), return_blocks=True)
        tokens_MBND = tokens[1]
        attention = jax.vmap(_cls_attention)(weights["stack"]["blocks"], tokens_MBND[:-1])
        return tokens_MBND, attention

    @partial(jax.jit, static_argnames=("self", "mask_ratio"))
    def reconstruct(
        self, params: Mapping, images: Array, rng: Array, mask_ratio: float = 0.75
    ) -> Reconstruction:
        """Hide random patches and predict all; inside jax.jit `mask_ratio` must be static."""
        score_BL = masking.random(rng, len(images), self.spec.grid, mask_ratio)
        kept = masking.num_kept(score_BL.shape[1], mask_ratio)
        return self.predict(params, images, masking.keep_lowest(score_BL, kept))

    @partial(jax.jit, static_argnames=("self", "statistics"))
    def predict(
        self, params: Mapping, images: Array, mask: masking.Mask, statistics: str = "visible"
    ) -> Reconstruction:
        """Predict all patches from those that a mask leaves visible.

        Args:
          mask: of each image; see `masking.keep_lowest`.
          statistics: of patches, which undo normalised targets; see `pixels.patch_statistics`.
        """
        spec = self.spec
        if not spec.decoder:
            raise UserError(
                "these weights have no decoder of the paper's kind, so that nothing can be"
                " reconstructed: take a file with one, such as mae_pretrain_vit_base_full.pth"
            )
        if spec.target not in pixels.CAPTIONS:
            raise UserError(
                f"these weights predict {spec.target}, and no pixels; if it is pixels after all,"
                " load(path, target='pixels')"
            )
        images = jnp.asarray(images)
        if mask.mask_BL.shape != (wanted := (len(images), math.prod(spec.grid))):
            raise UserError(f"a mask of {mask.mask_BL.shape} for {wanted}, images and patches")
        network, seen, groups = mae.MAE(spec, self.compute), mask, spec.channel_groups
        if groups:
            seen = channel_groups.shared(mask, groups)
        pred_BLT: Any = network.apply({"params": params}, self.patches(images), seen)
        if groups:
            pred_BLT = channel_groups.merge(pred_BLT, groups)
        levels_BLP = pixels.predicted_levels(
            pred_BLT,
            patchify(to_levels(images, spec.value_range), spec.patch_size),
            mask.mask_BL,
            grid=spec.grid,
            target=spec.target,
            mean=spec.mean,
            std=spec.std,
            source=statistics,
        )
        images_BHWC = unpatchify(levels_BLP, spec.patch_size, spec.grid)
        return Reconstruction(images_BHWC, mask.mask_BL, pred_BLT)

    @partial(jax.jit, static_argnames="self")
    def classify(self, params: Mapping, images: Array) -> Output:
        """Return features and logits of fine-tuned weights."""
        if not self.spec.classes:
            raise UserError("these weights have no head, so that nothing can be classified")
        network = Classifier(self.spec, self.compute)
        return Output(*network.apply({"params": params}, self.patches(images)))

    def patches(self, images: Array) -> Array:
        """Return (B, L, P): patches of the normalised images."""
        return to_patches(self.normalize(images), self.spec)

    def normalize(self, images: Array) -> Array:
        """Return (B, H, W, C): images as the network was trained on them, by mean and std."""
        shape = (*self.spec.image_size, self.spec.channels)
        if images.ndim != 4 or images.shape[1:] != shape:
            raise UserError(
                f"images of shape {images.shape}: this model takes (batch, *{shape}); one image is"
                " images[None], and load(path, image_size=...) makes a model of another size"
            )
        return normalize(images, self.spec)


def _cls_attention(block: Mapping, x_BND: Array) -> Array:
    """Return a block's attention of the cls token to all tokens: (B, S, N)."""
    normed_BND: Any = LayerNorm(name="").apply({"params": block["norm1"]}, x_BND)
    kernel_D3SF, bias_3SF = (block["attn"]["qkv"][name] for name in ("kernel", "bias"))
    query_BSF = jnp.einsum("bd,dsf->bsf", normed_BND[:, 0], kernel_D3SF[:, 0]) + bias_3SF[0]
    key_BNSF = jnp.einsum("bnd,dsf->bnsf", normed_BND, kernel_D3SF[:, 1]) + bias_3SF[1]
    score_BSN = jnp.einsum("bsf,bnsf->bsn", query_BSF, key_BNSF)
    return jax.nn.softmax(score_BSN * query_BSF.shape[-1] ** -0.5)


def load(path: str | os.PathLike, **options: Any) -> tuple[Model, dict]:
    """Return weights of any known format, as a model and its parameters.

        model, params = mae_jax.load("mae_pretrain_vit_base_full.pth")
        images = np.zeros((1, 224, 224, 3), np.uint8)
        tokens = model.encode(params, images)  # (1, 1 + 196, 768)
        out = model.reconstruct(params, images, jax.random.key(0), mask_ratio=0.75)
        out.images_BHWC  # levels 0..255

    What the file does not say and had to be assumed is printed to stderr; mean and std of three
    channels are ImageNet's without a word.

    Args:
      path: an official or timm .pth or .safetensors file, a Hugging Face directory (also of
        DINOv2, DINOv3 or Pixio: docs/dense.md), a workdir of this project, one of its checkpoints,
        or the name of weights that come with the package: cifar10-s.
      **options: arguments of `interop.open.open_weights`, such as `image_size`.

    Raises:
      UserError: it cannot be read, or not in full.
    """
    weights = open_weights(path, **options)
    for line in weights.report:
        if "taken as" in line:
            print(f"{path}: {line}", file=sys.stderr)
    return Model(weights.spec), jax.device_put(weights.params, may_alias=False)
