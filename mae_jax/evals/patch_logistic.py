"""Segmentation by a logistic regression of patches on frozen features, which are computed once.

`logistic.fit` finds the classifier of a patch's label; its prediction holds for all pixels of the
patch. The strength of the penalty is chosen by the patches of a tenth of the bank's images.

The bank, of one encoder block at a time, stays where it was computed, split over the mesh: patches
x width numbers in float32, twice as many when they are standardised, and two arrays of patches x
classes.
ADE20K at 224 with L/16: 4.0 million patches, 32 GB, and 5 GB: one 80 GB GPU, or 4 of 16 GB.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import distributed
from mae_jax.data.label_maps import IGNORED
from mae_jax.errors import UserError
from mae_jax.evals import Report, iou, logistic
from mae_jax.evals.features import Features, fetch
from mae_jax.evals.patches import Reader


class Evaluator:
    """Segmentation of one split by a logistic regression on the patches of another.

    Args:
      cfg: that of `patches.Reader`.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._cfg, self._reader = cfg, Reader(cfg, config, predict, mesh)
        self._fitter = logistic.Fitter(mesh)
        self._classify = jax.jit(logistic.classify)

    def run(self, state: Any) -> Report:
        """Return the report of `iou.report`, with the setting logistic.

        With several layers also logistic_block{N} of each, and logistic_best of the block that is
        best on the held-out part of the bank, whose number is {prefix}/logistic_best_block.
        """
        cfg, reader = self._cfg, self._reader
        names, losses, images = reader.queries.class_names, {}, 0
        settings: dict[str, np.ndarray] = {}
        pictures: dict[str, np.ndarray] = {}
        for block in reversed(reader.numbers):
            linear, scale, classes, losses[block] = self._fit(state, block)
            counts, images = np.zeros((len(names), len(names) + 1), int), 0
            for patches, arrays in reader.batches(state, reader.queries, block):
                distributed.raise_if_stopping()
                found_N = self._classify(linear, scale, patches.x)
                found_N, truth_NE, counted_B = fetch((found_N, patches.pixels, arrays["counted"]))
                images += int(counted_B.sum())
                label_N1 = np.where(found_N < 0, IGNORED, classes[found_N])[:, None]
                found_NE = np.broadcast_to(label_N1, truth_NE.shape)
                counts = counts + iou.confusion(truth_NE, found_NE, len(names))
                if not pictures:  # of the last block, which comes first
                    what = "Logistic regression of each patch."
                    whole = reader.whole(found_NE)
                    pictures[cfg.type] = reader.picture(arrays, whole, what, int(state.step))
            if block == reader.numbers[-1]:
                settings["logistic"] = counts
            if len(reader.numbers) > 1:
                settings[f"logistic_block{block}"] = counts
        prefix, about = cfg.get("prefix", "eval"), reader.about | {"images": images}
        best = min(losses, key=lambda block: losses[block])
        if len(reader.numbers) > 1:
            settings["logistic_best"] = settings[f"logistic_block{best}"]
            about["best_block"] = best
        report = iou.report(prefix, "patch_logistic", settings, about, names, pictures)
        if len(reader.numbers) == 1:
            return report
        return report._replace(scalars={**report.scalars, f"{prefix}/logistic_best_block": best})

    def _fit(
        self, state: Any, block: int
    ) -> tuple[logistic.Linear, logistic.Scale, np.ndarray, float]:
        """Return the classifier of a block, its scale, its classes, and the held-out loss."""
        reader = self._reader
        bank = reader.bank(state, block)
        label, counted = fetch((bank.label, bank.counted))
        classes = np.unique(label[counted])
        if not len(classes):
            raise UserError(
                f"{self._cfg.type}: no patch of {self._cfg.bank_split} has a class in most of its"
                " pixels: are config.data.ignore and config.data.shift those of the label maps?"
            )
        per_image = reader.grid[0] * reader.grid[1]
        shape = (label.shape[0], label.shape[1] // per_image)
        held = logistic.hold_out(len(reader.bank_source), shape).repeat(per_image, 1)
        numbered = Features(bank.x, self._fitter.number(bank.label, classes), bank.counted)
        linear, scale, loss = self._fitter(numbered, len(classes), held, self._cfg.bank_split)
        return linear, scale, classes, loss
