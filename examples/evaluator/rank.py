"""The effective rank of the features, which needs no labels (RankMe, arXiv 2210.02885)."""

import jax
import numpy as np

from mae_jax import sharding
from mae_jax.data.sources import open_source
from mae_jax.evals import Report
from mae_jax.evals.features import Batches, feature_of, fetch


class Evaluator:
    """Embeds the images of a split, and asks how many directions the features fill."""

    def __init__(self, cfg, config, predict, mesh):
        data = config.data
        self.source = open_source(cfg.source or data.source, cfg.split, data.data_dir)
        self.batches = Batches(config, mesh, cfg.batch_size)
        rows = sharding.batch_sharding(mesh)
        self.embed = jax.jit(feature_of(predict, cfg.feature), out_shardings=rows)

    def run(self, state):
        """Return eval/rank, from 1 (all features on a line) to their width."""
        features = []
        for _, batch in self.batches.read(self.source):
            x_BD = self.embed(state.params, state.extra, {"image": batch["image"]})
            features.append(fetch(x_BD)[fetch(batch["counted"])])
        return Report({"eval/rank": effective_rank(np.concatenate(features))})


def effective_rank(features_ND):
    """Return the exponential of the entropy of the singular values, as shares of their sum."""
    singular = np.linalg.svd(features_ND - features_ND.mean(0), compute_uv=False)
    share = singular / singular.sum() + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))
