"""Accuracy of probes trained side by side, and of the one that held-out training images choose."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data import labels
from mae_jax.data.sources import Source
from mae_jax.errors import UserError
from mae_jax.evals import Report, results
from mae_jax.evals.features import Extractor

WAYS = (
    "train on some images, choose the best rate on others and measure on yet others, such as"
    " --config.data.split='train[:70%]' --config.evals.probe.select_split='train[70%:80%]' with"
    " test=train[80%:]; or choose none: config.optim.sweep=()"
)


class Evaluator:
    """Accuracy on a split of each head of a sweep over base rates.

    The first head has the rate of the config, the others those of config.optim.sweep. Which is best
    is decided on `select_split`, a share of the training data that the heads are not trained on,
    and never on `split`.

    Args:
      cfg: `select_split`, which may be '' without a sweep.
      predict: its "logits" gives (B, R, Y) for R rates.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        data, self._rates = config.data, (config.optim.blr, *config.optim.sweep)
        self._source, trained = results.open_both(cfg, config)
        self._about = {"source": cfg.source or data.source, "split": cfg.split}
        splits = {
            f"config.data.split={data.split!r}": trained,
            f"split={cfg.split!r}": self._source,
        }
        self._select: Source | None = None
        if len(self._rates) > 1:
            if not cfg.select_split:
                raise UserError(f"the best of {len(self._rates)} rates is chosen on what? {WAYS}")
            self._select = labels.open_labelled(data.source, cfg.select_split, data.data_dir)
            splits[f"select_split={cfg.select_split!r}"] = self._select
            self._about["chosen_on"] = cfg.select_split
        for (one, source), (other, other_source) in combinations(splits.items(), 2):
            labels.require_disjoint(f"evaluation: {one} and {other}", source, other_source, WAYS)
        self._extractor = Extractor(config, predict["logits"], mesh, cfg.batch_size)
        self._prefix = cfg.get("prefix", "eval")

    def run(self, state: Any) -> Report:
        """Return the accuracies of a TrainState in percent; `results.report` of the best rate.

        eval/top1, eval/top5, eval/loss: of the rate of the config. With a sweep also
        eval/select_top1_blr{RATE}: of each rate, on `select_split`; eval/best_blr: the rate for
        which that is highest (equal ones: whose loss is lower), and eval/best_top1,
        eval/best_top5: its accuracies. top5 with more than five classes. eval/images: how many were
        classified.
        """
        names, best = labels.names(self._source), 0
        predictions = results.classify(self._extractor, state, self._source)
        scalars = results.summary(predictions.head(0), len(names))
        if self._select:
            choice, best = self._choose(state, self._select)
            of_best = results.summary(predictions.head(best), len(names))
            accuracies = {f"best_{x}": of_best[x] for x in ("top1", "top5") if x in of_best}
            scalars |= choice | {"best_blr": self._rates[best]} | accuracies
        about = self._about | {"blr": self._rates[best]}
        return results.report(self._prefix, scalars, about, predictions.head(best), names)

    def _choose(self, state: Any, select: Source) -> tuple[dict[str, float], int]:
        """Return select_top1_blr{RATE} of each rate, and which is best."""
        predictions = results.classify(self._extractor, state, select)
        each = [results.summary(predictions.head(i), 0) for i in range(len(self._rates))]

        def key(head: int) -> tuple[float, float]:
            # A loss that is not a number is never the lowest.
            return -each[head]["top1"], np.nan_to_num(each[head]["loss"], nan=np.inf)

        names = (f"select_top1_blr{rate:g}" for rate in self._rates)
        top1 = (scalars["top1"] for scalars in each)
        return dict(zip(names, top1, strict=True)), min(range(len(each)), key=key)
