"""Features and labels of patches: what is needed to segment without training (CAPI's protocol).

An image and its map are stretched to the size of the network, bicubic and nearest (Darcet et al.
2025, arXiv 2502.08769). The label of a patch is the class of most of its pixels, of equal counts
the lowest; if most of its pixels have none, the patch is left out of the bank. Features are
standardised by their mean and deviation over the bank: without that, MAE's are far worse.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import sharding
from mae_jax.data import bands, label_maps, segmentation
from mae_jax.data.label_maps import IGNORED
from mae_jax.data.segfolder import PairSource
from mae_jax.errors import UserError
from mae_jax.evals import figures, segment_figures
from mae_jax.evals.features import (
    Batches,
    block_numbers,
    fetch,
    require_other_images,
    stacker,
)
from mae_jax.models.patchify import patchify, unpatchify
from mae_jax.models.spec import patch_grid


class Patches(NamedTuple):
    """The patches of a batch (N, ...), or of T batches (T, N, ...); N is split over the mesh."""

    x: Array  # (..., N, D) features
    pixels: Array  # (..., N, E) uint8: the class of each pixel, and IGNORED
    label: Array  # (..., N) int32: that of most pixels, and IGNORED
    counted: Array  # (..., N) bool: labelled, and of an image that can be read


def majority(pixels_NE: Array) -> Array:
    """Return the most frequent class of each row, of equally frequent ones the lowest."""
    rows = jnp.arange(len(pixels_NE))[:, None]
    count = jnp.zeros((len(pixels_NE), IGNORED + 1), jnp.int32).at[rows, pixels_NE].add(1)
    return count.argmax(-1).astype(jnp.int32)


def take_patches(x_BLD: Array, map_BHW: Array, counted_B: Array, patch_size: Any) -> Patches:
    """Return the patches of a batch of images."""
    pixels_BLE = patchify(map_BHW[..., None], patch_size)
    pixels_NE = pixels_BLE.reshape(-1, pixels_BLE.shape[-1])
    label_N = majority(pixels_NE)
    counted_N = jnp.repeat(counted_B, x_BLD.shape[1]) & (label_N != IGNORED)
    return Patches(x_BLD.reshape(-1, x_BLD.shape[-1]), pixels_NE, label_N, counted_N)


class Reader:
    """The images of two splits, the bank and the queries, as patches with features.

    Args:
      cfg: config.evals.NAME: `source`, `split`, `bank_split`, `batch_size`, `layers`; `classes`,
        `ignore`, `shift` and `palette` where they are not those of config.data.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        if "patch_features" not in predict:
            raise UserError(f"{cfg.type}: this task gives no features of patches")
        model, data = config.model, config.data
        source = cfg.source or data.source
        meaning = label_maps.meaning(cfg, data)
        self.queries, self.bank_source = (
            segmentation.open_pairs(meaning, source, split) for split in (cfg.split, cfg.bank_split)
        )
        require_other_images(cfg, self.queries, self.bank_source)
        dtype = bands.pixel_type(data.get("value_range", ()))
        for pairs in (self.queries, self.bank_source):
            segmentation.look_at(pairs, model.channels, dtype)
        self.numbers = block_numbers(cfg, model.depth)
        self.patch_size, self.size = tuple(model.patch_size), tuple(model.image_size)
        self.grid = patch_grid(self.size, self.patch_size)
        self.about = {
            "source": source,
            "split": cfg.split,
            "bank_split": cfg.bank_split,
            "label_resolution": list(self.size),
            "label_resize": "stretched to that size, nearest pixel",
        }
        self._predict = predict["patch_features"]
        self._batches = Batches(config, mesh, cfg.batch_size)
        rows = sharding.batch_sharding(mesh)
        self._take = jax.jit(self._take_block, static_argnums=3, out_shardings=rows)
        self._stack = stacker(mesh)

    def _take_block(self, params: Any, extra: Any, arrays: dict, block: int) -> Patches:
        x_BLD = self._predict(params, extra, {"image": arrays["image"]}, block)
        return take_patches(x_BLD, arrays["map"], arrays["counted"], self.patch_size)

    def batches(
        self, state: Any, source: PairSource, block: int
    ) -> Iterator[tuple[Patches, dict[str, Array]]]:
        """Yield the patches of each batch, and its `image`, `map` and `counted`."""
        for _, arrays in self._batches.read_pairs(source):
            yield self._take(state.params, state.extra, arrays, block), arrays

    def bank(self, state: Any, block: int) -> Patches:
        """Return the patches of the whole bank (T, N, ...); each device keeps its own rows."""
        return self._stack(
            *(patches for patches, _ in self.batches(state, self.bank_source, block))
        )

    def whole(self, pixels_NE: np.ndarray) -> np.ndarray:
        """Return maps (B, H, W) from the pixels of their patches."""
        patches_BLE = pixels_NE.reshape(-1, self.grid[0] * self.grid[1], pixels_NE.shape[-1])
        return np.asarray(unpatchify(jnp.asarray(patches_BLE), self.patch_size, self.grid))[..., 0]

    def picture(
        self, arrays: dict[str, Any], predicted_BHW: np.ndarray, what: str, step: int
    ) -> np.ndarray:
        """Draw the first images of a batch; every host calls this."""
        image, truth, counted = fetch([arrays[name] for name in ("image", "map", "counted")])
        shown = np.flatnonzero(counted)[: figures.PICTURES]
        caption = f"Step {step:,}. {self.about['source']}, {self.about['split']}. {what}"
        return segment_figures.sheet(
            image[shown],
            truth[shown],
            predicted_BHW[shown],
            self.queries.class_names,
            caption,
        )
