"""Linear classification from a few images of each class, in closed form (ridge regression)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.evals.features import (
    Extractor,
    draw_per_class,
    feature_of,
    open_labelled,
    require_disjoint,
)

PENALTIES = tuple(10.0**power for power in range(-6, 2))  # times the largest squared singular value


class Ridge(NamedTuple):
    """scores = (x - mean) / std @ weight + bias, of each class."""

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray  # (D, Y)
    bias: np.ndarray  # (Y,)
    penalty: float

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        """Classes (N,)."""
        scores_NY = (x_ND.astype(np.float64) - self.mean) / self.std @ self.weight + self.bias
        return scores_NY.argmax(1)


def fit_ridge(x_ND: np.ndarray, label_N: np.ndarray, classes: int) -> Ridge:
    """Least squares to one-hot labels with a penalty on squared weights, in float64.

    Features are standardised; the bias carries no penalty. Of PENALTIES the one is taken whose
    squared error is least when each image is left out in turn, which has a closed form too, so that
    nothing but these images decides.
    """
    x_ND = x_ND.astype(np.float64)
    mean, std = x_ND.mean(0), x_ND.std(0)
    std = np.where(std > 1e-6 * std.max(initial=1e-300), std, 1.0)
    target_NY = np.eye(classes)[label_N]
    bias = target_NY.mean(0)
    u, s, vt = np.linalg.svd((x_ND - mean) / std, full_matrices=False)
    projected = u.T @ (target_NY - bias)
    best = None
    for factor in PENALTIES:
        penalty = max(factor * s[0] ** 2, 1e-12)
        shrink = s**2 / (s**2 + penalty)
        residual_NY = target_NY - bias - u * shrink @ projected
        leverage_N = np.square(u) @ shrink + 1 / len(x_ND)
        left_out = residual_NY / np.maximum(1 - leverage_N, 1e-9)[:, None]
        error = np.square(left_out).mean()
        if best is None or error < best[0]:
            best = error, penalty, vt.T * (s / (s**2 + penalty)) @ projected
    assert best is not None
    return Ridge(mean, std, best[2], bias, best[1])


class Evaluator:
    """Classifies the images of one split after a few of each class of another.

    Args:
      cfg: `source` ('' = that of the training images), `split`, `bank_split` (where the few are
        drawn from), `shots` (images per class, one or several numbers), `draws` (how often they are
        drawn: with seeds 0, 1, ...), `feature` (cls or mean), `batch_size`; optional `prefix` of
        the names of the results.
      config: the whole config.
      predict: its "features" is used.
      mesh: where the state lives.

    Raises:
      UserError: the source has no labels, a class has too few images, no shot or draw is asked
        for, or the few would be drawn from what is classified.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        name, data_dir = cfg.source or config.data.source, config.data.data_dir
        self._queries = open_labelled(name, cfg.split, data_dir)
        bank = open_labelled(name, cfg.bank_split, data_dir)
        require_disjoint(
            f"few-shot: split={cfg.split!r} and bank_split={cfg.bank_split!r}",
            self._queries,
            bank,
            "it would be tested on what it was fitted to. Give others, such as 'train[80%:]' and"
            " 'train[:80%]'",
        )
        if cfg.draws < 1 or not cfg.shots or min(cfg.shots) < 1:
            raise UserError(
                f"few-shot with shots={tuple(cfg.shots)} and draws={cfg.draws}: give at least one"
                " number of images per class, and at least one draw"
            )
        self._cfg = cfg
        self._few = {
            shots: [
                draw_per_class(bank, shots, config.model.channels, seed)
                for seed in range(cfg.draws)
            ]
            for shots in cfg.shots
        }
        self._extractor = Extractor(
            config, feature_of(predict, cfg.feature), mesh, batch_size=cfg.batch_size
        )

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """eval/fewshot{N}_{FEATURE}: top-1 in percent, the mean over the draws, and no pictures.

        With several draws also ..._std, the standard deviation (n - 1) between them.

        Raises:
          UserError: no image can be read.
        """
        x_ND, label_N = self._extractor.table(state, self._queries)
        if not len(x_ND):
            raise UserError(f"few-shot: no image of split {self._cfg.split!r} can be read")
        scalars = {}
        for shots, draws in self._few.items():
            accuracies = []
            for few in draws:
                ridge = fit_ridge(
                    *self._extractor.table(state, few), self._queries.num_classes or 0
                )
                accuracies.append(100 * float((ridge.predict(x_ND) == label_N).mean()))
            name = f"{self._cfg.get('prefix', 'eval')}/fewshot{shots}_{self._cfg.feature}"
            scalars[name] = float(np.mean(accuracies))
            if len(draws) > 1:
                scalars[f"{name}_std"] = float(np.std(accuracies, ddof=1))
        return scalars, {}
