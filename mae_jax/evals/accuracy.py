"""Accuracy of a classifier: top-1, top-5 and loss on labelled images."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.errors import UserError, nearest
from mae_jax.evals import results
from mae_jax.evals.features import Extractor, open_labelled, require_disjoint


class Evaluator:
    """Classifies every image of a split once, whatever the batch size, devices and hosts.

    Args:
      cfg: `source` ('' = that of the training images), `split`, `batch_size`; optional `predict`,
        the name of what gives logits, `prefix` of the names of the results, and
        `of_training_images`, without which these are refused.
      config: the whole config.
      predict: name -> function (params, extra, batch) -> logits (B, Y).
      mesh: where the state lives.

    Raises:
      UserError: the source has no labels, other classes than the training images, or some of
        them.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        data = config.data
        name = cfg.source or data.source
        kind = cfg.get("predict", "logits")
        if kind not in predict:
            raise UserError(f"evaluation with predict={kind!r}{nearest(kind, list(predict))}")
        self._prefix = cfg.get("prefix", "eval")
        self._about = {"source": name, "split": cfg.split, "predict": kind}
        self._source = open_labelled(name, cfg.split, data.data_dir)
        self._origin = f"{name}, {cfg.split}"
        trained = open_labelled(data.source, data.split, data.data_dir)
        if self._source.class_names != trained.class_names:
            raise UserError(
                f"{self._origin} has other classes than the training images of {data.source}:"
                f" {self._source.num_classes} and {trained.num_classes}, or in another order;"
                " labels of the two cannot be compared"
            )
        if not cfg.get("of_training_images", False):
            require_disjoint(
                f"accuracy: split={cfg.split!r} and config.data.split={data.split!r}",
                self._source,
                trained,
                "it would be measured on what is trained on. Train on others, such as"
                " --config.data.split='train[:80%]' with test=train[80%:]; or, where this is meant,"
                " give the evaluation of_training_images=True",
            )
        self._extractor = Extractor(config, predict[kind], mesh, batch_size=cfg.batch_size)
        self.results: results.Results | None = None  # of the last run, for results.json

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scalars, on every host, and no pictures.

        eval/top1, eval/top5: percent; top5 with more than five classes. eval/loss: cross-entropy
        with the label, without smoothing. eval/images: how many were classified.

        Raises:
          UserError: no image can be read; a label is out of range.
        """
        found = results.classify(self._extractor, state, self._source)
        if not len(found.label_N):
            raise UserError(f"no image of {self._origin} can be read: there is nothing to measure")
        classes = self._source.class_names or []
        scalars = {
            "top1": 100 * float((found.rank_N < 1).mean()),
            "loss": float(found.loss_N.mean()),
            "images": float(len(found.label_N)),
        }
        if len(classes) > 5:
            scalars["top5"] = 100 * float((found.rank_N < 5).mean())
        self.results = results.Results(self._prefix, self._about, classes, found)
        return {f"{self._prefix}/{name}": value for name, value in scalars.items()}, {}
