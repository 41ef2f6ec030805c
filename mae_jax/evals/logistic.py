"""Logistic regression on frozen features, which are computed once, of any blocks of an encoder.

Each feature is standardised by its mean and standard deviation over the bank. The objective is the
mean cross-entropy over the bank plus strength / 2 times the squared weights (not the bias), in
float32 on all images at once, and L-BFGS minimises it: nothing is drawn at random. STRENGTHS are
tried until the cross-entropy on a tenth of the bank, which is held out, no longer falls; the
classifier that is reported is fitted to all of the bank, with the best of them. An image of the
bank whose features are not finite is left out, and a query like that counts as wrong.

The bank stays where it was computed, split over the mesh: images x width x blocks numbers in
float32, twice as many while it is put together, and beside it the standardised features of one
block and a few arrays of images x classes. One pass keeps the tokens of all blocks of a batch:
lower batch_size if they are too many.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import distributed
from mae_jax.errors import UserError
from mae_jax.evals import Report
from mae_jax.evals.features import Blocks, Extractor, Features, fetch, open_bank, require_known
from mae_jax.sharding import BATCH

STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))  # from strong to weak
HELD_OUT = 0.1  # share of the bank on which the strength and the best block are chosen
MOST = 1000  # iterations of L-BFGS for a fit
# L-BFGS ends when no part of the gradient is larger. At 1e-5, rounding chose the strength of small
# banks.
TOLERANCE = 2e-6


class Scale(NamedTuple):
    """The mean and the standard deviation of each feature."""

    mean: Array  # (D,)
    std: Array  # (D,)

    def apply(self, x: Array) -> Array:
        """Return standardised features; a row that is not finite becomes 0."""
        finite = jnp.isfinite(x).all(-1, keepdims=True)
        return jnp.where(finite, (x - self.mean) / self.std, 0.0)


class Linear(NamedTuple):
    """A linear classifier of standardised features."""

    weight: Array | np.ndarray  # (D, Y)
    bias: Array | np.ndarray  # (Y,)

    def logits(self, x: Array) -> Array:
        return jnp.matmul(x, self.weight, precision="highest") + self.bias


def standardise(bank: Features) -> tuple[Features, Scale]:
    """Return a bank with standardised features, in which only finite rows count, and their scale.

    A feature that is constant is divided by 1.
    """
    counted = bank.counted & jnp.isfinite(bank.x).all(-1)
    x = jnp.where(counted[..., None], bank.x, 0.0)
    count = counted.sum()
    mean = x.sum((0, 1)) / count
    centred = jnp.where(counted[..., None], x - mean, 0.0)
    std = jnp.sqrt(jnp.square(centred).sum((0, 1)) / count)
    scale = Scale(mean, jnp.where(std > 1e-6 * std.max(), std, 1.0))
    return bank._replace(x=centred / scale.std, counted=counted), scale


def cross_entropy(linear: Linear, bank: Features) -> Array:
    """Return the mean cross-entropy over the images of a standardised bank that count."""
    loss = optax.softmax_cross_entropy_with_integer_labels(linear.logits(bank.x), bank.label)
    return jnp.where(bank.counted, loss, 0.0).sum() / jnp.maximum(bank.counted.sum(), 1)


def fit(bank: Features, strength: Array | float, start: Linear) -> Linear:
    """Return the classifier that minimises the objective on a standardised bank.

    Args:
      bank: features (T, B, D) of one block, and classes from 0 to Y - 1.
    """

    def objective(linear: Linear) -> Array:
        return cross_entropy(linear, bank) + strength / 2 * jnp.square(linear.weight).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def improve(carry: tuple) -> tuple:
        linear, state, _, count = carry
        value, grad = value_and_grad(linear, state=state)
        updates, state = solver.update(
            grad, state, linear, value=value, grad=grad, value_fn=objective
        )
        return (
            optax.apply_updates(linear, updates),
            state,
            optax.tree.norm(grad, jnp.inf),
            count + 1,
        )

    def unfinished(carry: tuple) -> Array:
        _, _, largest, count = carry
        return (count < MOST) & (largest > TOLERANCE)

    begin = start, solver.init(start), jnp.inf, 0
    return jax.lax.while_loop(unfinished, improve, begin)[0]


def number(label: Array, classes: Array) -> Array:
    """Return the index of each label among the classes; an arbitrary one if it is not there."""
    return jnp.searchsorted(classes, label).clip(0, len(classes) - 1)


def hold_out(images: int, shape: tuple[int, int]) -> np.ndarray:
    """Return which rows (T, B) of a bank of `images` images are held out: always the same."""
    chosen = np.random.default_rng(0).permutation(images)[: max(1, round(HELD_OUT * images))]
    held = np.zeros(shape, bool)
    held.reshape(-1)[chosen] = True
    return held


def classify(linear: Linear, scale: Scale, x_BD: Array) -> Array:
    """Return the class (B,) with the largest logit; -1 for a row that is not finite."""
    best_B = linear.logits(scale.apply(x_BD)).argmax(-1)
    return jnp.where(jnp.isfinite(x_BD).all(-1), best_B, -1)


class Fitter:
    """The fit of a classifier to a bank that a mesh holds, with the best of STRENGTHS."""

    def __init__(self, mesh: Mesh):
        whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH))
        self.number = jax.jit(number, out_shardings=split)
        self._both = jax.jit(jnp.logical_and, out_shardings=split)
        self._standardise = jax.jit(standardise, out_shardings=(split, whole))
        self._fit = jax.jit(fit, out_shardings=whole)
        self._cross_entropy = jax.jit(cross_entropy, out_shardings=whole)

    def __call__(
        self, bank: Features, classes: int, held: np.ndarray, name: str
    ) -> tuple[Linear, Scale, float]:
        """Return the classifier of a bank, its scale, and the held-out cross-entropy.

        Args:
          held: the rows (T, B) on which the strength is chosen.
          name: of the split, for the error message.

        Raises:
          UserError: no features are finite, or none of those that choose the strength.
        """
        bank, scale = self._standardise(bank)
        counted = fetch(bank.counted)
        if not counted.any():
            raise UserError(
                f"logistic regression: the features of all images of {name} are not finite"
            )
        rest, tenth = (
            bank._replace(counted=self._both(bank.counted, chosen)) for chosen in (~held, held)
        )
        for part, words in ((held, "a held-out tenth"), (~held, "the other nine tenths")):
            if not (counted & part).any():
                raise UserError(
                    f"logistic regression: no image of {words} of {name} can be used: give a larger"
                    " bank_split"
                )
        linear = Linear(
            np.zeros((bank.x.shape[-1], classes), np.float32), np.zeros(classes, np.float32)
        )
        best = np.inf, STRENGTHS[0], linear
        for strength in STRENGTHS:  # each fit starts where the one before ended
            distributed.raise_if_stopping()
            linear = self._fit(rest, strength, linear)
            loss = float(fetch(self._cross_entropy(linear, tenth)))
            if not loss < best[0]:
                break
            best = loss, strength, linear
        loss, strength, linear = best
        return self._fit(bank, strength, linear), scale, loss


class Evaluator:
    """Accuracy on one split of a logistic regression that is fitted to another.

    Args:
      cfg: `bank_split`, `feature` (cls or mean), `layers` (see `features.Blocks`).
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._queries, self._bank = open_bank(cfg, config)
        self._cfg = cfg
        self._blocks = Blocks.of(cfg, config, predict)
        self._extractor = Extractor(config, self._blocks.compute, mesh, cfg.batch_size)
        self._fitter = Fitter(mesh)
        self._predict = jax.jit(classify)

    def run(self, state: Any) -> Report:
        """Return eval/logistic_{FEATURE}: top-1 accuracy of the last block in percent.

        With several layers also ..._block{N} of each, and ..._best of the block that is best on the
        held-out part of the bank (not on the queries), whose number is ..._best_block.
        """
        cfg, numbers = self._cfg, self._blocks.numbers
        features = self._extractor.bank(state, self._bank)
        label_TB, counted_TB = fetch((features.label, features.counted))
        classes = np.unique(label_TB[counted_TB])
        held = hold_out(len(self._bank), label_TB.shape)
        label = self._fitter.number(features.label, classes)
        fits = [
            self._fitter(Features(x, label, features.counted), len(classes), held, cfg.bank_split)
            for x in features.x
        ]
        right, images = np.zeros(len(numbers), int), 0
        for batch in self._extractor.batches(state, self._queries):
            found = [
                self._predict(linear, scale, x)
                for (linear, scale, _), x in zip(fits, batch.x, strict=True)
            ]
            found_B, label_B, counted_B = fetch((found, batch.label, batch.counted))
            require_known(cfg, self._queries, label_B[counted_B], classes)
            images += int(counted_B.sum())
            for i, number_B in enumerate(found_B):
                hit_B = (number_B >= 0) & (classes[number_B] == label_B)
                right[i] += int(hit_B[counted_B].sum())
        accuracies = dict(zip(numbers, (100 * right / images).tolist(), strict=True))
        name = f"{cfg.get('prefix', 'eval')}/logistic_{cfg.feature}"
        scalars = self._blocks.metrics(name, accuracies)
        if len(numbers) > 1:
            best = numbers[int(np.argmin([loss for _, _, loss in fits]))]
            scalars |= {f"{name}_best": accuracies[best], f"{name}_best_block": best}
        return Report(scalars)
