"""Segmentation by the nearest patches of a bank, each of which votes with all of its pixels.

A pixel gets the class that most of the k neighbours have at its place in the patch, of equally
frequent ones the lowest. A pixel without a class has no vote; where no neighbour has one, the
labels of whole neighbours decide. Exact: every patch is compared with the whole bank in
float32, and of equally near ones the first in the bank counts.

The bank, of one encoder block at a time, stays where it was computed, split over the mesh: patches
x width numbers in float32 (twice as many while it is put together) and patches x pixels bytes.
ADE20K at 224 with L/16: 4.0 million patches, 16 GB, or 8 GB with bank_dtype=float16, and 1 GB.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax import distributed
from mae_jax.data.label_maps import IGNORED
from mae_jax.errors import UserError
from mae_jax.evals import Report, iou, logistic
from mae_jax.evals.features import Features, fetch
from mae_jax.evals.knn import unit
from mae_jax.evals.patches import Patches, Reader
from mae_jax.models.compute import DTYPES
from mae_jax.sharding import BATCH

DISTANCES = ("cosine", "l2")


def closeness(query_QD: Array, bank_ND: Array, distance: str) -> Array:
    """Return (Q, N), larger for nearer ones: cosine, or |query|^2 - squared distance."""
    bank_ND = bank_ND.astype(jnp.float32)
    if distance == "cosine":
        return jnp.matmul(unit(query_QD), unit(bank_ND).T, precision="highest")
    dot_QN = jnp.matmul(query_QD, bank_ND.T, precision="highest")
    return 2 * dot_QN - jnp.square(bank_ND).sum(-1)


def mode(votes_QKE: Array) -> Array:
    """Return the most frequent class (Q, E) of K votes, the lowest of equal ones; or IGNORED."""
    votes_QKE = jnp.asarray(votes_QKE, jnp.int32)

    def count(number: Array, total_QKE: Array) -> Array:
        return total_QKE + (votes_QKE == votes_QKE[:, number][:, None])

    count_QKE = jax.lax.fori_loop(0, votes_QKE.shape[1], count, jnp.zeros_like(votes_QKE))
    score_QKE = jnp.where(votes_QKE == IGNORED, -1, count_QKE * 256 + IGNORED - votes_QKE)
    best_QE = score_QKE.max(1)
    return jnp.where(best_QE < 0, IGNORED, IGNORED - best_QE % 256).astype(jnp.uint8)


def predict(
    query_BLD: Array, bank: Patches, *, ks: tuple[int, ...], distance: str, mesh: Mesh
) -> Array:
    """Return the class of each pixel, uint8 (ks, B, L, E), of images whose features are given.

    Every device searches its own share of the bank, one batch of it after another, for one image
    after another; only the pixels of the k best of each device are exchanged.

    Args:
      query_BLD: standardised features.
      bank: (T, N, ...), with standardised features; at least max(ks) patches are counted.
      ks: numbers of neighbours.
    """
    most = max(ks)

    def search(query_BLD: Array, bank: Patches) -> Array:
        rows = bank.label.shape[1]
        first, ways = jax.lax.axis_index(BATCH) * rows, jax.lax.axis_size(BATCH)

        def image(query_LD: Array) -> Array:
            def merge(best: tuple[Array, Array], batch: tuple[Array, Array, Array]):
                number, x_ND, counted_N = batch
                close_LN = jnp.where(counted_N, closeness(query_LD, x_ND, distance), -jnp.inf)
                # Of equal ones top_k takes the first. Few are kept before they are merged.
                close_LK, row_LK = jax.lax.top_k(close_LN, min(most, rows))
                new = close_LK, number * rows + row_LK
                close, index = (jnp.concatenate(x, 1) for x in zip(best, new, strict=True))
                top, chosen = jax.lax.top_k(close, most)
                return (top, jnp.take_along_axis(index, chosen, 1)), None

            shape = (len(query_LD), most)
            start = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
            (close_LK, index_LK), _ = jax.lax.scan(
                merge, start, (jnp.arange(len(bank.label)), bank.x, bank.counted)
            )
            label = bank.label.astype(jnp.uint8).reshape(-1, 1)
            # The label of the whole patch rides along as one more pixel.
            pixels = bank.pixels.reshape(-1, bank.pixels.shape[-1])[index_LK]
            pixels_LKE = jnp.concatenate([pixels, label[index_LK]], -1)
            position_LK = index_LK // rows * (ways * rows) + first + index_LK % rows
            close_LK, position_LK, pixels_LKE = (
                jax.lax.all_gather(x, BATCH, axis=1, tiled=True)
                for x in (close_LK, position_LK, pixels_LKE)
            )
            order_LK = jnp.lexsort((position_LK, -close_LK), axis=1)[:, :most]
            pixels_LKE = jnp.take_along_axis(pixels_LKE, order_LK[..., None], 1)
            modes = jnp.stack([mode(pixels_LKE[:, :k]) for k in ks])
            return jnp.where(modes[..., :-1] == IGNORED, modes[..., -1:], modes[..., :-1])

        return jax.lax.map(image, query_BLD).swapaxes(0, 1)

    split: Any = P(None, BATCH)
    return jax.shard_map(
        search,
        mesh=mesh,
        in_specs=(P(), Patches(*[split] * 4)),
        out_specs=P(),
        check_vma=False,
    )(query_BLD, bank)


class Evaluator:
    """Segmentation of one split by the nearest patches of another.

    Args:
      cfg: that of `patches.Reader`, and `ks` (numbers of neighbours), `distances` (such as
        "cosine,l2"), `bank_dtype` (of the features in the bank).
    """

    def __init__(
        self, cfg: ConfigDict, config: ConfigDict, predict: Mapping[str, Callable], mesh: Mesh
    ):
        self._cfg, self._reader = cfg, Reader(cfg, config, predict, mesh)
        self._distances = tuple(x.strip() for x in cfg.distances.split(","))
        if unknown := [x for x in self._distances if x not in DISTANCES]:
            raise UserError(
                f"{cfg.type} with distances={cfg.distances!r}: {unknown[0]!r} is none of"
                f" {', '.join(DISTANCES)}"
            )
        if cfg.bank_dtype not in DTYPES:
            raise UserError(
                f"{cfg.type} with bank_dtype={cfg.bank_dtype!r}: give one of {', '.join(DTYPES)}"
            )
        patches = len(self._reader.bank_source) * self._reader.grid[0] * self._reader.grid[1]
        self._require_enough(patches)
        split, whole = NamedSharding(mesh, P(None, BATCH)), NamedSharding(mesh, P())
        self._standardise = jax.jit(self._standardised, out_shardings=(split, whole))
        self._search = {
            distance: jax.jit(partial(self._predict, distance=distance, mesh=mesh))
            for distance in self._distances
        }

    def _standardised(self, bank: Patches) -> tuple[Patches, logistic.Scale]:
        scaled, scale = logistic.standardise(Features(bank.x, bank.label, bank.counted))
        dtype = jnp.dtype(self._cfg.bank_dtype)
        return bank._replace(x=scaled.x.astype(dtype), counted=scaled.counted), scale

    def _predict(
        self, x_ND: Array, scale: logistic.Scale, bank: Patches, *, distance: str, mesh: Mesh
    ) -> Array:
        """Return (ks, B, L, E); IGNORED for a patch whose features are not finite."""
        query_BLD = scale.apply(x_ND).reshape(-1, int(np.prod(self._reader.grid)), x_ND.shape[-1])
        found = predict(query_BLD, bank, ks=tuple(self._cfg.ks), distance=distance, mesh=mesh)
        finite_BL1 = jnp.isfinite(x_ND).all(-1).reshape(query_BLD.shape[:2])[..., None]
        return jnp.where(finite_BL1, found, IGNORED)

    def run(self, state: Any) -> Report:
        """Return the report of `iou.report`, with a setting knn{K}_{DISTANCE} of each kind.

        With several layers also ..._block{N} of each; the setting without it is that of the last.
        """
        cfg, reader = self._cfg, self._reader
        names, images = reader.queries.class_names, 0
        settings: dict[str, np.ndarray] = {}
        pictures: dict[str, np.ndarray] = {}
        for block in reversed(reader.numbers):
            bank, scale = self._standardise(reader.bank(state, block))
            self._require_enough(int(fetch(bank.counted).sum()))
            end = f"_block{block}" if len(reader.numbers) > 1 else ""
            counts: dict[str, np.ndarray] = {}
            images = 0
            for patches, arrays in reader.batches(state, reader.queries, block):
                distributed.raise_if_stopping()
                truth_NE, counted_B = fetch((patches.pixels, arrays["counted"]))
                images += int(counted_B.sum())
                for distance, search in self._search.items():
                    found = fetch(search(patches.x, scale, bank))
                    for k, found_BLE in zip(cfg.ks, found, strict=True):
                        table = iou.confusion(
                            truth_NE.reshape(found_BLE.shape), found_BLE, len(names)
                        )
                        name = f"knn{k}_{distance}"
                        counts[name] = counts.get(name, 0) + table
                if not pictures and block == reader.numbers[-1]:
                    what = f"{max(cfg.ks)} nearest patches, {self._distances[-1]}."
                    whole = reader.whole(found_BLE.reshape(truth_NE.shape))
                    pictures[cfg.type] = reader.picture(arrays, whole, what, int(state.step))
            if block == reader.numbers[-1]:
                settings |= counts
            if end:
                settings |= {f"{name}{end}": table for name, table in counts.items()}
        about = reader.about | {"images": images, "bank_dtype": cfg.bank_dtype}
        prefix = cfg.get("prefix", "eval")
        return iou.report(prefix, "patch_knn", settings, about, names, pictures)

    def _require_enough(self, size: int) -> None:
        cfg = self._cfg
        if not cfg.ks or not 1 <= min(cfg.ks) <= max(cfg.ks) <= size:
            raise UserError(
                f"{cfg.type} with ks={tuple(cfg.ks)}: give numbers from 1 to the size of the bank,"
                f" which has {size:,} patches with a class ({cfg.bank_split})"
            )
