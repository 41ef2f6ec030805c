"""Linear classification from a few images of each class, in closed form (ridge regression)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data import bad_images, bands, labels
from mae_jax.data.sources import Ranges, Source
from mae_jax.errors import UserError
from mae_jax.evals import Report
from mae_jax.evals.features import Extractor, feature_of, open_bank

PENALTIES = tuple(10.0**power for power in range(-6, 2))  # times the largest squared singular value


class Ridge(NamedTuple):
    """A linear classifier: the score of each class is (x - mean) / std @ weight + bias."""

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray  # (D, Y)
    bias: np.ndarray  # (Y,)
    penalty: float

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        """Return the class (N,) with the largest score; -1 for a row that is not finite."""
        scores_NY = (x_ND.astype(np.float64) - self.mean) / self.std @ self.weight + self.bias
        return np.where(np.isfinite(x_ND).all(1), scores_NY.argmax(1), -1)


def fit_ridge(x_ND: np.ndarray, label_N: np.ndarray, classes: int) -> Ridge:
    """Fit one-hot labels by least squares with a penalty on squared weights, in float64.

    Features are standardised; the bias carries no penalty. The penalty is the
    one of PENALTIES with the least squared error when each image is left out in turn, which has a
    closed form too; so these images alone decide.
    """
    x_ND = x_ND.astype(np.float64)
    mean, std = x_ND.mean(0), x_ND.std(0)
    std = np.where(std > 1e-6 * std.max(initial=1e-300), std, 1.0)
    target_NY = np.eye(classes)[label_N]
    bias = target_NY.mean(0)
    u, s, vt = np.linalg.svd((x_ND - mean) / std, full_matrices=False)
    projected = u.T @ (target_NY - bias)

    def left_out_error(penalty: float) -> float:
        shrink = s**2 / (s**2 + penalty)
        residual_NY = target_NY - bias - u * shrink @ projected
        leverage_N = np.square(u) @ shrink + 1 / len(x_ND)
        return np.square(residual_NY / np.maximum(1 - leverage_N, 1e-9)[:, None]).mean()

    penalty = min((max(x * s[0] ** 2, 1e-12) for x in PENALTIES), key=left_out_error)
    return Ridge(mean, std, vt.T * (s / (s**2 + penalty)) @ projected, bias, penalty)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some records of a source, as a source."""

    source: Source
    indices: list[int]
    num_classes: int | None
    class_names: list[str] | None
    ranges: Ranges = ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]


def draw_per_class(
    source: Source, count: int, channels: int, seed: int, dtype: type[np.number] = np.uint8
) -> Subset:
    """Draw `count` readable images of each class at random, and return them class by class.

    Records are read in a random order, and only until there are enough.

    Raises:
      UserError: a class has fewer; the message names it.
    """
    names = labels.names(source)
    drawn: list[list[int]] = [[] for _ in names]
    missing = len(names) * count
    for index in np.random.default_rng(seed).permutation(len(source)).tolist():
        if not missing:
            break
        label = source[index]["label"]
        wanted = 0 <= label < len(names) and len(drawn[label]) < count
        if wanted and bad_images.describe(source, index, channels, dtype) is None:
            drawn[label].append(index)
            missing -= 1
    if missing:
        name, has = next((n, len(x)) for n, x in zip(names, drawn, strict=True) if len(x) < count)
        raise UserError(
            f"{count} images of each class are wanted, and class {name!r} has {has} that can be"
            " read: ask for fewer, or use a larger split"
        )
    indices = [index for of_class in drawn for index in of_class]
    return Subset(source, indices, source.num_classes, source.class_names)


class Evaluator:
    """Accuracy on one split of a classifier fitted to a few images of each class of another.

    Args:
      cfg: `bank_split` (where the few are drawn from), `shots` (images per class, one or several
        numbers), `draws` (how often they are drawn: with seeds 0, 1, ...), `feature` (cls or mean).
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._queries, bank = open_bank(cfg, config)
        self._bank_split = cfg.bank_split
        if not cfg.shots or min(cfg.draws, *cfg.shots) < 1:
            raise UserError(
                f"few-shot with shots={tuple(cfg.shots)} and draws={cfg.draws}: give at least one"
                " image per class, and at least one draw"
            )
        channels = config.model.channels
        dtype = bands.pixel_type(config.data.get("value_range", ()))
        self._few = {
            shots: [draw_per_class(bank, shots, channels, seed, dtype) for seed in range(cfg.draws)]
            for shots in cfg.shots
        }
        self._name = f"{cfg.get('prefix', 'eval')}/fewshot{{}}_{cfg.feature}"
        compute = feature_of(predict, cfg.feature)
        self._extractor = Extractor(config, compute, mesh, cfg.batch_size)

    def run(self, state: Any) -> Report:
        """Return eval/fewshot{N}_{FEATURE}: top-1 in percent, the mean over the draws.

        With several draws also ..._std, the standard deviation (n - 1) between them.
        """
        x_ND, label_N = self._extractor.table(state, self._queries)
        classes, scalars = self._queries.num_classes or 0, {}
        for shots, draws in self._few.items():
            fits = [self._fit(*self._extractor.table(state, few), classes) for few in draws]
            accuracies = [100 * float((fit.predict(x_ND) == label_N).mean()) for fit in fits]
            name = self._name.format(shots)
            scalars[name] = float(np.mean(accuracies))
            if len(draws) > 1:
                scalars[f"{name}_std"] = float(np.std(accuracies, ddof=1))
        return Report(scalars)

    def _fit(self, x_ND: np.ndarray, label_N: np.ndarray, classes: int) -> Ridge:
        """Return `fit_ridge` of the rows that are finite.

        Raises:
          UserError: a class has none.
        """
        finite = np.isfinite(x_ND).all(1)
        if missing := set(label_N) - set(label_N[finite]):
            name = labels.names(self._queries)[min(missing)]
            raise UserError(
                f"few-shot: of class {name!r} no features of the images that were drawn from"
                f" {self._bank_split} are finite"
            )
        return fit_ridge(x_ND[finite], label_N[finite], classes)
