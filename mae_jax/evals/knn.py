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
from mae_jax.evals.features import Extractor, Features, feature_of, open_labelled, require_disjoint
from mae_jax.sharding import BATCH


def unit(x_BD: Array) -> Array:
    """Rows of length 1."""
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)


def neighbours(query_BD: Array, bank: Features, k: int, mesh: Mesh) -> tuple[Array, Array]:
    """Cosine similarities and labels (B, k) of the nearest images of a bank, the nearest first.

    Every device searches its own share of the bank, one batch of it after another, and only the k
    best of each device are exchanged.

    Args:
      query_BD: of any lengths.
      bank: of T batches; `k` is at most the number of images that count.
    """

    def search(query_BD: Array, bank: Features) -> tuple[Array, Array]:
        rows = bank.label.shape[1]
        first = jax.lax.axis_index(BATCH) * rows
        ways = jax.lax.axis_size(BATCH)

        def merge(best: tuple[Array, Array, Array], batch: tuple[Array, Features]):
            number, (x, label, counted) = batch
            similarity = jnp.matmul(query_BD, unit(x).T, precision="highest")
            similarity = jnp.where(counted, similarity, -jnp.inf)
            place = number * ways * rows + first + jnp.arange(rows)
            both = [
                jnp.concatenate([old, jnp.broadcast_to(new, similarity.shape)], 1)
                for old, new in zip(best, (similarity, place, label), strict=True)
            ]
            # Of equal ones top_k takes the first, which is the first in the bank.
            top, chosen = jax.lax.top_k(both[0], k)
            return (top, *(jnp.take_along_axis(x, chosen, 1) for x in both[1:])), None

        empty = jnp.full((len(query_BD), k), -1, jnp.int32)
        start = (jnp.full(empty.shape, -jnp.inf), empty, empty)
        best, _ = jax.lax.scan(merge, start, (jnp.arange(len(bank.label)), bank))
        similarity, place, label = (jax.lax.all_gather(x, BATCH, axis=1, tiled=True) for x in best)
        distance, _, label = jax.lax.sort((-similarity, place, label), num_keys=2)
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
    """The class (B,) with the largest sum of weights, of equal ones the lowest; -1 = none.

    None is that of a query whose similarities are not finite.
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
      cfg: `source` ('' = that of the training images), `split` (the queries), `bank_split`, `ks`
        (numbers of neighbours), `temperature` (0.07), `feature` (cls or mean), `batch_size`;
        optional `prefix` of the names of the results.
      config: the whole config.
      predict: its "features" is used.
      mesh: where the state lives.

    Raises:
      UserError: the source has no labels, `ks` is empty or larger than the bank, queries and bank
        have images in common, or a temperature that is not positive.
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._name = cfg.source or config.data.source
        data_dir = config.data.data_dir
        self._queries = open_labelled(self._name, cfg.split, data_dir)
        self._bank = open_labelled(self._name, cfg.bank_split, data_dir)
        require_disjoint(
            f"k-NN: split={cfg.split!r} and bank_split={cfg.bank_split!r}",
            self._queries,
            self._bank,
            "they would find themselves. Give others, such as 'train[80%:]' and 'train[:80%]'",
        )
        if cfg.temperature <= 0:
            raise UserError(f"k-NN with temperature={cfg.temperature}: it must be positive")
        self._cfg = cfg
        self._check_ks(len(self._bank))
        self._extractor = Extractor(
            config, feature_of(predict, cfg.feature), mesh, batch_size=cfg.batch_size
        )
        self._finite = jax.jit(lambda bank: bank.counted & jnp.isfinite(bank.x).all(-1))
        self._search = jax.jit(partial(neighbours, k=max(cfg.ks), mesh=mesh))

    def _check_ks(self, bank: int, lost: int = 0) -> None:
        ks = self._cfg.ks
        if not ks or min(ks) < 1 or max(ks) > bank:
            raise UserError(
                f"k-NN with ks={tuple(ks)}: give numbers from 1 to the size of the bank, which has"
                f" {bank:,} images ({self._name}, {self._cfg.bank_split})"
                + (f"; the features of {lost:,} more are not finite" if lost else "")
            )

    def run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """eval/knn{K}_{FEATURE}: top-1 accuracy of K neighbours in percent, and no pictures.

        Raises:
          UserError: more of the bank is asked for than can be read; queries have a class that the
            bank lacks.
        """
        classes = self._queries.num_classes or 0
        bank = self._extractor.bank(state, self._bank)
        finite = self._finite(bank)
        label, counted, voting = self._extractor.fetch((bank.label, bank.counted, finite))
        self._check_ks(int(voting.sum()), int((counted & ~voting).sum()))
        bank = bank._replace(counted=finite)
        known = np.unique(label[counted])
        right, images = dict.fromkeys(self._cfg.ks, 0), 0
        for batch in self._extractor.batches(state, self._queries):
            found = self._extractor.fetch(
                (*self._search(batch.x, bank), batch.label, batch.counted)
            )
            similarity_Bk, label_Bk, label_B, counted_B = found
            unknown = np.setdiff1d(label_B[counted_B], known)
            if len(unknown):
                names = self._queries.class_names or []
                raise UserError(
                    f"k-NN: no image of class {names[unknown[0]]!r} is in the bank"
                    f" ({self._name}, {self._cfg.bank_split}), and some are among the queries"
                    f" ({self._cfg.split}): take a larger bank_split"
                )
            images += int(counted_B.sum())
            for k in self._cfg.ks:
                voted = vote(similarity_Bk[:, :k], label_Bk[:, :k], classes, self._cfg.temperature)
                right[k] += int((voted == label_B)[counted_B].sum())
        if not images:
            raise UserError(f"k-NN: no image of {self._name}, {self._cfg.split} can be read")
        scalars = {
            f"{self._cfg.get('prefix', 'eval')}/knn{k}_{self._cfg.feature}": 100 * right[k] / images
            for k in right
        }
        return scalars, {}
