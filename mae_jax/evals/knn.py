"""Weighted k-nearest-neighbour classification of frozen features, by cosine similarity.

The vote of a neighbour weighs exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978).
Exact: every query is compared with the whole bank, in float32; of equally near neighbours the one
that comes first in the bank counts. An image of the bank whose features are not finite has no
vote, and a query like that counts as wrong. The bank stays where it was computed, split over the
mesh.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.evals import Report
from mae_jax.evals.features import Blocks, Extractor, Features, fetch, open_bank, require_known
from mae_jax.sharding import BATCH


def unit(x_BD: Array) -> Array:
    """Return rows of length 1."""
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)


def neighbours(query_BD: Array, bank: Features, k: int, mesh: Mesh) -> tuple[Array, Array]:
    """Return similarities and labels (B, k) of the nearest images of a bank, the nearest first.

    Every device searches its own share of the bank, one batch of it after another, and only the k
    best of each device are exchanged.

    `k` is at most the number of images of the bank that count.
    """

    def search(query_BD: Array, bank: Features) -> tuple[Array, Array]:
        rows = bank.label.shape[1]
        first = jax.lax.axis_index(BATCH) * rows
        ways = jax.lax.axis_size(BATCH)

        def merge(best: tuple[Array, Array, Array], batch: tuple[Array, Features]):
            number, (x, label, counted) = batch
            similarity = jnp.matmul(query_BD, unit(x).T, precision="highest")
            similarity = jnp.where(counted, similarity, -jnp.inf)
            position = number * ways * rows + first + jnp.arange(rows)
            both = [
                jnp.concatenate([old, jnp.broadcast_to(new, similarity.shape)], 1)
                for old, new in zip(best, (similarity, position, label), strict=True)
            ]
            # Of equal ones top_k takes the first, which is the first in the bank.
            top, chosen = jax.lax.top_k(both[0], k)
            return (top, *(jnp.take_along_axis(x, chosen, 1) for x in both[1:])), None

        empty = jnp.full((len(query_BD), k), -1, jnp.int32)
        start = (jnp.full(empty.shape, -jnp.inf), empty, empty)
        best, _ = jax.lax.scan(merge, start, (jnp.arange(len(bank.label)), bank))
        similarity, position, label = (
            jax.lax.all_gather(x, BATCH, axis=1, tiled=True) for x in best
        )
        distance, _, label = jax.lax.sort((-similarity, position, label), num_keys=2)
        return -distance[:, :k], label[:, :k]

    split: Any = P(None, BATCH)
    return jax.shard_map(
        search,
        mesh=mesh,
        in_specs=(P(), Features(split, split, split)),
        out_specs=P(),
        check_vma=False,
    )(unit(query_BD), bank)


def vote(
    similarity_Bk: np.ndarray, label_Bk: np.ndarray, classes: int, temperature: float
) -> np.ndarray:
    """Return the class (B,) with the largest sum of weights, of equal ones the lowest.

    A query whose similarities are not finite gets -1.
    """
    with np.errstate(invalid="ignore"):
        below_Bk = similarity_Bk.astype(np.float64) - similarity_Bk.max(1, keepdims=True)
        weights = np.exp(below_Bk / temperature)
    total = np.zeros((len(label_Bk), classes))
    np.add.at(total, (np.arange(len(label_Bk))[:, None], label_Bk), weights)
    return np.where(np.isfinite(similarity_Bk).all(1), total.argmax(1), -1)


class Evaluator:
    """k-NN accuracy on one split, with the images of another as neighbours.

    Args:
      cfg: `bank_split`, `ks` (numbers of neighbours), `temperature`, `feature` (cls or mean),
        `layers` (see `features.Blocks`).
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._queries, self._bank = open_bank(cfg, config)
        if cfg.temperature <= 0:
            raise UserError(f"k-NN with temperature={cfg.temperature}: it must be positive")
        self._cfg = cfg
        self._require_enough(len(self._bank))
        self._blocks = Blocks.of(cfg, config, predict)
        self._extractor = Extractor(config, self._blocks.compute, mesh, cfg.batch_size)
        self._finite = jax.jit(lambda x, counted: counted & jnp.isfinite(x).all(-1))
        self._search = jax.jit(partial(neighbours, k=max(cfg.ks), mesh=mesh))

    def run(self, state: Any) -> Report:
        """Return eval/knn{K}_{FEATURE}: top-1 accuracy of K neighbours in percent.

        With several layers also eval/knn{K}_{FEATURE}_block{N} of each.
        """
        cfg, bank = self._cfg, self._extractor.bank(state, self._bank)
        bank_label, counted = fetch((bank.label, bank.counted))
        classes, banks = np.unique(bank_label[counted]), []
        for x in bank.x:
            banks.append(Features(x, bank.label, self._finite(x, bank.counted)))
            voting = fetch(banks[-1].counted)
            self._require_enough(int(voting.sum()), int((counted & ~voting).sum()))
        right = {k: dict.fromkeys(self._blocks.numbers, 0) for k in cfg.ks}
        images = 0
        for batch in self._extractor.batches(state, self._queries):
            near = [self._search(x, bank) for x, bank in zip(batch.x, banks, strict=True)]
            near, label_B, counted_B = fetch((near, batch.label, batch.counted))
            require_known(cfg, self._queries, label_B[counted_B], classes)
            images += int(counted_B.sum())
            for number, (similarity_Bk, label_Bk) in zip(self._blocks.numbers, near, strict=True):
                for k in right:
                    nearest = similarity_Bk[:, :k], label_Bk[:, :k]
                    voted_B = vote(*nearest, self._queries.num_classes or 0, cfg.temperature)
                    right[k][number] += int((voted_B == label_B)[counted_B].sum())
        scalars: dict[str, float] = {}
        for k, counts in right.items():
            accuracies = {number: 100 * count / images for number, count in counts.items()}
            name = f"{cfg.get('prefix', 'eval')}/knn{k}_{cfg.feature}"
            scalars |= self._blocks.metrics(name, accuracies)
        return Report(scalars)

    def _require_enough(self, size: int, not_finite: int = 0) -> None:
        """Raise UserError if more neighbours are asked for than the bank has."""
        cfg = self._cfg
        if not cfg.ks or min(cfg.ks) < 1 or max(cfg.ks) > size:
            more = f"; the features of {not_finite:,} more are not finite" if not_finite else ""
            raise UserError(
                f"k-NN with ks={tuple(cfg.ks)}: give numbers from 1 to the size of the bank, which"
                f" has {size:,} images ({cfg.bank_split}){more}"
            )
