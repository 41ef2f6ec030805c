"""Accuracy of a classifier: top-1, top-5 and loss on labelled images."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.config import nearest
from mae_jax.evals.features import Extractor, open_labelled


def measure(logits_BY: np.ndarray, label_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each image how many classes come before the true one, and the cross-entropy; in float64.

    Of equal logits the first class wins; one that is not a number is beaten by all.
    """
    logits_BY = logits_BY.astype(np.float64)
    true_B1 = np.take_along_axis(logits_BY, label_B[:, None], 1)
    place_Y = np.arange(logits_BY.shape[1])
    beaten_BY = (logits_BY < true_B1) | ((logits_BY == true_B1) & (place_Y >= label_B[:, None]))
    rank_B = logits_BY.shape[1] - beaten_BY.sum(1)
    shifted_BY = logits_BY - logits_BY.max(1, keepdims=True)
    log_sum_B = np.log(np.exp(shifted_BY).sum(1)) + logits_BY.max(1)
    return rank_B, log_sum_B - true_B1[:, 0]


class Evaluator:
    """Classifies every image of a split once, whatever the batch size, devices and hosts.

    Args:
      cfg: `source` ('' = that of the training images), `split`, `batch_size`; optional `predict`,
        the name of what gives logits, and `prefix` of the names of the results.
      config: the whole config.
      predict: name -> function (params, extra, batch) -> logits (B, Y).
      mesh: where the state lives.

    Raises:
      ValueError: the source has no labels, or other classes than the training images.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        data = config.data
        name = cfg.source or data.source
        kind = cfg.get("predict", "logits")
        if kind not in predict:
            raise ValueError(f"evaluation with predict={kind!r}{nearest(kind, list(predict))}")
        self._prefix = cfg.get("prefix", "eval")
        self._source = open_labelled(name, cfg.split, data.data_dir)
        self._origin = f"{name}, {cfg.split}"
        trained = open_labelled(data.source, data.split, data.data_dir)
        if self._source.class_names != trained.class_names:
            raise ValueError(
                f"{self._origin} has other classes than the training images of {data.source}:"
                f" {self._source.num_classes} and {trained.num_classes}, or in another order;"
                " labels of the two cannot be compared"
            )
        self._extractor = Extractor(config, predict[kind], mesh, batch_size=cfg.batch_size)

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scalars, on every host, and no pictures.

        eval/top1, eval/top5: percent; top5 with more than five classes. eval/loss: cross-entropy
        with the label, without smoothing. eval/images: how many were classified.

        Raises:
          ValueError: no image can be read; a label is out of range.
        """
        sums, images, classes = np.zeros(3), 0, 0
        for batch in self._extractor.batches(state, self._source):
            found = self._extractor.fetch(batch)
            classes = found.x.shape[1]
            rank_B, loss_B = measure(found.x[found.counted], found.label[found.counted])
            images += len(rank_B)
            sums += [(rank_B < 1).sum(), (rank_B < 5).sum(), loss_B.sum()]
        if not images:
            raise ValueError(f"no image of {self._origin} can be read: there is nothing to measure")
        top1, top5, loss = (sums / images).tolist()
        scalars = {"top1": 100 * top1, "loss": loss, "images": float(images)}
        if classes > 5:
            scalars["top5"] = 100 * top5
        return {f"{self._prefix}/{name}": value for name, value in scalars.items()}, {}
