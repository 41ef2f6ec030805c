"""Accuracy of probes trained side by side, and of the one that held-out training images choose."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.sources import Source
from mae_jax.evals.features import Extractor, open_labelled


class Evaluator:
    """Classifies a split by each head of a sweep over base rates.

    The first head has the rate of the config, the others those of config.optim.sweep. Which is best
    is decided on `select_split`, a share of the training data that the heads are not trained on,
    and never on `split`.

    Args:
      cfg: `source` ('' = that of the training images), `split`, `select_split` ('' without a
        sweep), `batch_size`.
      config: the whole config.
      predict: its "logits" is used, which gives (B, R, Y) for R rates.
      mesh: where the state lives.

    Raises:
      ValueError: the source has no labels, or other classes than the training images; there is
        nothing to choose the best rate on, or it is a split trained on or measured on.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        data = config.data
        name = cfg.source or data.source
        self._rates = (config.optim.blr, *config.optim.sweep)
        self._splits = {"": open_labelled(name, cfg.split, data.data_dir)}
        self._origin = f"{name}, {cfg.split}"
        if len(self._rates) > 1:
            if cfg.select_split in ("", cfg.split, data.split):
                raise ValueError(
                    f"evaluation with select_split={cfg.select_split!r}: the best of"
                    f" {len(self._rates)} rates is chosen on images that are neither trained on"
                    f" ({data.split!r}) nor measured on ({cfg.split!r}), such as 'train[99%:]' with"
                    " config.data.split='train[:99%]'; or set config.optim.sweep=()"
                )
            self._splits["select_"] = open_labelled(data.source, cfg.select_split, data.data_dir)
        trained = open_labelled(data.source, data.split, data.data_dir)
        if self._splits[""].class_names != trained.class_names:
            raise ValueError(
                f"{self._origin} has other classes than the training images of {data.source}:"
                f" {self._splits[''].num_classes} and {trained.num_classes}"
            )
        self._extractor = Extractor(config, predict["logits"], mesh, batch_size=cfg.batch_size)

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scalars, accuracies in percent, and no pictures.

        eval/top1, eval/top5, eval/loss: of the rate of the config. With a sweep also
        eval/select_top1_blr{RATE}: of each rate, on `select_split`; eval/best_blr: the rate for
        which that is highest (equal ones: whose loss is lower), and eval/best_top1,
        eval/best_top5: its accuracies. eval/images: how many were classified.

        Raises:
          ValueError: no image can be read.
        """
        measured, images = self._measure(state, self._splits[""])
        scalars = {f"eval/{name}": float(of[0]) for name, of in measured.items()}
        if "select_" in self._splits:
            chosen, _ = self._measure(state, self._splits["select_"])
            # A loss that is not a number is never the lowest.
            loss = np.nan_to_num(chosen["loss"], nan=np.inf)
            best = np.lexsort((loss, -chosen["top1"]))[0]
            scalars |= {
                f"eval/select_top1_blr{rate:g}": float(top1)
                for rate, top1 in zip(self._rates, chosen["top1"], strict=True)
            }
            scalars["eval/best_blr"] = float(self._rates[best])
            scalars |= {f"eval/best_{x}": float(measured[x][best]) for x in ("top1", "top5")}
        return scalars | {"eval/images": float(images)}, {}

    def _measure(self, state: Any, source: Source) -> tuple[dict[str, np.ndarray], int]:
        """top1, top5 and loss (R,) of a source, and the number of its images."""
        sums, images = np.zeros((3, len(self._rates))), 0
        for batch in self._extractor.batches(state, source):
            found = self._extractor.fetch(batch)
            logits_BRY = found.x[found.counted].astype(np.float64)
            label_B11 = found.label[found.counted][:, None, None]
            true_BR1 = np.take_along_axis(logits_BRY, label_B11, 2)
            place_Y = np.arange(logits_BRY.shape[2])
            # Of equal logits the first wins; one that is not a number beats none.
            beaten_BRY = (logits_BRY < true_BR1) | (
                (logits_BRY == true_BR1) & (place_Y >= label_B11)
            )
            rank_BR = logits_BRY.shape[2] - beaten_BRY.sum(2)
            with np.errstate(invalid="ignore"):
                loss_BR = np.logaddexp.reduce(logits_BRY, 2) - true_BR1[..., 0]
            images += len(logits_BRY)
            sums += np.stack([(rank_BR < 1).sum(0), (rank_BR < 5).sum(0), loss_BR.sum(0)])
        if not images:
            raise ValueError(f"no image of {self._origin} can be read: there is nothing to measure")
        top1, top5, loss = sums / images
        return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}, images
