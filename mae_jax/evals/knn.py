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
from mae_jax.evals.features import Extractor, Features, feature_of, fetch, open_bank
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
    """Classifies the images of one split by the nearest ones of another.

    Args:
      cfg: `bank_split`, `ks` (numbers of neighbours), `temperature`, `feature` (cls or mean).
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._queries, self._bank = open_bank(cfg, config)
        if cfg.temperature <= 0:
            raise UserError(f"k-NN with temperature={cfg.temperature}: it must be positive")
        self._cfg = cfg
        self._require_enough(len(self._bank))
        compute = feature_of(predict, cfg.feature)
        self._extractor = Extractor(config, compute, mesh, cfg.batch_size)
        self._finite = jax.jit(lambda bank: bank.counted & jnp.isfinite(bank.x).all(-1))
        self._search = jax.jit(partial(neighbours, k=max(cfg.ks), mesh=mesh))

    def run(self, state: Any) -> Report:
        """Return eval/knn{K}_{FEATURE}: top-1 accuracy of K neighbours in percent."""
        cfg, bank = self._cfg, self._extractor.bank(state, self._bank)
        finite = self._finite(bank)
        bank_label, counted, voting = fetch((bank.label, bank.counted, finite))
        self._require_enough(int(voting.sum()), int((counted & ~voting).sum()))
        bank, classes = bank._replace(counted=finite), np.unique(bank_label[counted])
        right, images = dict.fromkeys(cfg.ks, 0), 0
        for batch in self._extractor.batches(state, self._queries):
            similarity_Bk, label_Bk, label_B, counted_B = fetch(
                (*self._search(batch.x, bank), batch.label, batch.counted)
            )
            self._require_known(label_B[counted_B], classes)
            images += int(counted_B.sum())
            for k in right:
                nearest = similarity_Bk[:, :k], label_Bk[:, :k]
                voted_B = vote(*nearest, self._queries.num_classes or 0, cfg.temperature)
                right[k] += int((voted_B == label_B)[counted_B].sum())
        name = f"{cfg.get('prefix', 'eval')}/knn{{}}_{cfg.feature}"
        return Report({name.format(k): 100 * right[k] / images for k in right})

    def _require_known(self, label_B: np.ndarray, classes: np.ndarray) -> None:
        """Raise UserError if a query has a class of which the bank has no image."""
        if len(unknown := np.setdiff1d(label_B, classes)):
            raise UserError(
                f"k-NN: no image of class {(self._queries.class_names or [])[unknown[0]]!r} is in"
                f" the bank ({self._cfg.bank_split}), and some are among the queries"
                f" ({self._cfg.split}): take a larger bank_split"
            )

    def _require_enough(self, size: int, not_finite: int = 0) -> None:
        """Raise UserError if more neighbours are asked for than the bank has."""
        cfg = self._cfg
        if not cfg.ks or min(cfg.ks) < 1 or max(cfg.ks) > size:
            more = f"; the features of {not_finite:,} more are not finite" if not_finite else ""
            raise UserError(
                f"k-NN with ks={tuple(cfg.ks)}: give numbers from 1 to the size of the bank, which"
                f" has {size:,} images ({cfg.bank_split}){more}"
            )
