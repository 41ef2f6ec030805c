"""Accuracy of a classifier: top-1, top-5 and loss on labelled images."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data import labels
from mae_jax.errors import UserError, nearest
from mae_jax.evals import Report, results
from mae_jax.evals.features import Extractor


class Evaluator:
    """Top-1, top-5 and loss of a classifier on a split, each image once.

    Args:
      cfg: optional `predict`, the name of the function that gives logits (B, Y), and
        `of_training_images`, without which training images are refused.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        data, kind = config.data, cfg.get("predict", "logits")
        if kind not in predict:
            raise UserError(
                f"evaluation with predict={kind!r}{nearest(kind, predict)} (averaged_logits need"
                " config.ema)"
            )
        self._source, trained = results.open_both(cfg, config)
        if not cfg.get("of_training_images", False):
            labels.require_disjoint(
                f"accuracy: split={cfg.split!r} and config.data.split={data.split!r}",
                self._source,
                trained,
                "it would be measured on what is trained on. Train on others, such as"
                " --config.data.split='train[:80%]' with test=train[80%:]; or, where this is meant,"
                " give the evaluation of_training_images=True",
            )
        self._extractor = Extractor(config, predict[kind], mesh, cfg.batch_size)
        self._prefix = cfg.get("prefix", "eval")
        self._about = {"source": cfg.source or data.source, "split": cfg.split, "predict": kind}

    def run(self, state: Any) -> Report:
        """Return the accuracies of a TrainState, and the files of `results.report`.

        eval/top1, eval/top5: percent; top5 with more than five classes. eval/loss: cross-entropy
        with the label, without smoothing. eval/images: how many were classified.
        """
        names = labels.names(self._source)
        predictions = results.classify(self._extractor, state, self._source)
        scalars = results.summary(predictions, len(names))
        return results.report(self._prefix, scalars, self._about, predictions, names)
