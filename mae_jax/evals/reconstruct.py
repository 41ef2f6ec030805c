"""Reconstruction of images, held out or not: loss, error in pixel levels, pictures.

Masks depend on nothing but the masking strategy and the index of an image in its source: they are
the same at every evaluation, in every run, and for any batch size and number of devices.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax.config import resolve_group
from mae_jax.data import sources
from mae_jax.errors import UserError
from mae_jax.evals import Report, figures, pixels
from mae_jax.evals.features import Batches, fetch
from mae_jax.metrics.summary import kind_of_images
from mae_jax.models import masking, masks
from mae_jax.models.patchify import patchify, to_levels, unpatchify
from mae_jax.models.spec import patch_grid

MASK_SEED = 0


class Evaluator:
    """Loss, errors and pictures of reconstructions of the first `cfg.images` images of a source.

    Every readable image counts once; sums over images are made in float64.

    Args:
      cfg: `images`; optional `prefix`, which also names the picture if it is not "eval".
      predict: its "reconstruction" gets a batch of image and score_BL, and returns pred_BLT,
        target_BLT and mask_BL. Errors in levels and pictures are made only of a target in
        `pixels.CAPTIONS`; for others, T is any width, and the loss alone is measured.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        if cfg.images < 1:
            raise UserError(f"evaluation with images={cfg.images}: it must be at least 1")
        model, data = config.model, config.data
        self._cfg, self._config, self._predict = cfg, config, predict["reconstruction"]
        self._prefix = cfg.get("prefix", "eval")
        self._patch_size = tuple(model.patch_size)
        self._value_range = tuple(data.get("value_range", ()))
        self._bands = figures.choose_bands(cfg.get("bands", ()), model.channels)
        self._grid = patch_grid(tuple(model.image_size), self._patch_size)
        score = resolve_group(config.masking, "masking", masking, masks, others=masking.KEYS)
        self._score = partial(score, batch=1, grid=self._grid, ratio=config.mask_ratio)
        self._in_levels = config.target.name in pixels.CAPTIONS
        self._source = sources.open_source(cfg.source or data.source, cfg.split, data.data_dir)
        trained = sources.open_source(data.source, data.split, data.data_dir)
        self._trained_on = sources.shared(self._source, trained) / len(self._source)
        self._batches = Batches(config, mesh, min(cfg.batch_size, cfg.images, len(self._source)))
        self._measure = jax.jit(self._reconstruct, out_shardings=NamedSharding(mesh, P()))
        self._trivial: list[np.ndarray] = []  # of each batch: no state changes these sums

    def run(self, state: Any) -> Report:
        """Return the errors of a TrainState, and a picture.

        eval/loss: the training loss on these images. eval/rmse: root mean squared error, in levels,
        of all hidden pixels and channels of all images together; eval/rmse_mean_colour and
        eval/rmse_interpolation: the same of the predictors of evals/pixels.py. eval/images: their
        number. eval/trained_on: the share of their split that is trained on.
        """
        images, sums = 0, np.zeros(3)
        pictures: dict[str, np.ndarray] = {}
        batches = self._batches.read(self._source, limit=self._cfg.images)
        for number, (local, arrays) in enumerate(batches):
            counted_B = fetch(arrays["counted"])
            out = jax.device_get(self._measure(state.params, state.extra, arrays))
            images += int(counted_B.sum())
            sums += out["sums_B3"][counted_B].astype(np.float64).sum(0)
            if not self._in_levels:
                continue
            if number == len(self._trivial):
                self._trivial.append(self._trivial_sums(local, out["mask_BL"]))
            shown = counted_B[: figures.PICTURES]
            if number == 0 and shown.any() and jax.process_index() == 0:
                name = "reconstruction" + f"_{self._prefix}" * (self._prefix != "eval")
                pictures[name] = self._picture(out, shown, int(state.step))
        hidden, loss, squared = sums.tolist()
        scalars = {"loss": loss / hidden}
        if self._in_levels:
            levels, mean_colour, interpolation = np.sum(self._trivial, 0).tolist()
            scalars["rmse"] = math.sqrt(squared / levels)
            scalars["rmse_mean_colour"] = math.sqrt(mean_colour / levels)
            scalars["rmse_interpolation"] = math.sqrt(interpolation / levels)
        scalars |= {"images": float(images), "trained_on": self._trained_on}
        return Report({f"{self._prefix}/{name}": x for name, x in scalars.items()}, pictures)

    def _reconstruct(self, params: Any, extra: Any, arrays: dict) -> dict:
        """Return sums over each image, its mask, and the first images with their reconstructions.

        sums_B3: hidden patches, the sum of their losses, and of their squared errors in levels.
        """
        # Each image is masked by a key of its own.
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(MASK_SEED)))(arrays["index"])
        score_BL = jax.vmap(lambda key: self._score(key)[0])(keys)
        out = self._predict(params, extra, {"image": arrays["image"], "score": score_BL})
        mask_BL = out["mask_BL"]
        mean_BL = jnp.square(out["pred_BLT"] - out["target_BLT"]).mean(-1)
        loss_BL = out.get("loss_BL", mean_BL)
        squared_BL, pictures = jnp.zeros_like(loss_BL), {}
        if self._in_levels:
            levels_BLP = patchify(to_levels(arrays["image"], self._value_range), self._patch_size)
            pred_BLP = pixels.predicted_levels(
                out["pred_BLT"],
                levels_BLP,
                mask_BL,
                grid=self._grid,
                target=self._config.target.name,
                mean=tuple(self._config.data.mean),
                std=tuple(self._config.data.std),
                clip=not self._value_range,
            )
            squared_BL = jnp.square(pred_BLP - levels_BLP).sum(-1)
            both = (x[: figures.PICTURES] for x in (levels_BLP, pred_BLP))
            shown = [unpatchify(x, self._patch_size, self._grid) for x in both]
            pictures = dict(zip(("image_BHWC", "pred_BHWC"), shown, strict=True))
        sums = [(x * mask_BL).sum(-1) for x in (jnp.ones_like(mask_BL), loss_BL, squared_BL)]
        return {"sums_B3": jnp.stack(sums, -1), "mask_BL": mask_BL, **pictures}

    def _trivial_sums(self, local: dict[str, np.ndarray], mask_BL: np.ndarray) -> np.ndarray:
        """Return the hidden levels of a batch, and the squared errors of two trivial predictors.

        Every host computes those of its rows.
        """
        rows = np.zeros((len(local["image"]), 3), np.float32)
        levels_BHWC = to_levels(jnp.asarray(local["image"]), self._value_range)
        # NumPy from here on: JAX would compile what each mask picks.
        levels_BLP = np.asarray(patchify(levels_BHWC, self._patch_size))
        for i in np.flatnonzero(local["counted"]):
            levels_LP, mask_L = levels_BLP[i].astype(float), mask_BL[self._batches.rows[i]]
            guesses = (
                pixels.mean_colour(levels_LP, mask_L, self._config.model.channels),
                pixels.interpolation(levels_LP, mask_L, self._patch_size, self._grid),
            )
            hidden = mask_L > 0
            squared = [np.square(guess - levels_LP)[hidden].sum() for guess in guesses]
            rows[i] = [levels_LP[hidden].size, *squared]
        everywhere = fetch(self._batches.put({"rows": rows})["rows"])
        return everywhere.astype(np.float64).sum(0)

    def _picture(self, out: dict[str, np.ndarray], shown: np.ndarray, step: int) -> np.ndarray:
        """Return the figure of those of the first images that are shown."""
        cfg, config = self._cfg, self._config
        image, pred = (
            figures.bands_of(out[name][shown], self._bands) for name in ("image_BHWC", "pred_BHWC")
        )
        images = (image, out["mask_BL"][: figures.PICTURES][shown], pred)
        caption = (
            f"Step {step:,}. {cfg.source or config.data.source}, {cfg.split}"
            f" ({kind_of_images(self._trained_on)}): {images[1].mean():.0%} of the patches are"
            " hidden. In the paper's objective the visible ones carry no loss, so that their"
            f" predictions (third column) mean little. {pixels.CAPTIONS[config.target.name]}"
        )
        return figures.reconstructions(*images, patch_size=self._patch_size, caption=caption)
