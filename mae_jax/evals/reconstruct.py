"""Reconstruction of images, held out or not: loss, error in pixel levels, pictures.

Masks depend on nothing but the masking strategy and the index of an image in its source: they are
the same at every evaluation, in every run, and for any batch size and number of devices.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import sharding
from mae_jax.config import resolve
from mae_jax.data import pipeline, sources
from mae_jax.errors import UserError
from mae_jax.evals import figures, pixels
from mae_jax.models import masking
from mae_jax.models.patchify import patchify, unpatchify
from mae_jax.models.vit import grid_of

MASK_SEED = 0
PICTURES = 6  # rows of the figure


def kind(trained_on: float) -> str:
    """What images are called of whose split that share is trained on."""
    if not trained_on:
        return "held-out images"
    return "training images" if trained_on >= 1 else "images, some of them training images"


class Evaluator:
    """Reconstructs the first `cfg.images` images of a source.

    Exact: every readable image counts once, whatever the batch size, devices and hosts (the batch
    size is rounded up to what the mesh divides). Sums over images are made in float64.

    Args:
      cfg: `source` ('' = that of the training images), `split`, `images`, `batch_size`.
      config: the whole config.
      predict: its "reconstruction" is used, see tasks/pretrain.py.
      mesh: where the state lives.

    Raises:
      UserError: the source cannot be opened, or no image is asked for.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        model = config.model
        for name in ("images", "batch_size"):
            if cfg[name] < 1:
                raise UserError(f"evaluation with {name}={cfg[name]}: it must be at least 1")
        self._cfg, self._config, self._mesh = cfg, config, mesh
        self._predict = predict["reconstruction"]
        self._patch, self._size = tuple(model.patch_size), tuple(model.image_size)
        self._grid = grid_of(self._size, self._patch)
        name = cfg.source or config.data.source
        self._source = sources.open_source(name, cfg.split, config.data.data_dir)
        self._origin = f"{name}, {cfg.split}"
        data = config.data
        trained = sources.open_source(data.source, data.split, data.data_dir)
        self._trained_on = sources.shared(self._source, trained) / len(self._source)
        ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
        batch_size = min(cfg.batch_size, cfg.images, len(self._source))
        self._batch_size = -(-batch_size // ways) * ways
        self._rows = sharding.host_rows(mesh, self._batch_size)
        self._target = config.target.name
        self._in_pixels = self._target in pixels.CAPTIONS  # else nothing but the loss can be told
        self._trivial: dict[str, float] | None = None
        replicated = NamedSharding(mesh, P())
        self._measure = jax.jit(self._errors, out_shardings=replicated)
        self._draw = jax.jit(self._reconstructions, out_shardings=replicated)
        self._gather = jax.jit(lambda x: x, out_shardings=replicated)

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scalars (every host) and pictures (the first host) of a TrainState.

        eval/loss: the training loss on these images. eval/rmse: root mean squared error, in levels,
        of all hidden pixels and channels of all images together; eval/rmse_mean_colour and
        eval/rmse_interpolation: the same of the predictors of evals/pixels.py. eval/images: their
        number. eval/trained_on: the share of their split that is trained on. If the target is not
        made of pixels there are no errors in levels.

        Raises:
          UserError: none of the images can be read.
        """
        images = 0
        sums, trivial = np.zeros(3), np.zeros(3)
        pictures = {}
        for number, (batch, counted, arrays) in enumerate(self._batches()):
            out = jax.device_get(self._measure(state.params, state.extra, arrays))
            images += int(counted.sum())
            sums += out["sums_B3"][counted].astype(np.float64).sum(0)
            if self._in_pixels and self._trivial is None:
                trivial += self._trivial_errors(batch, out["mask_BL"], counted)
            if self._in_pixels and number == 0:
                drawn = jax.device_get(self._draw(state.params, state.extra, arrays))
                if jax.process_index() == 0:
                    shown = [x[counted[: len(x)]] for x in drawn]
                    caption = self._caption(int(state.step))
                    pictures["reconstruction"] = figures.reconstructions(
                        *shown, patch=self._patch, caption=caption
                    )
        if not images:
            raise UserError(f"no image of {self._origin} can be read: there is nothing to evaluate")
        hidden, loss, squared = sums.tolist()
        scalars = {"eval/loss": loss / hidden}
        if self._in_pixels:
            count = hidden * math.prod(self._patch) * self._config.model.channels
            if self._trivial is None:
                mean_colour, interpolation = np.sqrt(trivial[1:] / trivial[0]).tolist()
                self._trivial = {
                    "eval/rmse_mean_colour": mean_colour,
                    "eval/rmse_interpolation": interpolation,
                }
            scalars |= {"eval/rmse": math.sqrt(squared / count), **self._trivial}
        scalars |= {"eval/images": float(images), "eval/trained_on": self._trained_on}
        return scalars, pictures

    def _batches(self) -> Iterator[tuple[dict, np.ndarray, dict]]:
        """(this host's rows, which rows of the global batch count, the global arrays)."""
        batches = pipeline.eval_batches(
            self._source,
            batch_size=self._batch_size,
            image_size=self._size,
            channels=self._config.model.channels,
            rows=self._rows,
            limit=self._cfg.images,
        )
        for batch in batches:
            local = {
                "image": batch["image"],
                "index": batch["index"],
                "counted": batch["valid"] & (batch["bad"] < 0),
            }
            arrays = sharding.put_batch(self._mesh, local, self._batch_size)
            counted = jax.device_get(self._gather(arrays.pop("counted")))
            yield batch, counted, arrays

    def _scores(self, index_B: Array) -> Array:
        score = resolve(self._config.masking.name, masking)
        one = partial(score, batch=1, grid=self._grid, ratio=self._config.mask_ratio)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(MASK_SEED)))(index_B)
        return jax.vmap(lambda key: one(key)[0])(keys)

    def _levels(self, out: dict, image_BHWC: Array) -> tuple[Array, Array]:
        """Patches of the images, and what is predicted for them."""
        levels_BLP = patchify(image_BHWC.astype(jnp.float32), self._patch)
        data = self._config.data
        return levels_BLP, pixels.predicted_levels(
            out["pred_BLP"],
            levels_BLP,
            out["mask_BL"],
            grid=self._grid,
            target=self._target,
            mean=tuple(data.mean),
            std=tuple(data.std),
        )

    def _errors(self, params: Any, extra: Any, arrays: dict) -> dict:
        """Of each image: hidden patches, the sum of their losses, of their squared errors."""
        score_BL = self._scores(arrays["index"])
        out = self._predict(params, extra, {"image": arrays["image"], "score": score_BL})
        mask_BL = out["mask_BL"]
        loss_BL = jnp.square(out["pred_BLP"] - out["target_BLP"]).mean(-1)
        squared_BL = jnp.zeros_like(loss_BL)
        if self._in_pixels:
            levels_BLP, pred_BLP = self._levels(out, arrays["image"])
            squared_BL = jnp.square(pred_BLP - levels_BLP).sum(-1)
        sums = [(x * mask_BL).sum(-1) for x in (jnp.ones_like(mask_BL), loss_BL, squared_BL)]
        return {"sums_B3": jnp.stack(sums, -1), "mask_BL": mask_BL}

    def _reconstructions(self, params: Any, extra: Any, arrays: dict) -> tuple[Array, Array, Array]:
        """The first images, their masks and their reconstructions as uint8 images."""
        score_BL = self._scores(arrays["index"])
        out = self._predict(params, extra, {"image": arrays["image"], "score": score_BL})
        _, pred_BLP = self._levels(out, arrays["image"])
        pred_BHWC = unpatchify(jnp.round(pred_BLP).astype(jnp.uint8), self._patch, self._grid)
        rows = slice(min(PICTURES, self._cfg.images))
        return arrays["image"][rows], out["mask_BL"][rows], pred_BHWC[rows]

    def _trivial_errors(self, batch: dict, mask_BL: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """Hidden pixels of the batch, and the squared errors of the two predictors over them."""
        channels = self._config.model.channels
        rows = np.zeros((len(self._rows), 3), np.float32)
        for i, row in enumerate(self._rows):
            if counted[row]:
                levels_LP = np.asarray(patchify(batch["image"][i : i + 1], self._patch)[0], float)
                mask_L = mask_BL[row]
                guesses = (
                    pixels.mean_colour(levels_LP, mask_L, channels),
                    pixels.interpolation(levels_LP, mask_L, self._patch, self._grid),
                )
                hidden = mask_L > 0
                rows[i] = [
                    levels_LP[hidden].size,
                    *(np.square(guess - levels_LP)[hidden].sum() for guess in guesses),
                ]
        everywhere = sharding.put_batch(self._mesh, {"rows": rows}, self._batch_size)["rows"]
        return jax.device_get(self._gather(everywhere)).astype(np.float64).sum(0)

    def _caption(self, step: int) -> str:
        return (
            f"Step {step:,}. {self._origin} ({kind(self._trained_on)}):"
            f" {self._config.mask_ratio:.0%} of the patches are hidden. The visible ones carry no"
            " loss, so that their predictions (third column) mean little."
            f" {pixels.CAPTIONS[self._target]}"
        )
