"""Accuracy of probes trained side by side, and of the one that held-out training images choose."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.sources import Source
from mae_jax.errors import UserError
from mae_jax.evals import results
from mae_jax.evals.features import Extractor, open_labelled, require_disjoint

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
        sweep), `batch_size`; optional `prefix` of the names of the results.
      config: the whole config.
      predict: its "logits" is used, which gives (B, R, Y) for R rates.
      mesh: where the state lives.

    Raises:
      UserError: the source has no labels, or other classes than the training images; there is
        nothing to choose the best rate on, or two of the splits have images in common.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        data = config.data
        name = cfg.source or data.source
        self._rates = (config.optim.blr, *config.optim.sweep)
        self._splits = {"": open_labelled(name, cfg.split, data.data_dir)}
        self._prefix = cfg.get("prefix", "eval")
        self._origin = f"{name}, {cfg.split}"
        self._about = {"source": name, "split": cfg.split}
        self._classes, self._select_split = self._splits[""].class_names or [], cfg.select_split
        if len(self._rates) > 1:
            if not cfg.select_split:
                raise UserError(f"the best of {len(self._rates)} rates is chosen on what? {WAYS}")
            self._splits["select_"] = open_labelled(data.source, cfg.select_split, data.data_dir)
        trained = open_labelled(data.source, data.split, data.data_dir)
        used = {"config.data.split": (data.split, trained)}
        used |= {
            f"{name}split": (cfg[f"{name}split"], source) for name, source in self._splits.items()
        }
        for (name, (split, source)), (other, (other_split, found)) in combinations(used.items(), 2):
            what = f"evaluation: {name}={split!r} and {other}={other_split!r}"
            require_disjoint(what, source, found, WAYS)
        if self._splits[""].class_names != trained.class_names:
            raise UserError(
                f"{self._origin} has other classes than the training images of {data.source}:"
                f" {self._splits[''].num_classes} and {trained.num_classes}"
            )
        self._extractor = Extractor(config, predict["logits"], mesh, batch_size=cfg.batch_size)
        self.results: results.Results | None = None  # of the last run: those of the best rate

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scalars, accuracies in percent, and no pictures.

        eval/top1, eval/top5, eval/loss: of the rate of the config. With a sweep also
        eval/select_top1_blr{RATE}: of each rate, on `select_split`; eval/best_blr: the rate for
        which that is highest (equal ones: whose loss is lower), and eval/best_top1,
        eval/best_top5: its accuracies. top5 with more than five classes. eval/images: how many were
        classified.

        Raises:
          UserError: no image can be read.
        """
        found = self._classify(state, self._splits[""])
        top1, top5, loss = _means(found)
        scalars = {"top1": top1[0], "loss": loss[0]}
        if many := len(self._classes) > 5:
            scalars["top5"] = top5[0]
        best, about = 0, self._about | {"blr": self._rates[0]}
        if "select_" in self._splits:
            chosen, _, chosen_loss = _means(self._classify(state, self._splits["select_"]))
            # A loss that is not a number is never the lowest.
            best = np.lexsort((np.nan_to_num(chosen_loss, nan=np.inf), -chosen))[0]
            scalars |= {
                f"select_top1_blr{rate:g}": value
                for rate, value in zip(self._rates, chosen, strict=True)
            }
            scalars |= {"best_blr": self._rates[best]}
            scalars |= {"best_top1": top1[best]} | ({"best_top5": top5[best]} if many else {})
            about = self._about | {"blr": self._rates[best], "chosen_on": self._select_split}
        one = results.Predictions(*(x[:, best] for x in found))
        self.results = results.Results(self._prefix, about, self._classes, one)
        scalars["images"] = len(one.label_N)
        return {f"{self._prefix}/{name}": float(value) for name, value in scalars.items()}, {}

    def _classify(self, state: Any, source: Source) -> results.Predictions:
        """Predictions (N, R) of a source."""
        found = results.classify(self._extractor, state, source)
        if not len(found.label_N):
            raise UserError(f"no image of {self._origin} can be read: there is nothing to measure")
        return found


def _means(found: results.Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """top1 and top5 in percent, and loss, of each head (R,)."""
    rank_NR = found.rank_N
    return 100 * (rank_NR < 1).mean(0), 100 * (rank_NR < 5).mean(0), found.loss_N.mean(0)
