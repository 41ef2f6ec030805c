"""Accuracy of probes trained side by side, and of the one that held-out training images choose."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.labels import open_labelled, require_disjoint
from mae_jax.data.sources import Source
from mae_jax.errors import UserError
from mae_jax.evals import Report, results
from mae_jax.evals.features import Extractor, split_name

WAYS = (
    "train on some images, choose the best rate on others and measure on yet others, such as"
    " --config.data.split='train[:70%]' --config.evals.probe.select_split='train[70%:80%]' with"
    " test=train[80%:]; or choose none: config.optim.sweep=()"
)


class Evaluator:
    """Classifies a split by each head of a sweep over base rates.

    The first head has the rate of the config, the others those of config.optim.sweep. Which is best
    is decided on `select_split`, a share of the training data that the heads are not trained on,
    and never on `split`.

    Args:
      cfg: `source` ('' = that of the training images), `split`, `select_split` ('' without a
        sweep), `batch_size`; optional `prefix` of the metric names.
      predict: its "logits" gives (B, R, Y) for R rates.

    Raises:
      UserError: the source has no labels, or other classes than the training images; there is
        nothing to choose the best rate on, or two of the splits have images in common.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._rates = (config.optim.blr, *config.optim.sweep)
        self._source, trained = results.open_both(cfg, config)
        self._select = self._open_select(cfg, config)
        used = {
            "config.data.split": (config.data.split, trained),
            "split": (cfg.split, self._source),
        }
        if self._select:
            used["select_split"] = (cfg.select_split, self._select)
        for (one, (split, source)), (other, (other_split, other_source)) in combinations(
            used.items(), 2
        ):
            what = f"evaluation: {one}={split!r} and {other}={other_split!r}"
            require_disjoint(what, source, other_source, WAYS)
        self._extractor = Extractor(config, predict["logits"], mesh, cfg.batch_size)
        self._name, self._prefix = split_name(cfg, config), cfg.get("prefix", "eval")
        self._about = {"source": cfg.source or config.data.source, "split": cfg.split}
        self._select_name = f"{config.data.source}, {cfg.select_split}"
        self._chosen_on = {"chosen_on": cfg.select_split} if self._select else {}

    def _open_select(self, cfg: ConfigDict, config: ConfigDict) -> Source | None:
        """Open the images that choose the best rate; None without a sweep."""
        if len(self._rates) == 1:
            return None
        if not cfg.select_split:
            raise UserError(f"the best of {len(self._rates)} rates is chosen on what? {WAYS}")
        return open_labelled(config.data.source, cfg.select_split, config.data.data_dir)

    def run(self, state: Any) -> Report:
        """Return the accuracies of a TrainState in percent; `results.report` of the best rate.

        eval/top1, eval/top5, eval/loss: of the rate of the config. With a sweep also
        eval/select_top1_blr{RATE}: of each rate, on `select_split`; eval/best_blr: the rate for
        which that is highest (equal ones: whose loss is lower), and eval/best_top1,
        eval/best_top5: its accuracies. top5 with more than five classes. eval/images: how many were
        classified.

        Raises:
          UserError: no image can be read.
        """
        names = self._source.class_names or []
        predictions = results.classify(self._extractor, state, self._source, self._name)
        scalars, best = results.summary(predictions.head(0), len(names)), 0
        if self._select:
            choice, best = self._choose(state, self._select)
            of_best = results.summary(predictions.head(best), len(names))
            accuracies = {f"best_{x}": of_best[x] for x in ("top1", "top5") if x in of_best}
            scalars |= choice | {"best_blr": self._rates[best]} | accuracies
        about = self._about | {"blr": self._rates[best]} | self._chosen_on
        return results.report(
            results.Results(self._prefix, about, names, predictions.head(best)), scalars
        )

    def _choose(self, state: Any, select: Source) -> tuple[dict[str, float], int]:
        """Return select_top1_blr{RATE} of each rate, and which is best."""
        predictions = results.classify(self._extractor, state, select, self._select_name)
        each = [results.summary(predictions.head(i), 0) for i in range(len(self._rates))]
        top1, loss = (np.array([scalars[name] for scalars in each]) for name in ("top1", "loss"))
        # A loss that is not a number is never the lowest.
        best = int(np.lexsort((np.nan_to_num(loss, nan=np.inf), -top1))[0])
        names = (f"select_top1_blr{rate:g}" for rate in self._rates)
        return dict(zip(names, top1.tolist(), strict=True)), best
